// What the launcher of wgmma tiles (gemm_wgmma.cuh) shares with their kernels and with config.cc:
// where they fold, that is, scale sums instead of weights, and how scales come.
#pragma once

#include "config.h"

namespace w4a16 {

// Tiles of up to so many tokens scale sums, not weights: more sums take more instructions than
// weights do. Without zeros weights take few (WeightMaker): at M = 32 (eight sizes, H200) bfloat16
// takes 4% less time than with scaled sums, float16 1 to 2% less where there are teams, and else
// as much more.
constexpr int MostFoldedTokens(bool is_f16, bool has_zeros, int teams) {
  return has_zeros ? 48 : is_f16 && teams == 1 ? 32 : 16;
}

// Those of 16 tokens do nothing else: decode is faster at scaling weights (15.4 us, not 17.8, at
// 8192 x 8192 in groups of 32).
constexpr bool AlwaysFolds(int tile_m) { return tile_m <= 16; }

// Sums are scaled where the line has it compiled in, groups are made of whole blocks, and results
// need not be the same for every tile, to the bit.
inline bool FoldsScales(const Config& config, const Problem& p) {
  return config.tile_m <= MostFoldedTokens(p.x_dtype == W4A16_F16, p.has_zeros, config.teams) &&
         !p.batch_invariant && (NumGroups(p) == 1 || p.group_size % kBlockK == 0);
}

// Whether the CTAs of a cluster share the rows of a tile instead of K (gemm_wgmma.cuh, "Dealing"),
// and how many of them a CTA works at.
constexpr bool DealsRows(int tile_n, int split_k) { return tile_n > 256 && split_k == 2; }
constexpr int RowsOfCta(int tile_n, int split_k) {
  return DealsRows(tile_n, split_k) ? (tile_n + 64) / 2 : tile_n;
}

// Whether tensor copies can bring rows of scales: a box has at most 256 columns. They are preferred
// to bulk copies, of which a thread starts one in some 50 ns: 4096 x 14336 at M = 64 (H200) 18.5 ->
// 17.3 us in groups of 128, 28.5 -> 17.4 in groups of 32.
constexpr bool HasScaleBoxes(int rows) { return rows <= 256; }

}  // namespace w4a16
