// Codes uint8[K, N] -> packed words.
//
// A thread makes 64 bytes of a block: 4 columns and their partners 8 further, the 16 rows of one
// t = lane % 4 (layout.h). A warp covers 4 blocks side by side (t fastest), so that it reads 64
// neighbouring bytes of each of 4 rows at a time and writes whole sectors.
#include "convert.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace w4a16 {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerCta = kThreads / 8;

__global__ void __launch_bounds__(kThreads)
    PackKernel(const uint8_t* __restrict__ codes, int k, int n, uint4* __restrict__ qweight,
               int blocks_n, int ctas_n) {
  const int cta = blockIdx.x;
  const int block_k = cta / ctas_n;
  const int block_n = cta % ctas_n * kBlocksPerCta + threadIdx.x / 8;
  if (block_n >= blocks_n) return;
  const int t = threadIdx.x % 4, quad = threadIdx.x / 4 % 2;
  const int k0 = block_k * kBlockK, n0 = block_n * kBlockN + 4 * quad;

  const auto load = [&](int n8, int row) -> uint32_t {
    const int first = n0 + 8 * n8;
    if (k0 + row >= k) return 0;
    const uint8_t* src = codes + static_cast<int64_t>(k0 + row) * n + first;
    if (n % 4 == 0) return first < n ? __ldg(reinterpret_cast<const uint32_t*>(src)) : 0;
    uint32_t v = 0;
    for (int i = 0; i < 4; ++i) {
      if (first + i < n) v |= static_cast<uint32_t>(src[i]) << (8 * i);
    }
    return v;
  };
  uint4 columns[4];
  PackColumns(t, load, columns);
  uint4* out = qweight + (static_cast<int64_t>(block_k) * blocks_n + block_n) * (kBlockBytes / 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) out[4 * (4 * quad + i) + t] = columns[i];
}

}  // namespace

Status PackCuda(const uint8_t* codes, int64_t k, int64_t n, uint32_t* qweight,
                cudaStream_t stream) {
  const int64_t blocks_n = BlocksN(n), ctas_n = CeilDiv(blocks_n, kBlocksPerCta);
  const int64_t ctas = BlocksK(k) * ctas_n;
  if (ctas == 0) return {};
  return Launch("pack", PackKernel, ctas, kThreads, stream, codes, k, n,
                reinterpret_cast<uint4*>(qweight), blocks_n, ctas_n);
}

}  // namespace w4a16
