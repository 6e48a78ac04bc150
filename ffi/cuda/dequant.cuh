// Codes of a packed word (layout.h) -> pairs of 16-bit floats, by writing them into the mantissa of
// a magic number. A word yields the four A registers of mma.m16n8k16: a[r + 2 * hi] holds the codes
// of nibbles i = r + 2 * hi (low half) and i + 4 (high half).
//
//   float16   0x6400 | c        = 1024 + c           c in bits 0..3 of a half word
//             0x5400 | c << 4   = 64 + c             c in bits 4..7
//             0x0000 | c        = c * 2^-24          a subnormal, which mma multiplies exactly
//             0x0000 | c << 4   = c * 2^-20
//   bfloat16  0x3f80 | c        = 1 + c / 128        7 bits of mantissa: c must be shifted to bit 0
//             0x0000 | c        = c * 2^-133         a subnormal; so are sums, unless x is LargeX
//             0x0000 | c << 4   = c * 2^-129         its highest bit is the exponent's lowest
//   Either, with a whole byte in place of c.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../layout.h"
#include "ptx.cuh"

namespace w4a16 {

// (a & b) | c in one instruction.
__device__ __forceinline__ uint32_t AndOr(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ uint32_t AddF16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ uint32_t MulBf16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// a * b + c of pairs of T.
template <typename T>
__device__ __forceinline__ uint32_t FmaX2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  if constexpr (std::is_same_v<T, __half>) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  }
  return d;
}

// The codes' bits as they lie. One fma makes code - zero of them, or its product with a scale,
// rounded once, but for a factor of Dequantizer<T>::kUnit.
__device__ __forceinline__ void CodeBits(uint32_t w, uint32_t (&a)[4]) {
  const uint32_t v = w >> 8;
  a[0] = w & 0x000f000f;
  a[1] = w & 0x00f000f0;
  a[2] = v & 0x000f000f;
  a[3] = v & 0x00f000f0;
}

// Likewise, in an instruction less, but a[0] and a[2] are whole bytes, of which a[1] and a[3] are
// the upper halves: sums over row half 0 have those over row half 1 in them.
__device__ __forceinline__ void CodeBytes(uint32_t w, uint32_t (&a)[4]) {
  a[0] = w & 0x00ff00ff;
  a[1] = w & 0x00f000f0;
  a[2] = __byte_perm(w, 0, 0x4341);
  a[3] = a[2] & 0x00f000f0;
}

// Both bit patterns below belong to small integers (or halves of them), so every result is exact.
template <typename T>
struct Dequantizer;

static_assert(kSymmetricZero == 8);

template <>
struct Dequantizer<__half> {
  // a = code - 8.
  __device__ static __forceinline__ void Exact(uint32_t w, uint32_t (&a)[4]) {
    constexpr uint32_t kLow = 0xe408e408;   // -(1024 + 8)
    constexpr uint32_t kHigh = 0xd480d480;  // -(64 + 8)
    const uint32_t v = w >> 8;
    a[0] = AddF16x2(AndOr(w, 0x000f000f, 0x64006400), kLow);
    a[1] = AddF16x2(AndOr(w, 0x00f000f0, 0x54005400), kHigh);
    a[2] = AddF16x2(AndOr(v, 0x000f000f, 0x64006400), kLow);
    a[3] = AddF16x2(AndOr(v, 0x00f000f0, 0x54005400), kHigh);
  }

  // a = (code + kOffset) / Step(r), in fewer instructions, for x made LargeX; r = 0, 1 is the row
  // half. kAddsHalves: they are as CodeBytes makes them.
  static constexpr float kOffset = 0.0f;
  static constexpr bool kAddsHalves = true;
  __device__ static __forceinline__ uint32_t LargeX(uint32_t x) { return x; }
  __device__ static constexpr float Step(int r) { return r == 0 ? 0x1p24f : 0x1p20f; }
  __device__ static constexpr uint32_t InverseStep(int r) {
    return r == 0 ? 0x00010001 : 0x00100010;
  }
  __device__ static __forceinline__ void Affine(uint32_t w, uint32_t (&a)[4]) { CodeBytes(w, a); }

