// wgmma for ragged products: gemm_wgmma.cuh's tiles, each of the rows and the weight of one expert.
//
// The grid is sized for the worst group_sizes; a CTA finds its tile in them, or exits. A box of x
// may bring the next expert's rows along; their sums are not stored. Rows of no expert make tiles
// without blocks of K, whose sums are zero.
#pragma once

#include "expert_map.cuh"
#include "gemm_wgmma.cuh"

namespace w4a16 {

// What the host needs to launch an instantiation.
struct RaggedWgmmaKernel {
  void (*kernel)(WgmmaMaps, WgmmaParams, ExpertParams);
  int blocks;  // of 64 codes to a stage
  int threads;
  int shared_bytes;
};

template <typename T, typename Shape>
__global__ void __cluster_dims__(Shape::kSplitK, 1, 1) __launch_bounds__(Shape::kThreads,
                                                                         Shape::kCtasPerSm)
    RaggedWgmma(const __grid_constant__ WgmmaMaps maps, const __grid_constant__ WgmmaParams params,
                const __grid_constant__ ExpertParams e) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  WgmmaParams p = params;
  ExpertTile tile;
  if (!FindExpertTile<Shape::kTileM>(e, p.m, blockIdx.x / Shape::kSplitK, &tile)) return;
  p.m = tile.end;
  if (tile.expert == e.experts) p.k = 0;
  p.weight_policy = WeightPolicy(tile.tiles_m);
  GemmTile<T, Shape>(maps, p, tile.expert, [&](int* n0, int* m0) {
    *n0 = tile.index / tile.tiles_m * Shape::kTileN;
    *m0 = tile.first + tile.index % tile.tiles_m * Shape::kTileM;
  });
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
#define W4A16_RAGGED_WGMMA(N, M, STAGES, SPLIT, ...)                                        \
  if constexpr (kFolds ? M <= MostFoldedTokens(std::is_same_v<T, __half>, kHasZeros, 1)     \
                       : !AlwaysFolds(M)) {                                                 \
    if (config.tile_n == N && config.tile_m == M && config.stages == STAGES &&              \
        config.split_k == SPLIT) {                                                          \
      using Shape = typename ShapeOfLine<kHasZeros, kFolds, N, M, STAGES, SPLIT, 1>::Type;  \
      return {RaggedWgmma<T, Shape>, Shape::kBlocks, Shape::kThreads, Shape::kSharedBytes}; \
    }                                                                                       \
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
