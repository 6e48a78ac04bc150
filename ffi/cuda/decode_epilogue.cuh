// What becomes of decode's sums before they are stored: w4a16.h says what each epilogue is. Kernels
// with different ones are different kernels: code that is jumped over costs a product without an
// epilogue 1%.
#pragma once

#include "decode_stage.cuh"

namespace w4a16 {

// What a thread finishes: 4 neighbouring columns of one token; with W4A16_SWIGLU 4 of gate, and the
// 4 of up that lie 8 columns beyond. Without that, 4 neighbouring lanes have the quads of a block
// of 16 columns.
struct Quad {
  int exists;      // in the tile and its rows
  int n;           // the first column
  uint32_t terms;  // the first of its terms, in shared memory
  int64_t out;     // element of out
};

// Items of a token in a tile, and the quad of item `i`.
template <w4a16_epilogue kEpilogue>
__device__ constexpr int ItemsOf(int quads) {
  return kEpilogue == W4A16_SWIGLU ? quads / 2 : quads;
}
template <w4a16_epilogue kEpilogue>
__device__ constexpr int QuadOf(int i) {
  return kEpilogue == W4A16_SWIGLU ? i / 2 * 4 + i % 2 : i;
}

// Where column n of row `row` of the product goes.
template <w4a16_epilogue kEpilogue>
__device__ __forceinline__ int64_t OutOf(const DecodeParams& p, int64_t row, int n) {
  return kEpilogue == W4A16_SWIGLU ? row * (p.n / 2) + n / kBlockN * (kBlockN / 2) + n % kBlockN
                                   : row * p.n + n;
}

// Early: what would take long to come. norm_scale, for which nothing has asked since the last step,
// to L2; sums of squares to L1 (copied to shared memory they cost 0.5 us of 17 at one row of 28672
// x 4096, and 16 rows of them a CTA of an SM).
template <typename T, w4a16_epilogue kEpilogue, int kTileN>
__device__ __forceinline__ void PrepareEpilogue(const DecodeParams& p, int n0, int m0, int rows) {
  if constexpr (kEpilogue == W4A16_ADD_NORM) {
    const int n = n0 + kBlockN * threadIdx.x;
    if (threadIdx.x < kTileN / kBlockN && n < p.n)
      PrefetchL2(static_cast<const T*>(p.norm_scale) + n);
  } else if constexpr (kEpilogue == W4A16_SWIGLU) {
    constexpr int kLine = 32;  // floats
    const float* squares = p.squares + int64_t{m0} * p.num_squares;
#pragma unroll 1
    for (int64_t i = kLine * threadIdx.x; i < int64_t{rows} * p.num_squares;
         i += kLine * blockDim.x)
      PrefetchL1(squares + i);
  }
}

// Late, while the warps meet: the factors of W4A16_SWIGLU's rows, 1 / rms. As few instructions as
// may be, because they come from memory: a row has kLanes lanes of a warp.
__device__ __forceinline__ void FindFactors(const DecodeParams& p, uint32_t factors, int m0,
                                            int rows) {
  constexpr int kLanes = 16;
  const int quads = p.num_squares / 4, lane = threadIdx.x % kLanes;
#pragma unroll 1
  for (int token = threadIdx.x / kLanes; token / (32 / kLanes) * (32 / kLanes) < rows;
       token += blockDim.x / kLanes) {
    const float4* squares =
        reinterpret_cast<const float4*>(p.squares) + int64_t{m0 + min(token, rows - 1)} * quads;
    float sum = 0;
#pragma unroll 4
    for (int i = lane; i < quads; i += kLanes) {
      const float4 v = squares[i];
      sum += (v.x + v.y) + (v.z + v.w);
    }
#pragma unroll
    for (int i = kLanes / 2; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffff, sum, i);
    if (lane == 0 && token < rows)
      StoreShared(factors + 4 * token,
                  p.num_squares > 0 ? rsqrtf(sum * p.inverse_k + p.epsilon) : 1.0f);
  }
}

// 4 neighbours of bias, or of residual and norm_scale, as they are stored.
struct Addends {
  uint2 bias, norm_scale;
};

// `kWhole`: a quad that exists is all below N, a multiple of 4.
template <typename T, w4a16_epilogue kEpilogue, bool kWhole>
__device__ __forceinline__ Addends LoadAddends(const DecodeParams& p, const Quad& quad) {
  const auto load = [](const void* from, int64_t at) {
    return *reinterpret_cast<const uint2*>(static_cast<const T*>(from) + at);
  };
  if constexpr (kEpilogue == W4A16_SWIGLU)
    return {};
  else if constexpr (kEpilogue == W4A16_ADD_NORM)
    return {.bias = load(p.residual, quad.out), .norm_scale = load(p.norm_scale, quad.n)};
  else
    return {.bias = LoadBias<T>(p, quad.n, kWhole), .norm_scale = {}};
}

// Stores what the epilogue makes of a quad, the sum of `count` terms that are `stride` bytes apart,
// from affine codes or not; `factor`: the row's, in shared memory.
template <typename T, w4a16_epilogue kEpilogue, bool kWhole, bool kAffine>
__device__ __forceinline__ void Finish(const DecodeParams& p, const Quad& quad, int stride,
                                       int count, const Addends& addends, uint32_t factor) {
  float4 sums[kEpilogue == W4A16_SWIGLU ? 2 : 1];
  SumQuads(quad.terms, stride, count, sums);
  if constexpr (kEpilogue == W4A16_NO_EPILOGUE) {
    StoreOut<T>(p, quad.out, quad.n, p.alpha * StepOf<T, kAffine>(quad.n), sums[0], addends.bias,
                kWhole);
  } else if constexpr (kEpilogue == W4A16_SWIGLU) {
    const float alpha = p.alpha * LoadShared(factor);
    const float of_gate = alpha * StepOf<T, kAffine>(0), of_up = alpha * StepOf<T, kAffine>(8);
    const float4 &gate = sums[0], &up = sums[1];
    const float g[4] = {gate.x, gate.y, gate.z, gate.w}, u[4] = {up.x, up.y, up.z, up.w};
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scaled = of_gate * g[i];
      v[i] = __fdividef(scaled, 1 + __expf(-scaled)) * (of_up * u[i]);
    }
    StoreQuad(static_cast<T*>(p.out) + quad.out, v, 4, true);
  } else {
    const float alpha = p.alpha * StepOf<T, kAffine>(quad.n);
    const float4& sum = sums[0];
    float v[4] = {sum.x, sum.y, sum.z, sum.w}, scaled[4], square = 0;
    const T *residual = reinterpret_cast<const T*>(&addends.bias),
            *norm_scale = reinterpret_cast<const T*>(&addends.norm_scale);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = ToFloat(FromFloat<T>(fmaf(alpha, v[i], ToFloat(residual[i]))));
      scaled[i] = v[i] * ToFloat(norm_scale[i]);
      square = fmaf(v[i], v[i], square);
    }
    StoreQuad(static_cast<T*>(p.out) + quad.out, v, 4, true);
    StoreQuad(static_cast<T*>(p.scaled) + quad.out, scaled, 4, true);
    const uint32_t block = 0xfu << (threadIdx.x & 28);  // whose lanes are here together
    square += __shfl_xor_sync(block, square, 1);
    square += __shfl_xor_sync(block, square, 2);
    if (quad.n % kBlockN == 0) p.squares[quad.out / kBlockN] = square;
  }
}

}  // namespace w4a16
