#include <immintrin.h>

#include "dot_kernel.h"

namespace w4a16::cpu {
namespace {

struct Avx512 {
  static constexpr int kWidth = 16;
  static constexpr int kTileRows = 8;
  static constexpr int kAccumulators = 16;
  using Float = __m512;
  using Int = __m512i;

  // The 16 weights of a column, by code: a permutation looks them up and ignores the upper bits of
  // the index.
  struct Column {
    Float lower, upper;
  };
  static Column MakeColumn(float s0, float z0, float s1, float z1) {
    const Float codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(z0)), _mm512_set1_ps(s0)),
            _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(z1)), _mm512_set1_ps(s1))};
  }
  template <bool kTwoGroups>
  static Float Decode(Int words, const Column& column) {
    const Float lower = _mm512_permutexvar_ps(words, column.lower);
    return kTwoGroups ? _mm512_mask_permutexvar_ps(lower, 0xcccc, words, column.upper) : lower;
  }
  static Int NextNibble(Int words) { return _mm512_srli_epi32(words, 4); }

  static Int LoadWords(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static Float LoadFloats(const float* p) { return _mm512_load_ps(p); }
  static Float Zero() { return _mm512_setzero_ps(); }
  static Float Broadcast(float v) { return _mm512_set1_ps(v); }
  static Float And(Float v, const uint32_t* mask) {
    return _mm512_and_ps(v, _mm512_load_ps(reinterpret_cast<const float*>(mask)));
  }
  static Float MulAdd(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float Mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float Add(Float a, Float b) { return _mm512_add_ps(a, b); }
  // out[i] = the sum of the lanes of the i-th argument.
  static void Sum4(Float a, Float b, Float c, Float d, float* out) {
    const Float ab =
        _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    const Float cd =
        _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    Float sum =
        _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4e));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xb1));
    const Int first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, sum)));
  }

  static Float Load(const void* p, w4a16_dtype dtype) {
    if (dtype == W4A16_F32) return _mm512_loadu_ps(p);
    const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    if (dtype == W4A16_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static void Store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static void StoreAs(void* p, Float v, w4a16_dtype dtype) {
    if (dtype == W4A16_F32) return _mm512_storeu_ps(p, v);
    __m256i half;
    if (dtype == W4A16_F16) {
      half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      const Int bits = _mm512_castps_si512(v);
      const Int odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const Int rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      const Int quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
      const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
      half =
          _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
    }
    _mm256_storeu_si256(static_cast<__m256i*>(p), half);
  }
};

}  // namespace

const DotKernel kDotAvx512 = kDotKernel<Avx512>;

}  // namespace w4a16::cpu
