// Packed words, scales, zeros -> w[K, N] = (code - zero) * scale, in float32 and rounded once.
//
// A thread reads 8 lanes of a block (the columns n8 = 0..7 at one t = lane % 4, 128 bytes) and
// unpacks the row half r of them: 16 rows of K, 8 neighbouring columns. A warp covers 4 blocks side
// by side, so every store fills 64 neighbouring columns of 4 rows. Where the output is float32, the
// two threads of a block swap halves first: 16 bytes of each, side by side, fill a sector.
#include <algorithm>

#include "convert.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace w4a16 {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerCta = kThreads / 8;

template <typename S, typename Out>
__global__ void __launch_bounds__(kThreads, 2)
    DequantizeKernel(const uint4* __restrict__ qweight, const S* __restrict__ scales,
                     const S* __restrict__ zeros, int k, int n, int group_size, int blocks_n,
                     int ctas_n, Out* __restrict__ out) {
  const int cta = blockIdx.x;
  const int block_k = cta / ctas_n;
  const int t = threadIdx.x % 32 / 8, r = threadIdx.x % 2;
  const int block_n = cta % ctas_n * kBlocksPerCta + threadIdx.x / 32 * 4 + threadIdx.x % 8 / 2;
  const int n0 = block_n * kBlockN + 8 * r, k0 = block_k * kBlockK;
  if (n0 >= n) return;
  const bool aligned = n % 8 == 0;
  const bool paired = n % 64 == 0;  // the warp's blocks are whole

  const uint4* block =
      qweight + (static_cast<int64_t>(block_k) * blocks_n + block_n) * (kBlockBytes / 16);
  uint32_t words[8][4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint4 v = __ldg(block + 4 * i + t);
    words[i][0] = v.x, words[i][1] = v.y, words[i][2] = v.z, words[i][3] = v.w;
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {  // a group may end at a half block
    if (k0 + 32 * half >= k) return;
    const int64_t row = static_cast<int64_t>((k0 + 32 * half) / group_size) * n + n0;
    const auto scale = Vector8<S>::Load(scales + row, n - n0, aligned);
    float zero[8];
    if (zeros != nullptr) {
      const auto z = Vector8<S>::Load(zeros + row, n - n0, aligned);
#pragma unroll
      for (int i = 0; i < 8; ++i) zero[i] = ToFloat(z.v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) zero[i] = kSymmetricZero;
    }
#pragma unroll
    for (int pair = 0; pair < 8; ++pair) {
      const int step = 2 * half + pair / 4, lo = pair % 2, hi = pair / 2 % 2;
      const int to = k0 + 16 * step + 2 * t + lo + 8 * hi;
      const int shift = 4 * (2 * hi + 4 * lo) + 4 * r;
      Vector8<Out> values;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        // 2^23 + code, whose difference with 2^23 is the code, exactly.
        const float code = __uint_as_float(((words[i][step] >> shift) & 15) | 0x4b000000) - 0x1p23f;
        values.v[i] = FromFloat<Out>(__fmul_rn(code - zero[i], ToFloat(scale.v[i])));
      }
      if constexpr (sizeof(Out) == 4) {
        if (paired) {
          // Afterwards this thread holds quads r and 2 + r of the block's row.
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float got = __shfl_xor_sync(~0u, r == 0 ? values.v[4 + i] : values.v[i], 1);
            if (r == 0) {
              values.v[4 + i] = got;
            } else {
              values.v[i] = got;
            }
          }
          float4* const quads =
              reinterpret_cast<float4*>(out + static_cast<int64_t>(to) * n + block_n * kBlockN);
          const float4* const own = reinterpret_cast<const float4*>(values.v);
          if (to < k) quads[r] = own[0], quads[2 + r] = own[1];
          continue;
        }
      }
      if (to < k) values.Store(out + static_cast<int64_t>(to) * n + n0, n - n0, aligned);
    }
  }
}

}  // namespace

Status DequantizeCuda(const uint32_t* qweight, const void* scales, const void* zeros,
                      DType scale_dtype, int64_t k, int64_t n, int64_t group_size, DType out_dtype,
                      void* out, cudaStream_t stream) {
  const int64_t blocks_n = BlocksN(n), ctas_n = CeilDiv(blocks_n, kBlocksPerCta);
  const int64_t ctas = BlocksK(k) * ctas_n;
  if (ctas == 0) return {};
  return DispatchType(scale_dtype, [&]<typename S>() {
    return DispatchType(out_dtype, [&]<typename Out>() {
      return Launch("dequantize", DequantizeKernel<S, Out>, ctas, kThreads, stream,
                    reinterpret_cast<const uint4*>(qweight), static_cast<const S*>(scales),
                    static_cast<const S*>(zeros), k, n,
                    std::min(group_size, std::max<int64_t>(k, 1)), blocks_n, ctas_n,
                    static_cast<Out*>(out));
    });
  });
}

}  // namespace w4a16