  // Fractional zeros below 2^-5, and such differences, are rounded to multiples of 2^-15.
  static constexpr float kUnit = 0x1p9f;
  static constexpr uint16_t kMinusUnit = 0x9800;        // -1 / kUnit
  static constexpr uint16_t kMinusEightUnits = 0xa400;  // -8 / kUnit
  // -(8 + 8 * 16) and -8 * 16 over kUnit.
  __device__ static constexpr uint16_t MinusBytes(int r) { return r == 0 ? 0xb440 : 0xb400; }
  // A scale times this takes a difference to 1/8 of the weight: finite for scales below 1024, and
  // rounded no further than the weight would be from 2^-11 on; to multiples of 2^-21 below.
  static constexpr float kScaleUnit = 0x1p6f;
  static constexpr uint16_t kScaleUnits = 0x5400;
  // From CodeBits of row half r to code / kUnit.
  __device__ static constexpr uint16_t BitsToUnits(int r) { return r == 0 ? 0x7800 : 0x6800; }
};

template <>
struct Dequantizer<__nv_bfloat16> {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  // x * 2^64, so that sums are normal: finite for x below 2^63, and what is lost is below 2^-80.
  static constexpr float kOffset = 0.0f;
  static constexpr bool kAddsHalves = true;
  __device__ static __forceinline__ uint32_t LargeX(uint32_t x) { return MulBf16x2(x, 0x5f805f80); }
  __device__ static constexpr float Step(int r) { return r == 0 ? 0x1p69f : 0x1p65f; }
  __device__ static constexpr uint32_t InverseStep(int r) {
    return r == 0 ? 0x00010001 : 0x00100010;
  }
  __device__ static __forceinline__ void Affine(uint32_t w, uint32_t (&a)[4]) { CodeBytes(w, a); }
#else
  static constexpr float kOffset = 128.0f;
  static constexpr bool kAddsHalves = false;
  __device__ static __forceinline__ uint32_t LargeX(uint32_t x) { return x; }
  __device__ static constexpr float Step(int) { return 128.0f; }
  __device__ static constexpr uint32_t InverseStep(int) { return 0x3c003c00; }
  __device__ static __forceinline__ void Affine(uint32_t w, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = AndOr(w >> (4 * i), 0x000f000f, 0x3f803f80);
  }
#endif

  // Exact for scales below 2^35 and products from 2^-86 on.
  static constexpr float kUnit = 0x1p40f;
  static constexpr uint16_t kMinusUnit = 0xab80;
  static constexpr uint16_t kMinusEightUnits = 0xad00;
  __device__ static constexpr uint16_t MinusBytes(int r) { return r == 0 ? 0xaf08 : 0xaf00; }
  static constexpr float kScaleUnit = 1.0f;
  __device__ static constexpr uint16_t BitsToUnits(int r) { return r == 0 ? 0x6e00 : 0x6c00; }
};

// a = (code - 8) / ExactStep(r), as CodeBytes makes them; r = 0, 1 is the row half.
template <typename T>
__device__ constexpr float ExactStep(int r) {
  return r == 0 ? Dequantizer<T>::kUnit : Dequantizer<T>::kUnit / 16;
}
template <typename T>
__device__ __forceinline__ void ExactBytes(uint32_t w, uint32_t (&a)[4]) {
  using D = Dequantizer<T>;
  constexpr uint32_t kTwice = 0x10001;
  CodeBytes(w, a);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    a[i] = FmaX2<T>(a[i], D::BitsToUnits(0) * kTwice, D::MinusBytes(i % 2) * kTwice);
}

