// What decode.cu (host) and decode.cuh (kernel) share: parameters, shared memory, the table of
// kernels. Free of CUDA headers, because config.cc asks it for the shared memory of a config.
#pragma once

#include "../config.h"

namespace w4a16 {

struct DecodeParams {
  const void* x;
  const uint32_t* qweight;
  const void* scales;
  const void* zeros;
  const void* bias;  // nullptr: none
  void* out;
  int m, n, k;
  int group_size;  // above K where a scale serves its whole column
  int num_groups;
  int blocks_n, blocks_k;
  int tiles_m;
  int split_k;
  int x_rows;       // rows of x that a stage holds: min(M, tile_m)
  int stage_bytes;  // one warp's stage
  int warp_bytes;   // one warp's ring of stages, later its partial tile
  bool x_aligned;   // rows of x begin at multiples of 16 bytes
  bool n_aligned;   // rows of scales and zeros begin at multiples of 16 bytes
  bool out_float32;
  float alpha;
};

using DecodeKernelPointer = void (*)(DecodeParams);

// True if a block of 64 codes of K may lie in two groups.
constexpr bool GroupsSplitBlocks(const Problem& p) {
  return p.group_size < p.k && p.group_size % kBlockK != 0;
}

// Floats between two tokens of a warp's partial tile: with 4 added, the 8 x 4 accumulators that a
// warp stores at a time lie in different banks.
W4A16_HD constexpr int PartialStride(int tile_n) { return tile_n + 4; }

// Shared memory of a CTA:
//   sums received from the cluster (split_k > 1) | warps x ring
//   ring = stages x (weights | x rows | scales | zeros) | 16 zero bytes; later the partial tile
struct DecodeSharedMemory {
  int stage_bytes, warp_bytes, total_bytes;
};

inline constexpr int kZeroBytes = 16;  // stand for the tokens that do not exist
inline constexpr int kXRowBytes = 2 * kBlockK;

W4A16_HD constexpr int ReceivedBytes(int tile_n, int tile_m, int split_k) {
  return split_k == 1 ? 0 : 4 * tile_n * tile_m + 16 * split_k;
}

constexpr DecodeSharedMemory SharedMemoryOfDecode(const Problem& p, const Config& c) {
  const int x_rows = p.m < c.tile_m ? static_cast<int>(p.m) : c.tile_m;
  const int scale_rows = (GroupsSplitBlocks(p) ? 2 : 1) * (p.has_zeros ? 2 : 1);
  const int stage =
      c.tile_n / kBlockN * kBlockBytes + x_rows * kXRowBytes + scale_rows * c.tile_n * 2;
  const int ring = c.stages * stage + kZeroBytes;
  const int partial = c.tile_m * PartialStride(c.tile_n) * 4;
  const int warp = ring > partial ? ring : partial;
  return {stage, warp, ReceivedBytes(c.tile_n, c.tile_m, c.split_k) + c.warps * warp};
}

// The kernel compiled for a configuration and an element type (decode_f16.cu, decode_bf16.cu).
DecodeKernelPointer FindDecodeKernelF16(const Config& config, bool has_zeros, bool split_blocks);
DecodeKernelPointer FindDecodeKernelBf16(const Config& config, bool has_zeros, bool split_blocks);

}  // namespace w4a16
