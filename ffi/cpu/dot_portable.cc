// Vectors of four in the compiler's own extension: right on every machine, SSE2 or NEON where
// there.
#include "dot_kernel.h"
#include "float16.h"

namespace w4a16::cpu {
namespace {

struct Portable {
  static constexpr int kWidth = 4;
  static constexpr int kTileRows = 4;
  static constexpr int kAccumulators = 8;
  typedef float Float __attribute__((vector_size(16)));
  typedef uint32_t Int __attribute__((vector_size(16)));

  struct Column {
    Float scale, zero;
  };
  static Column MakeColumn(float s0, float z0, float s1, float z1) {
    return {Float{s0, s0, s1, s1}, Float{z0, z0, z1, z1}};
  }
  template <bool kTwoGroups>
  static Float Decode(Int words, const Column& column) {
    typedef int32_t Signed __attribute__((vector_size(16)));
    const Float code = __builtin_convertvector((Signed)(words & 15), Float);
    return (code - column.zero) * column.scale;
  }
  static Int NextNibble(Int words) { return words >> 4; }

  static Int LoadWords(const uint32_t* p) { return Read<Int>(p); }
  static Float LoadFloats(const float* p) { return Read<Float>(p); }
  static Float Zero() { return Float{}; }
  static Float Broadcast(float v) { return Float{v, v, v, v}; }
  static Float And(Float v, const uint32_t* mask) { return (Float)((Int)v & Read<Int>(mask)); }
  static Float MulAdd(Float a, Float b, Float c) { return a * b + c; }
  static Float Mul(Float a, Float b) { return a * b; }
  static Float Add(Float a, Float b) { return a + b; }
  // out[i] = the sum of the lanes of the i-th argument.
  static void Sum4(Float a, Float b, Float c, Float d, float* out) {
    const Float v[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) out[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
  }

  static Float Load(const void* p, w4a16_dtype dtype) {
    if (dtype == W4A16_F32) return Read<Float>(p);
    uint16_t half[4];
    __builtin_memcpy(half, p, sizeof(half));
    Float v;
    for (int i = 0; i < 4; ++i)
      v[i] = dtype == W4A16_F16 ? HalfToFloat(half[i]) : BFloat16ToFloat(half[i]);
    return v;
  }
  static void Store(float* p, Float v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static void StoreAs(void* p, Float v, w4a16_dtype dtype) {
    if (dtype == W4A16_F32) return Store(static_cast<float*>(p), v);
    uint16_t half[4];
    for (int i = 0; i < 4; ++i)
      half[i] = dtype == W4A16_F16 ? FloatToHalf(v[i]) : FloatToBFloat16(v[i]);
    __builtin_memcpy(p, half, sizeof(half));
  }

 private:
  template <class T>
  static T Read(const void* p) {
    T v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
};

}  // namespace

const DotKernel kDotPortable = kDotKernel<Portable>;

}  // namespace w4a16::cpu