template <typename T>
struct Pair;
template <>
struct Pair<__half> {
  using Type = __half2;
  __device__ static inline uint32_t Round(float lo, float hi) {
    const Type pair = __floats2half2_rn(lo, hi);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  __device__ static inline uint32_t Round(float lo, float hi) {
    const Type pair = __floats2bfloat162_rn(lo, hi);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

// Makes A of codes: T((code - zero) * scale), or T(code - zero) unless kScale, over kUnit.
//
// Without zeros one fma makes a weight of its code's bits, in float16 if the scale is below 2^-5,
// that is, for weights up to 1/4. Where some lane of a warp has a larger one, codes become units
// first and are scaled then, as with zeros: the weights are the same. kTellsScales: whether to tell
// the two cases apart, which takes a branch and registers, or to take all for the second.
template <typename T, bool kHasZeros, bool kScale, bool kTellsScales = true>
struct WeightMaker {
  using T2 = typename Pair<T>::Type;
  using D = Dequantizer<T>;

  static constexpr bool kIsF16 = std::is_same_v<T, __half>;
  static constexpr bool kTells = kIsF16 && !kHasZeros && kScale && kTellsScales;
  static constexpr bool kByOneFma = kScale && !kHasZeros && (!kIsF16 || kTells);

  // Differences from 8 alone are float16 in fewer instructions.
  static constexpr bool kFromBits = !kIsF16 || kHasZeros || kScale;
  static constexpr float kUnit = !kFromBits ? 1.0f : D::kUnit / (kScale ? D::kScaleUnit : 1.0f);

  // A weight is bits * times + plus, and that times `scale` if kScale, but not kByOneFma, or if
  // `scales_last`. Pairs are of the rows of registers 0 and 2, and of 1 and 3.
  struct Factors {
    T2 times, plus, scale;
    bool scales_last;  // set if kTells: some lane of the warp has a large scale
  };

  // Of a lane's rows, whose scales are in shared memory from `scales` on, and zeros, if any, from
  // `zeros` on. The whole warp calls it.
  __device__ static inline Factors Load(uint32_t scales, uint32_t zeros) {
    const T2 scale = LoadRows(scales);
    Factors f{Units(), MinusEight(), scale};
    if constexpr (kHasZeros) f.plus = __hmul2(LoadRows(zeros), Both(D::kMinusUnit, D::kMinusUnit));
    if constexpr (kScale && D::kScaleUnit != 1.0f)
      f.scale = __hmul2(scale, Both(D::kScaleUnits, D::kScaleUnits));
    if constexpr (kByOneFma) {
      f.times = __hmul2(f.times, f.scale);
      f.plus = __hmul2(f.plus, f.scale);
    }
    if constexpr (kTells) {
      constexpr uint16_t kLarge = 0x2800;  // 2^-5
      f.scales_last = !__all_sync(0xffffffff, __hblt2(__habs2(scale), Both(kLarge, kLarge)));
    }
    return f;
  }

  // A of a word for each k16 step. is_first: of those that `f` is for. What a vote decides comes
  // after what is made without it, so that nobody waits for it: 1.5% at 448 x 64.
  template <int kSteps>
  __device__ static inline void Make(const uint32_t* words, bool is_first, Factors& f,
                                     uint32_t (&to)[kSteps][4]) {
    if constexpr (!kFromBits) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) D::Exact(words[i], to[i]);
    } else {
      FromBits(words, f, to);
      if constexpr (kTells) {
        if (f.scales_last) {
          if (is_first) {
            f.times = Units();
            f.plus = MinusEight();
            FromBits(words, f, to);
          }
          Scale(f.scale, to);
        }
      } else if constexpr (kScale && !kByOneFma) {
        Scale(f.scale, to);
      }
    }
  }

 private:
  __device__ static inline T2 Both(uint16_t low, uint16_t high) {
    return T2(reinterpret_cast<const T&>(low), reinterpret_cast<const T&>(high));
  }

  __device__ static inline T2 LoadRows(uint32_t first) {
    return Both(LoadShared16(first), LoadShared16(first + 16));
  }

  // What makes units of bits, without zeros.
  __device__ static inline T2 Units() { return Both(D::BitsToUnits(0), D::BitsToUnits(1)); }
  __device__ static inline T2 MinusEight() {
    return Both(D::kMinusEightUnits, D::kMinusEightUnits);
  }

  __device__ static inline T2 OfRow(T2 pair, int r) {
    return r == 0 ? T2(pair.x, pair.x) : T2(pair.y, pair.y);
  }

  template <int kSteps>
  __device__ static inline void FromBits(const uint32_t* words, const Factors& f,
                                         uint32_t (&to)[kSteps][4]) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      CodeBits(words[i], to[i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        T2& value = reinterpret_cast<T2&>(to[i][j]);
        value = __hfma2(value, OfRow(f.times, j % 2), OfRow(f.plus, j % 2));
      }
    }
  }

  template <int kSteps>
  __device__ static inline void Scale(T2 scale, uint32_t (&to)[kSteps][4]) {
#pragma unroll
    for (int i = 0; i < 4 * kSteps; ++i) {
      T2& value = reinterpret_cast<T2&>(to[i / 4][i % 4]);
      value = __hmul2(value, OfRow(scale, i % 2));
    }
  }
};

}  // namespace w4a16
