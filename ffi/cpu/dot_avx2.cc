#include <immintrin.h>

#include "dot_kernel.h"

namespace w4a16::cpu {
namespace {

struct Avx2 {
  static constexpr int kWidth = 8;
  static constexpr int kTileRows = 4;
  static constexpr int kAccumulators = 8;
  using Float = __m256;
  using Int = __m256i;

  struct Column {
    Float scale, zero;
  };
  static Float Halves(float lower, float upper) {
    return _mm256_blend_ps(_mm256_set1_ps(lower), _mm256_set1_ps(upper), 0xcc);
  }
  static Column MakeColumn(float s0, float z0, float s1, float z1) {
    return {Halves(s0, s1), Halves(z0, z1)};
  }
  template <bool kTwoGroups>
  static Float Decode(Int words, const Column& column) {
    const Float code = _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(15)));
    return _mm256_mul_ps(_mm256_sub_ps(code, column.zero), column.scale);
  }
  static Int NextNibble(Int words) { return _mm256_srli_epi32(words, 4); }

  static Int LoadWords(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Float LoadFloats(const float* p) { return _mm256_load_ps(p); }
  static Float Zero() { return _mm256_setzero_ps(); }
  static Float Broadcast(float v) { return _mm256_set1_ps(v); }
  static Float And(Float v, const uint32_t* mask) {
    return _mm256_and_ps(v, _mm256_load_ps(reinterpret_cast<const float*>(mask)));
  }
  static Float MulAdd(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float Mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float Add(Float a, Float b) { return _mm256_add_ps(a, b); }
  // out[i] = the sum of the lanes of the i-th argument.
  static void Sum4(Float a, Float b, Float c, Float d, float* out) {
    const Float sum = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1)));
  }

  static Float Load(const void* p, w4a16_dtype dtype) {
    if (dtype == W4A16_F32) return _mm256_loadu_ps(static_cast<const float*>(p));
    const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(p));
    if (dtype == W4A16_F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static void Store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static void StoreAs(void* p, Float v, w4a16_dtype dtype) {
    if (dtype == W4A16_F32) return _mm256_storeu_ps(static_cast<float*>(p), v);
    __m128i half;
    if (dtype == W4A16_F16) {
      half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      const Int bits = _mm256_castps_si256(v);
      const Int odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const Int rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
      const Int quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
      const Int nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
      const Int upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
      half = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
    }
    _mm_storeu_si128(static_cast<__m128i*>(p), half);
  }
};

}  // namespace

const DotKernel kDotAvx2 = kDotKernel<Avx2>;

}  // namespace w4a16::cpu
