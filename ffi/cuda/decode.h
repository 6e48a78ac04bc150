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
  int blocks_n;
  int units;  // of K, each of a stage
  int tiles_m;
  int log2_split_k;
  uint32_t group_multiplier;  // k / group_size == (k * group_multiplier) >> (32 + group_shift)
  int group_shift;
  int64_t scale_step_bytes;  // from a warp's unit to its next, if a unit is one part
  // Shared memory:
  int x_rows;  // rows of x that are copied: min(M, tile_m)
  int head_bytes;
  int stage_bytes;
  int warp_bytes;  // one warp's ring of stages, later its partial tile
  bool x_tensor;   // x comes by tensor copies
  bool x_aligned;  // rows of x begin at multiples of 16 bytes
  bool n_aligned;  // rows of scales and zeros begin at multiples of 16 bytes
  bool out_float32;
  float alpha;
  // Epilogues:
  int num_squares;  // 0: no factor
  float epsilon, inverse_k;
  const void* residual;
  const void* norm_scale;
  void* scaled;
  float* squares;
};

// Of a CTA on Turing, at most, warps and outputs of a tile: for want of asynchronous copies its
// registers hold what is on the way.
inline constexpr int kTuringWarps = 8, kTuringOutputs = 1024;

// So few rows of x come sooner by copies of all lanes than by tensor copies (measured: up to 2%);
// tiles of more than 8 tokens have tensor copies all the same.
inline constexpr int kFewRows = 4;

// The rows of x in a stage: for every block of K tile_m rows of 128 bytes. The 16-byte chunk c of
// row r lies at c ^ (r % 8), the 128-byte swizzle of tensor copies, so that ldmatrix finds the rows
// of 8 tokens in different banks.
W4A16_HD constexpr int XBytes(int tile_m, int blocks) { return blocks * tile_m * kBlockK * 2; }

// Whether rows of x, scales or zeros are not aligned to 16 bytes, which needs slower copies: decode
// has kernels for it, ragged decode those of the most parts.
constexpr bool IsGeneral(const Problem& p) { return p.k % 8 != 0 || p.n % 8 != 0; }

// Equal parts of a stage, each in one group: as few as the group size allows, and the most where
// IsGeneral. It is one only if a warp's units are equally many groups apart, so that only kernels
// of more have to find the group of every unit.
constexpr int StageParts(const Problem& p, const Config& c) {
  const int unit = kBlockK * c.blocks, most = 2 * c.blocks;
  if (IsGeneral(p)) return most;
  if (p.group_size >= p.k) return 1;
  if (p.group_size % unit == 0 && unit * c.warps % p.group_size == 0) return 1;
  int parts = 2;
  while (p.group_size % (unit / parts) != 0) parts *= 2;
  return parts;
}

// Floats between two tokens of a warp's partial tile: with 4 added, the 8 x 4 accumulators that a
// warp stores at a time lie in different banks.
W4A16_HD constexpr int PartialStride(int tile_n) { return tile_n + 4; }

// Of a token's outputs, in quads of 4 columns, how many at most a CTA of the cluster sums: whole
// blocks of 16 columns, which epilogues want together.
W4A16_HD constexpr int QuadsShare(int tile_n, int split_k) {
  return (tile_n / kBlockN + split_k - 1) / split_k * (kBlockN / 4);
}

// Shared memory of a CTA:
//   head | warps x ring
//   head = factors of rows (W4A16_SWIGLU) | barrier | sums received from the cluster (both for
//          split_k > 1)
//   ring = stages x (weights | x | scales | zeros | barrier); later the partial tile
struct DecodeSharedMemory {
  int stage_bytes, warp_bytes, total_bytes;
};

inline constexpr int kBarrierBytes = 16;
inline constexpr int kFactorBytes = 64;

// The last of a stage: the mbarrier that counts the bytes of x.
inline constexpr int kStageBarrierBytes = 8;

// Stages, and all that lies between, begin at multiples of 1,024 bytes for tensor copies, whose
// swizzle repeats after as many; for others at multiples of 128.
W4A16_HD constexpr int Align1024(int bytes) { return (bytes + 1023) / 1024 * 1024; }
W4A16_HD constexpr int Align128(int bytes) { return (bytes + 127) / 128 * 128; }

// What lies before the rings; kept a multiple of what rings begin at.
constexpr int HeadBytes(const Problem& p, const Config& c) {
  const int factors = p.epilogue == W4A16_SWIGLU ? kFactorBytes : 0;
  const int sums = c.split_k * c.tile_m * QuadsShare(c.tile_n, c.split_k) * 16;
  return Align1024(factors + (c.split_k == 1 ? 0 : kBarrierBytes + sums));
}

// What a stage holds, but for its barrier.
constexpr int StageOperandBytes(const Problem& p, const Config& c) {
  const int scale_rows = StageParts(p, c) * (p.has_zeros ? 2 : 1);
  return c.blocks * c.tile_n / kBlockN * kBlockBytes + XBytes(c.tile_m, c.blocks) +
         scale_rows * c.tile_n * 2;
}

constexpr DecodeSharedMemory SharedMemoryOfDecode(const Problem& p, const Config& c) {
  const int stage = Align1024(StageOperandBytes(p, c) + kStageBarrierBytes);
  const int ring = c.stages * stage;
  const int partial = Align1024(c.tile_m * PartialStride(c.tile_n) * 4);
  const int warp = ring > partial ? ring : partial;
  return {stage, warp, HeadBytes(p, c) + c.warps * warp};
}

// The kernel compiled for a configuration and an element type (decode_f16.cu, decode_bf16.cu), and
// likewise with epilogues (decode_fused_f16.cu, decode_fused_bf16.cu).
const void* FindDecodeKernelF16(const Config& config, bool has_zeros, int parts, bool general);
const void* FindDecodeKernelBf16(const Config& config, bool has_zeros, int parts, bool general);
const void* FindFusedDecodeKernelF16(const Config& config, bool has_zeros, int parts,
                                     w4a16_epilogue epilogue);
const void* FindFusedDecodeKernelBf16(const Config& config, bool has_zeros, int parts,
                                      w4a16_epilogue epilogue);

}  // namespace w4a16
