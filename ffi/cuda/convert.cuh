// Element types on the device: conversion to and from float, vectors of 8, dispatch on DType.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../problem.h"

namespace w4a16 {

__device__ __forceinline__ float ToFloat(float v) { return v; }
__device__ __forceinline__ float ToFloat(__half v) { return __half2float(v); }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 v) { return __bfloat162float(v); }

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T FromFloat(float v);
template <>
__device__ __forceinline__ float FromFloat<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half FromFloat<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 FromFloat<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// 8 neighbours of a row, of which `count` exist; the others read as 0 and are not written.
// `aligned`: rows begin at multiples of 16 bytes (their length is a multiple of 8).
template <typename T>
struct alignas(16) Vector8 {
  T v[8];

  __device__ __forceinline__ static Vector8 Load(const T* p, int64_t count, bool aligned) {
    Vector8 out;
    if (aligned && count >= 8) {
      const uint4* src = reinterpret_cast<const uint4*>(p);
      uint4* dst = reinterpret_cast<uint4*>(out.v);
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) dst[i] = src[i];
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) out.v[i] = i < count ? p[i] : FromFloat<T>(0.0f);
    }
    return out;
  }

  __device__ __forceinline__ void Store(T* p, int64_t count, bool aligned) const {
    if (aligned && count >= 8) {
      const uint4* src = reinterpret_cast<const uint4*>(v);
      uint4* dst = reinterpret_cast<uint4*>(p);
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) dst[i] = src[i];
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < count) p[i] = v[i];
      }
    }
  }
};

// body.template operator()<T>() with the element type that `dtype` names.
template <typename Body>
auto DispatchType(DType dtype, Body&& body) {
  switch (dtype) {
    case W4A16_F16:
      return body.template operator()<__half>();
    case W4A16_BF16:
      return body.template operator()<__nv_bfloat16>();
    default:
      return body.template operator()<float>();
  }
}

// Rows become columns in a 4 x 4 matrix of bytes (v[i] holds row i, column 0 in its low byte).
__device__ __forceinline__ void TransposeBytes(uint32_t (&v)[4]) {
  const uint32_t a = __byte_perm(v[0], v[1], 0x5140), b = __byte_perm(v[2], v[3], 0x5140);
  const uint32_t c = __byte_perm(v[0], v[1], 0x7362), d = __byte_perm(v[2], v[3], 0x7362);
  v[0] = __byte_perm(a, b, 0x5410);
  v[1] = __byte_perm(a, b, 0x7632);
  v[2] = __byte_perm(c, d, 0x5410);
  v[3] = __byte_perm(c, d, 0x7632);
}

// The packed words of 4 neighbouring columns of a block, 16 bytes for each: the lanes
// 4 * (column % 8) + t of layout.h. load(n8, k) returns the codes of row k of the block, a byte
// for each of the 4 columns from n8 (0) or from their partners 8 further (1).
template <typename LoadCodes>
__device__ __forceinline__ void PackColumns(int t, LoadCodes&& load, uint4 (&columns)[4]) {
  uint32_t words[4][4];  // [step][column]
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) {  // nibbles 2 * byte and 2 * byte + 1
      const int k = 16 * step + 2 * t + (byte >> 1) + 8 * (byte & 1);
      words[step][byte] = (load(0, k) & 0x0f0f0f0f) | ((load(1, k) << 4) & 0xf0f0f0f0);
    }
    TransposeBytes(words[step]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    columns[i] = make_uint4(words[0][i], words[1][i], words[2][i], words[3][i]);
}

}  // namespace w4a16
