// Codes of a packed word (layout.h) -> pairs of 16-bit floats, by writing them into the mantissa of
// a magic number. A word yields the four A registers of mma.m16n8k16: a[r + 2 * hi] holds the codes
// of nibbles i = r + 2 * hi (low half) and i + 4 (high half).
//
//   float16   0x6400 | c        = 1024 + c           c in bits 0..3 of a half word
//             0x5400 | c << 4   = 64 + c             c in bits 4..7
//             0x0000 | c        = c * 2^-24          a subnormal, which mma multiplies exactly
//             0x0000 | c << 4   = c * 2^-20
//   bfloat16  0x4300 | c        = 128 + c            7 bits of mantissa: c must be shifted to bit 0
//             0x3f80 | c        = 1 + c / 128
//             0x0000 | c        = c * 2^-133         a subnormal; not for mma: sums would be, too
//             0x0000 | c << 4   = c * 2^-129         its highest bit is the exponent's lowest
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

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

__device__ __forceinline__ uint32_t FmaBf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
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

// Both bit patterns below belong to small integers (or halves of them), so every result is exact.
template <typename T>
struct Dequantizer;

template <>
struct Dequantizer<__half> {
  // a = code - kZero.
  template <int kZero>
  __device__ static __forceinline__ void Exact(uint32_t w, uint32_t (&a)[4]) {
    static_assert(kZero == 0 || kZero == 8);
    constexpr uint32_t kLow = kZero == 0 ? 0xe400e400 : 0xe408e408;   // -(1024 + kZero)
    constexpr uint32_t kHigh = kZero == 0 ? 0xd400d400 : 0xd480d480;  // -(64 + kZero)
    const uint32_t v = w >> 8;
    a[0] = AddF16x2(AndOr(w, 0x000f000f, 0x64006400), kLow);
    a[1] = AddF16x2(AndOr(w, 0x00f000f0, 0x54005400), kHigh);
    a[2] = AddF16x2(AndOr(v, 0x000f000f, 0x64006400), kLow);
    a[3] = AddF16x2(AndOr(v, 0x00f000f0, 0x54005400), kHigh);
  }

  // a = (code + kOffset) / Step(r), in fewer instructions; r = 0, 1 is the row half.
  static constexpr float kOffset = 0.0f;
  __device__ static constexpr float Step(int r) { return r == 0 ? 0x1p24f : 0x1p20f; }
  __device__ static constexpr uint32_t InverseStep(int r) {
    return r == 0 ? 0x00010001 : 0x00100010;
  }
  __device__ static __forceinline__ void Affine(uint32_t w, uint32_t (&a)[4]) { CodeBits(w, a); }

  // Fractional zeros below 2^-5, and such differences, are rounded to multiples of 2^-15.
  static constexpr float kUnit = 0x1p9f;
  static constexpr uint16_t kMinusUnit = 0x9800;        // -1 / kUnit
  static constexpr uint16_t kMinusEightUnits = 0xa400;  // -8 / kUnit
  // From CodeBits of row half r to code / kUnit.
  __device__ static constexpr uint16_t BitsToUnits(int r) { return r == 0 ? 0x7800 : 0x6800; }
};

template <>
struct Dequantizer<__nv_bfloat16> {
  template <int kZero>
  __device__ static __forceinline__ void Exact(uint32_t w, uint32_t (&a)[4]) {
    static_assert(kZero == 0 || kZero == 8);
    constexpr uint32_t kOne = 0x3f803f80;
    constexpr uint32_t kMinus = kZero == 0 ? 0xc300c300 : 0xc308c308;  // -(128 + kZero)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = FmaBf16x2(AndOr(w >> (4 * i), 0x000f000f, 0x43004300), kOne, kMinus);
    }
  }

  static constexpr float kOffset = 128.0f;
  __device__ static constexpr float Step(int) { return 128.0f; }
  __device__ static constexpr uint32_t InverseStep(int) { return 0x3c003c00; }
  __device__ static __forceinline__ void Affine(uint32_t w, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = AndOr(w >> (4 * i), 0x000f000f, 0x3f803f80);
  }

  // Exact for scales below 2^35 and products from 2^-86 on.
  static constexpr float kUnit = 0x1p40f;
  static constexpr uint16_t kMinusUnit = 0xab80;
  static constexpr uint16_t kMinusEightUnits = 0xad00;
  __device__ static constexpr uint16_t BitsToUnits(int r) { return r == 0 ? 0x6e00 : 0x6c00; }
};

}  // namespace w4a16
