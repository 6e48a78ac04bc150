// The persistent kernel for ragged products: gemm_persistent.cuh's whole tiles, each of the rows
// and the weight of one expert.
//
// Tiles are counted over experts, then along N, then along the expert's rows. A CTA finds each of
// its tiles in a table that it makes of group_sizes at its start. A box of x may bring the next
// expert's rows along; their sums are not stored.
//
// Preconditions beyond gemm_persistent.cuh's: at most kMostPersistentExperts experts
// (CanImplementRagged), tiles times CTAs below 2^31 (RunRaggedPersistent), clusters of one CTA.
#pragma once

#include "expert_map.cuh"
#include "gemm_persistent.cuh"

namespace w4a16 {

// What the host needs to launch an instantiation.
struct RaggedPersistentKernel {
  void (*kernel)(PersistentMaps, PersistentParams, ExpertParams);
  int threads;
  int shared_bytes;
};

// Experts take registers: where three warpgroups share five blocks of rows, none are left to tell
// large scales (WeightMaker).
template <typename Shape>
struct RaggedShape : Shape {
  static constexpr bool kTellsScales = Shape::kWarpgroups == 2 || Shape::kMostRows == 1;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct RaggedUnits {
  static constexpr bool kRagged = true;
  const ExpertParams& e;
  const ExpertEnd* table;
  int tiles;

  __device__ inline int Count(const PersistentParams&) const { return tiles; }

  template <typename Shape>
  __device__ inline Unit Of(const PersistentParams&, int index, int) const {
    int expert = 0;  // the first whose tiles end beyond `index`
    for (int length = e.experts; length > 0;) {
      const int half = length / 2;
      if (table[expert + half].tiles * e.tiles_n <= static_cast<uint32_t>(index)) {
        expert += half + 1;
        length -= half + 1;
      } else {
        length = half;
      }
    }
    const ExpertEnd before = expert > 0 ? table[expert - 1] : ExpertEnd{0, 0};
    const ExpertEnd own = table[expert];
    const int tiles_m = own.tiles - before.tiles, inside = index - before.tiles * e.tiles_n;
    return {.n0 = inside / tiles_m * Shape::kTileN,
            .m0 = static_cast<int>(before.rows) + inside % tiles_m * Shape::kTileM,
            .tokens = Shape::kTileM,
            .rows = Shape::kTileN,
            .end = static_cast<int>(own.rows),
            .expert = expert};
  }
  __device__ inline int64_t QweightWords(const Unit& unit) const {
    return unit.expert * e.qweight_words;
  }
  __device__ inline int64_t ScaleElements(const Unit& unit) const {
    return unit.expert * e.scale_elements;
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    RaggedPersistent(const __grid_constant__ PersistentMaps maps,
                     const __grid_constant__ PersistentParams p,
                     const __grid_constant__ ExpertParams e) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char storage[];
  const uint32_t shared = ptx::SharedAddress(storage);
  ExpertEnd* const table = reinterpret_cast<ExpertEnd*>(storage + Shape::kSharedBytes);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  if (threadIdx.x == Shape::kConsumers) InitBarriers<Shape>(maps, shared);
  if (warp == 0) MakeExpertTable<Shape::kTileM>(e, p.m, table);
  __syncthreads();
  const ExpertEnd all = e.experts > 0 ? table[e.experts - 1] : ExpertEnd{0, 0};
  ClearRows(p.out, all.rows, p.m, int64_t{p.n} * (p.out_is_f32 ? 4 : 2));
  RunUnits<T, Shape>(maps, p, RaggedUnits{e, table, static_cast<int>(all.tiles * e.tiles_n)},
                     shared, warp);
#else
  __trap();
#endif
}

template <typename T>
RaggedPersistentKernel FindRaggedPersistent(const Config& config, bool has_zeros) {
#define W4A16_DECODE(...)
#define W4A16_WGMMA(...)
#define W4A16_CUTLASS(...)
#define W4A16_PERSISTENT(...)
#define W4A16_RAGGED_PERSISTENT(N, M, STAGES, ...)                                          \
  if (config.tile_n == N && config.tile_m == M && config.stages == STAGES) {                \
    using Plain = RaggedShape<PersistentShape<false, N, M, STAGES, 1>>;                     \
    using Zeros = RaggedShape<PersistentShape<true, N, M, STAGES, 1>>;                      \
    static_assert(Zeros::kSharedBytes + kPersistentTableBytes <= Zeros::kSharedPerCta);     \
    return has_zeros ? RaggedPersistentKernel{RaggedPersistent<T, Zeros>, Zeros::kThreads,  \
                                              Zeros::kSharedBytes + kPersistentTableBytes}  \
                     : RaggedPersistentKernel{RaggedPersistent<T, Plain>, Plain::kThreads,  \
                                              Plain::kSharedBytes + kPersistentTableBytes}; \
  }
#include "configs.inc"
#undef W4A16_DECODE
#undef W4A16_WGMMA
#undef W4A16_CUTLASS
#undef W4A16_PERSISTENT
  return {};
}

RaggedPersistentKernel FindRaggedPersistentF16(const Config& config, bool has_zeros);
RaggedPersistentKernel FindRaggedPersistentBf16(const Config& config, bool has_zeros);

}  // namespace w4a16
