// wgmma for ragged products: gemm_wgmma.cuh's tiles, each of the rows and the weight of one expert.
//
// The grid is sized for the worst group_sizes; a CTA finds its tile in them, or exits. A box of x
// has as many quarters of kTileM rows as the tile needs: x comes from L2, whose bandwidth is what
// limits tiles of few tokens. What is left of the rows in shared memory, and what the box brings of
// the next expert's, makes sums that are not stored. Rows of no expert make tiles without blocks of
// K, whose sums are zero.
#pragma once

#include "expert_map.cuh"
#include "gemm_wgmma.cuh"

namespace w4a16 {

inline constexpr int kQuarters = 4;

// Boxes of 1 to 4 quarters of kTileM rows.
struct RaggedMaps {
  CUtensorMap x[kQuarters];
};

// What the host needs to launch an instantiation.
struct RaggedWgmmaKernel {
  void (*kernel)(RaggedMaps, WgmmaParams, ExpertParams);
  int threads;
  int shared_bytes;
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kCtasPerSm)
    RaggedWgmma(const __grid_constant__ RaggedMaps maps, const __grid_constant__ WgmmaParams params,
                const __grid_constant__ ExpertParams e) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  WgmmaParams p = params;
  ExpertTile tile;
  if (!FindExpertTile<Shape::kTileM>(e, p.m, blockIdx.x / Shape::kSplitK, &tile)) return;
  p.m = tile.end;
  if (tile.expert == e.experts) p.k = 0;
  p.tiles_m = tile.tiles_m;
  p.qweight += tile.expert * e.qweight_words;
  p.scales = static_cast<const T*>(p.scales) + tile.expert * e.scale_elements;
  p.zeros = static_cast<const T*>(p.zeros) + tile.expert * e.scale_elements;
  const int m0 = tile.first + tile.index % tile.tiles_m * Shape::kTileM;
  constexpr int kQuarter = Shape::kTileM / kQuarters;
  const int more = min(tile.end - m0 - 1, Shape::kTileM - 1) / kQuarter;
  p.x_rows = (more + 1) * kQuarter;
  GemmTile<T, Shape>(maps.x[more], p, tile.index / tile.tiles_m * Shape::kTileN, m0);
#else
  __trap();
#endif
}

template <typename T, bool kHasZeros, bool kFolds>
RaggedWgmmaKernel FindRaggedWgmma(const Config& config) {
#define W4A16_DECODE(...)
#define W4A16_PERSISTENT(...)
#define W4A16_CUTLASS(...)
#define W4A16_WGMMA(...)
#define W4A16_RAGGED_WGMMA(N, M, STAGES, SPLIT, ...)                                    \
  if constexpr (M <= kMostFoldedTokens || !kFolds) {                                    \
    if (config.tile_n == N && config.tile_m == M && config.stages == STAGES &&          \
        config.split_k == SPLIT) {                                                      \
      using Shape = typename ShapeOfLine<kHasZeros, kFolds, N, M, STAGES, SPLIT>::Type; \
      return {RaggedWgmma<T, Shape>, Shape::kThreads, Shape::kSharedBytes};             \
    }                                                                                   \
  }
#include "configs.inc"
#undef W4A16_DECODE
#undef W4A16_PERSISTENT
#undef W4A16_CUTLASS
#undef W4A16_WGMMA
  return {};
}

template <typename T>
RaggedWgmmaKernel FindRaggedWgmma(const Config& config, bool has_zeros, bool folds) {
  if (folds)
    return has_zeros ? FindRaggedWgmma<T, true, true>(config)
                     : FindRaggedWgmma<T, false, true>(config);
  return has_zeros ? FindRaggedWgmma<T, true, false>(config)
                   : FindRaggedWgmma<T, false, false>(config);
}

RaggedWgmmaKernel FindRaggedWgmmaF16(const Config& config, bool has_zeros, bool folds);
RaggedWgmmaKernel FindRaggedWgmmaBf16(const Config& config, bool has_zeros, bool folds);

}  // namespace w4a16
