// Decode for ragged products: decode.cuh's tiles, each of the rows and the weight of one expert.
//
// The grid is sized for the worst group_sizes; a CTA finds its tile in them, or exits. Only the
// weights of experts that have rows are read. Rows of no expert make tiles without units of K,
// whose sums are zero.
#pragma once

#include "decode.cuh"
#include "expert_map.cuh"
#include "ragged_decode.h"

namespace w4a16 {

template <typename T, int kTileN, int kTileM, int kBlocks, int kTeam, int kStages, bool kZeros,
          int kParts>
__global__ void __launch_bounds__(MaxThreads(kTileN, kTileM, kTeam), 1)
    RaggedDecodeKernel(const __grid_constant__ RaggedDecodeParams params) {
  const ExpertParams& e = params.experts;
  DecodeParams p = params.decode;
  const int rank = blockIdx.x & ((1 << p.log2_split_k) - 1);
  ExpertTile tile;
  if (!FindExpertTile<kTileM>(e, p.m, blockIdx.x >> p.log2_split_k, &tile)) return;
  p.m = tile.end;
  if (tile.expert == e.experts) p.units = 0;
  p.qweight += tile.expert * e.qweight_words;
  p.scales = static_cast<const T*>(p.scales) + tile.expert * e.scale_elements;
  p.zeros = static_cast<const T*>(p.zeros) + tile.expert * e.scale_elements;
  DecodeTile<T, kTileN, kTileM, kBlocks, kTeam, kStages, kZeros, kParts>(
      p, tile.index / tile.tiles_m * kTileN, tile.first + tile.index % tile.tiles_m * kTileM, rank);
}

template <typename T, int kTileN, int kTileM, int kBlocks, int kTeam, int kStages, bool kZeros>
RaggedDecodePointer RaggedKernelForParts(int parts) {
  constexpr int kMost = 2 * kBlocks;
  if (parts == 1) return RaggedDecodeKernel<T, kTileN, kTileM, kBlocks, kTeam, kStages, kZeros, 1>;
  if (parts == kMost)
    return RaggedDecodeKernel<T, kTileN, kTileM, kBlocks, kTeam, kStages, kZeros, kMost>;
  return RaggedDecodeKernel<T, kTileN, kTileM, kBlocks, kTeam, kStages, kZeros, 2>;
}

template <typename T>
RaggedDecodePointer FindRaggedDecode(const Config& c, bool has_zeros, int parts) {
#define W4A16_DECODE(...)
#define W4A16_WGMMA(...)
#define W4A16_PERSISTENT(...)
#define W4A16_CUTLASS(...)
#define W4A16_RAGGED_DECODE(N, M, BLOCKS, WARPS, TEAM, STAGES, SPLIT, ...)                     \
  static_assert(WARPS * 32 <= MaxThreads(N, M, TEAM) && WARPS % TEAM == 0 && SPLIT * 4 <= N && \
                (SPLIT & (SPLIT - 1)) == 0);                                                   \
  if (c.tile_n == N && c.tile_m == M && c.blocks == BLOCKS && c.team == TEAM &&                \
      c.stages == STAGES)                                                                      \
    return has_zeros ? RaggedKernelForParts<T, N, M, BLOCKS, TEAM, STAGES, true>(parts)        \
                     : RaggedKernelForParts<T, N, M, BLOCKS, TEAM, STAGES, false>(parts);
#include "../configs.inc"
#undef W4A16_DECODE
#undef W4A16_WGMMA
#undef W4A16_PERSISTENT
#undef W4A16_CUTLASS
  return nullptr;
}

}  // namespace w4a16
