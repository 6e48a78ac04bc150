// Decode for ragged products: decode_stage.cuh's products and sums, in persistent CTAs.
//
// Tiles are those of each expert's rows, counted over experts, then along N, then along the rows. A
// CTA takes every gridDim.x-th of them, and finds each in a table of where the experts' rows and
// tiles end, which it makes of group_sizes at its start. Nothing else depends on the sizes, and
// only the weights of experts that have rows are read.
//
//   tile      |       0       |       3       |       6       |    of CTA 0 of 3, with 6 units of K
//   unit      | 0 1 2 3 4 5   | 0 1 2 3 4 5   | 0 1 2 3 4 5   |
//   warp of 4 | 0 1 2 3 0 1   | 2 3 0 1 2 3   | 0 1 2 3 0 1   |    every 4th unit of all
//
// A warp owns a ring of kStages stages and every warps-th unit of all of its CTA's tiles, one after
// the other: it loads units of the tiles to come while it multiplies, and all warps work alike even
// where K has fewer units than there are warps. At the end of a tile the warps' partial tiles are
// added in the order of the warps. Tiles of few rows multiply only the eights of tokens that they
// have.
//
// Synchronisation: decode.cuh's invariants 1 and 2; partial tiles are read, and written again, only
// after a __syncthreads.
#pragma once

#include "decode_stage.cuh"
#include "expert_map.cuh"
#include "ragged_decode.h"

namespace w4a16 {

// Threads of a CTA, at most: with them go 255 registers a thread.
inline constexpr int kRaggedThreads = 256;

// The expert of a tile that exists, from that of an earlier one on. The whole warp calls it.
__device__ __forceinline__ int ExpertOf(const ExpertParams& e, const ExpertEnd* table, int tiles_n,
                                        uint32_t tile, int earlier) {
  for (int base = earlier & ~31;; base += 32) {
    const int expert = min(base + static_cast<int>(threadIdx.x % 32), e.experts - 1);
    const uint32_t before = __ballot_sync(0xffffffff, table[expert].tiles * tiles_n <= tile);
    if (before != 0xffffffff) return base + __popc(before);
  }
}

// The widths compiled in beside kTileN.
__host__ __device__ constexpr int NarrowTile(int tile_n, int steps) {
  return tile_n - 16 * steps >= 64 ? tile_n - 16 * steps : tile_n;
}

// Where a tile lies.
struct RaggedTile {
  int expert = 0, n0, m0, end;  // `end`: the expert's rows end there

  template <int kTileN, int kTileM>
  __device__ __forceinline__ void Find(const ExpertParams& e, const ExpertEnd* table, int tiles_n,
                                       uint32_t tile) {
    expert = ExpertOf(e, table, tiles_n, tile, expert);
    const ExpertEnd before = expert > 0 ? table[expert - 1] : ExpertEnd{0, 0};
    const uint32_t tiles_m = table[expert].tiles - before.tiles;
    const uint32_t index = tile - before.tiles * tiles_n;
    const uint32_t tile_n = tiles_m == 1 ? index : index / tiles_m;  // mostly 1
    n0 = tile_n * kTileN;
    m0 = before.rows + (index - tile_n * tiles_m) * kTileM;
    end = table[expert].rows;
  }
};

// Fills a warp's stages, each with one unit of K (kBlocks blocks), in order: the units `first`,
// first + step, ... Unlike decode.cuh's loader it can start over, at another tile of other `p`.
template <typename T, int kTileN, int kTileM, int kBlocks, bool kZeros, int kParts>
class UnitLoader {
 public:
  __device__ __forceinline__ UnitLoader(const DecodeParams& p, int step)
      : p_(p),
        thread_(threadIdx.x % 32),
        policy_(EvictFirstPolicy()),
        step_(step * kUnitK),
        block_row_bytes_(static_cast<int64_t>(p.blocks_n) * kBlockBytes) {
    Start(0, 0, 0);
  }

  // From here on, units of this tile.
  __device__ __forceinline__ void Start(int n0, int m0, int first) {
    n0_ = n0;
    rows_ = min(kTileM, p_.m - m0);
    row_blocks_ = p_.blocks_n - n0 / kBlockN;
    whole_tile_ = row_blocks_ >= kTileBlocks;
    k0_ = first * kUnitK;
    weights_ = reinterpret_cast<const char*>(p_.qweight) + first * kBlocks * block_row_bytes_ +
               static_cast<int64_t>(n0 / kBlockN) * kBlockBytes + 16 * thread_;
    x_ = static_cast<const T*>(p_.x) + static_cast<int64_t>(m0 + thread_ / kChunks) * p_.k + k0_ +
         thread_ % kChunks * 8;
  }

  // Starts the copies of the next unit, as one group.
  __device__ __forceinline__ void Load(uint32_t stage) {
    LoadWeights(stage);
    const uint32_t x_stage = stage + kBlocks * kTileBlocks * kBlockBytes;
    const uint32_t scale_stage = x_stage + XBytes(kTileM, kBlocks);
    if (!kGeneral || p_.x_aligned) {
      LoadX(x_stage);
    } else {
      LoadXUnaligned(x_stage);
    }
    if (!kGeneral || p_.n_aligned) {
      LoadScales(scale_stage);
    } else {
      LoadScalesUnaligned(scale_stage);
    }
    k0_ += step_;
    weights_ += step_ / kBlockK * block_row_bytes_;
    x_ += step_;
  }

 private:
  static constexpr int kThreads = 32;
  static constexpr int kUnitK = kBlocks * kBlockK;
  static constexpr int kTileBlocks = kTileN / kBlockN;
  static constexpr int kChunks = kBlockK / 8;  // of 16 bytes, in a block of a row of x
  static constexpr bool kGeneral = kParts == 2 * kBlocks;
  static constexpr int kScaleRows = kParts * (kZeros ? 2 : 1);

  __device__ __forceinline__ void LoadWeights(uint32_t stage) const {
    CopyWeights<kTileBlocks, kBlocks>(p_, stage + 16 * thread_, weights_, block_row_bytes_, policy_,
                                      whole_tile_ && k0_ + kUnitK <= p_.k, k0_, row_blocks_);
  }

  __device__ __forceinline__ void LoadX(uint32_t dst) const {
    const int row = thread_ / kChunks, chunk = thread_ % kChunks;
    constexpr int kPass = kThreads / kChunks;  // rows copied at a time
    const int64_t pass_bytes = static_cast<int64_t>(p_.k) * (2 * kPass);
    const char* x = reinterpret_cast<const char*>(x_);
    dst += XChunk(row, chunk);
#pragma unroll 2  // of 16 rows all at once would spill
    for (int i = 0; i < kTileM; i += kPass, x += pass_bytes) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        // Zeros beyond K, from an address that is not read.
        CopyAsyncShared((dst ^ (i % 8 * 16)) + b * XBytes(kTileM, 1) + i * (kBlockK * 2),
                        x + b * (kBlockK * 2), i + row < rows_,
                        k0_ + b * kBlockK + 8 * chunk < p_.k);
      }
    }
  }

  __device__ __forceinline__ void LoadXUnaligned(uint32_t dst) const {
    // From the first of the rows, where aligned copies begin at this thread's chunk.
    const T* x = x_ - static_cast<int64_t>(thread_ / kChunks) * p_.k - thread_ % kChunks * 8;
    CopyUnaligned<kTileM, kUnitK>(p_, dst, x, thread_, k0_, rows_);
  }

  __device__ __forceinline__ const T* ScalesOf(int row) const {
    return ScaleSource<T, kUnitK, kZeros, kParts>(p_, k0_, n0_, row);
  }

  __device__ __forceinline__ void LoadScales(uint32_t dst) const {
    constexpr int kRowChunks = kTileN / 8;  // of 16 bytes
#pragma unroll
    for (int i = 0; i < kScaleRows * kRowChunks; i += kThreads) {
      const int idx = i + thread_;
      const int row = idx / kRowChunks, n = idx % kRowChunks * 8;
      if (idx < kScaleRows * kRowChunks && n0_ + n < p_.n)
        CopyAsync(dst + 16 * idx, ScalesOf(row) + n);
    }
  }

  __device__ __forceinline__ void LoadScalesUnaligned(uint32_t dst) const {
    for (int idx = thread_; idx < kScaleRows * kTileN; idx += kThreads) {
      const int row = idx / kTileN, n = idx % kTileN;
      if (n0_ + n < p_.n)
        StoreShared16(dst + 2 * idx, reinterpret_cast<const uint16_t*>(ScalesOf(row))[n]);
    }
  }

  const DecodeParams& p_;
  const int thread_;
  int n0_, rows_, row_blocks_;
  bool whole_tile_;
  const uint64_t policy_;
  int k0_;
  const int step_;
  const int64_t block_row_bytes_;
  const char* weights_;
  const T* x_;
};

// One warp's loads: its units of all tiles of the CTA. `source` are the parameters of the expert
// that is being loaded, `loader` a loader of them.
template <typename T, int kTileN, int kTileM, typename Loader>
class UnitStream {
 public:
  __device__ __forceinline__ UnitStream(const RaggedDecodeParams& params, const ExpertEnd* table,
                                        int tiles_n, uint32_t tiles, DecodeParams& source,
                                        Loader& loader)
      : params_(params),
        table_(table),
        tiles_n_(tiles_n),
        tiles_(params.decode.units > 0 ? tiles : 0),
        source_(source),
        loader_(loader) {
    Begin(threadIdx.x / 32);
  }

  // Starts the copies of the next unit, if there is one, as one group.
  __device__ __forceinline__ void Load(uint32_t stage) {
    if (tile_ < tiles_) {
      loader_.Load(stage);
      unit_ += blockDim.x / 32;
      if (unit_ >= params_.decode.units) Begin(unit_);
    }
    CopyAsyncCommit();
  }

 private:
  // `unit`: counted from the first of tile_.
  __device__ __forceinline__ void Begin(int unit) {
    const DecodeParams& p = params_.decode;
    for (; unit >= p.units && tile_ < tiles_; unit -= p.units) tile_ += gridDim.x;
    unit_ = unit;
    if (tile_ >= tiles_) return;
    const ExpertParams& e = params_.experts;
    at_.template Find<kTileN, kTileM>(e, table_, tiles_n_, tile_);
    source_.m = at_.end;
    source_.qweight = p.qweight + at_.expert * e.qweight_words;
    source_.scales = static_cast<const T*>(p.scales) + at_.expert * e.scale_elements;
    source_.zeros = static_cast<const T*>(p.zeros) + at_.expert * e.scale_elements;
    loader_.Start(at_.n0, at_.m0, unit);
  }

  const RaggedDecodeParams& params_;
  const ExpertEnd* table_;
  const int tiles_n_;
  const uint32_t tiles_;
  DecodeParams& source_;
  Loader& loader_;
  uint32_t tile_ = blockIdx.x;
  int unit_;
  RaggedTile at_;
};

// One tile, of at most kTokens rows: this warp's units, from `unit` on, and its share of the sums.
// Returns the warp's first unit of the next tile.
template <typename T, int kTileN, int kTokens, int kTileM, int kBlocks, int kStages, bool kZeros,
          int kParts, typename Stream>
__device__ __forceinline__ int MultiplyTile(const RaggedDecodeParams& params, const RaggedTile& at,
                                            Stream& stream, uint32_t ring, uint32_t& stage,
                                            int unit, uint32_t partials) {
  constexpr int kTileBlocks = kTileN / kBlockN, kTokenBlocks = kTokens / 8;
  const DecodeParams& p = params.decode;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int rows = min(kTokens, at.end - at.m0);
  const StageOffsets offsets = FindOffsets<kTileN, kTileM, kBlocks, kZeros, kParts>(lane);
  float acc[kTileBlocks][kTokenBlocks][4] = {};
  const uint32_t ring_end = ring + kStages * p.stage_bytes;
#pragma unroll 1
  for (; unit < p.units; unit += warps) {
    CopyAsyncWait<kStages - 1>();
    __syncwarp();
    MultiplyStage<T, kTileN, kTokens, kTileM, kBlocks, kZeros, kParts>(stage, offsets, acc);
    __syncwarp();
    stream.Load(stage);
    stage = stage + p.stage_bytes == ring_end ? ring : stage + p.stage_bytes;
  }

  constexpr bool kAffine = UsesAffineCodes(kTileN, kTokens, kZeros, kParts);
  constexpr int kStride = PartialStride(kTileN);
  __syncthreads();
  StorePartial<kTileN, kTokens>(partials + warp * params.partial_bytes, lane, acc);
  __syncthreads();
  constexpr int kQuads = kTileN / 4, kLog2Quads = CeilLog2(kQuads);
  for (int idx = threadIdx.x; idx < rows << kLog2Quads; idx += blockDim.x) {
    const int token = idx >> kLog2Quads, quad = idx & ((1 << kLog2Quads) - 1);
    const int n = at.n0 + 4 * quad;
    if (quad < kQuads)
      StoreOut<T>(p, static_cast<int64_t>(at.m0 + token) * p.n + n, n,
                  p.alpha * StepOf<T, kAffine>(n),
                  SumQuads(partials + token * 4 * kStride + 16 * quad, params.partial_bytes, warps),
                  {}, false);
  }
  return unit - p.units;
}

__device__ __forceinline__ int TilesN(const DecodeParams& p, int width) {
  return static_cast<int>(static_cast<uint32_t>(p.n + width - 1) / static_cast<uint32_t>(width));
}

// All tiles of the CTA, kTileN wide.
template <typename T, int kTileN, int kTileM, int kBlocks, int kStages, bool kZeros, int kParts>
__device__ __forceinline__ void RunTiles(const RaggedDecodeParams& params, const ExpertEnd* table,
                                         uint32_t tiles_m, uint32_t partials) {
  const DecodeParams& p = params.decode;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const uint32_t ring = partials + warps * params.partial_bytes + warp * (kStages * p.stage_bytes);
  const int tiles_n = TilesN(p, kTileN);
  const uint32_t tiles = tiles_m * tiles_n;
  DecodeParams source = p;
  UnitLoader<T, kTileN, kTileM, kBlocks, kZeros, kParts> loader(source, warps);
  UnitStream<T, kTileN, kTileM, decltype(loader)> stream(params, table, tiles_n, tiles, source,
                                                         loader);
#pragma unroll 1
  for (int s = 0; s < kStages; ++s) stream.Load(ring + s * p.stage_bytes);

  RaggedTile at;
  uint32_t stage = ring;
  int unit = warp;
#pragma unroll 1
  for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    at.template Find<kTileN, kTileM>(params.experts, table, tiles_n, tile);
    const int rows = at.end - at.m0;
#define W4A16_MULTIPLY(TOKENS)                                                      \
  unit = MultiplyTile<T, kTileN, TOKENS, kTileM, kBlocks, kStages, kZeros, kParts>( \
      params, at, stream, ring, stage, unit, partials)
    if (kTileM > 8 && rows <= 8) {
      W4A16_MULTIPLY(8);
    } else if (kTileM > 16 && rows <= 16) {
      W4A16_MULTIPLY(16);
    } else {
      W4A16_MULTIPLY(kTileM);
    }
#undef W4A16_MULTIPLY
  }
}

template <typename T, int kTileN, int kTileM, int kBlocks, int kStages, bool kZeros, int kParts>
__global__ void __launch_bounds__(kRaggedThreads, 1)
    RaggedDecodeKernel(const __grid_constant__ RaggedDecodeParams params) {
  static_assert(kTileN % kBlockN == 0 && kTileM % 8 == 0 && kTileM <= 32);
  if (kTuring && kTileN * kTileM > kTuringOutputs) return;  // never launched
  extern __shared__ __align__(128) char shared[];
  const DecodeParams& p = params.decode;
  const ExpertParams& e = params.experts;
  ExpertEnd* const table = reinterpret_cast<ExpertEnd*>(shared);
  if (threadIdx.x < 32) MakeExpertTable<kTileM>(e, p.m, table);
  __syncthreads();
  const ExpertEnd all = e.experts > 0 ? table[e.experts - 1] : ExpertEnd{0, 0};
  ClearRows(p.out, all.rows, p.m, int64_t{p.n} * (p.out_float32 ? 4 : 2));

  // Of the widths that are compiled in, the one with which the CTA with the most tiles has least to
  // do, in blocks of 16 x 64 codes: so much for each tile and for each of its blocks along K,
  // whatever its width (measured).
  constexpr uint32_t kTileCost = 10, kRowCost = 1 + kTileM / 4;
  const auto cost = [&](int width) {
    const uint32_t tiles = all.tiles * TilesN(p, width);
    return (tiles + gridDim.x - 1) / gridDim.x *
           ((width / kBlockN + kRowCost) * p.units * kBlocks + kTileCost);
  };
  constexpr int kNarrow = NarrowTile(kTileN, 1), kNarrower = NarrowTile(kTileN, 2);
  // The kernel of the most parts has no registers for the widest.
  constexpr int kWidest = kParts > 2 && kTileM > 8 ? kNarrow : kTileN;
  const uint32_t costs[] = {cost(kWidest), cost(kNarrow), cost(kNarrower)};
  const uint32_t partials = SharedAddress(shared) + params.table_bytes;
#define W4A16_RUN(WIDTH) \
  RunTiles<T, WIDTH, kTileM, kBlocks, kStages, kZeros, kParts>(params, table, all.tiles, partials)
  if (kNarrow == kTileN || costs[0] <= min(costs[1], costs[2])) {
    W4A16_RUN(kWidest);
  } else if (costs[1] <= costs[2]) {
    W4A16_RUN(kNarrow);
  } else {
    W4A16_RUN(kNarrower);
  }
#undef W4A16_RUN
}

template <typename T, int kTileN, int kTileM, int kBlocks, int kStages, bool kZeros>
RaggedDecodePointer RaggedKernelForParts(int parts) {
  constexpr int kMost = 2 * kBlocks;
  if (parts == 1) return RaggedDecodeKernel<T, kTileN, kTileM, kBlocks, kStages, kZeros, 1>;
  if (parts == kMost) return RaggedDecodeKernel<T, kTileN, kTileM, kBlocks, kStages, kZeros, kMost>;
  return RaggedDecodeKernel<T, kTileN, kTileM, kBlocks, kStages, kZeros, 2>;
}

template <typename T>
RaggedDecodePointer FindRaggedDecode(const Config& c, bool has_zeros, int parts) {
#define W4A16_DECODE(...)
#define W4A16_WGMMA(...)
#define W4A16_PERSISTENT(...)
#define W4A16_CUTLASS(...)
#define W4A16_RAGGED_DECODE(N, M, BLOCKS, WARPS, STAGES, ...)                     \
  static_assert(WARPS * 32 <= kRaggedThreads);                                    \
  if (c.tile_n == N && c.tile_m == M && c.blocks == BLOCKS && c.stages == STAGES) \
    return has_zeros ? RaggedKernelForParts<T, N, M, BLOCKS, STAGES, true>(parts) \
                     : RaggedKernelForParts<T, N, M, BLOCKS, STAGES, false>(parts);
#include "../configs.inc"
#undef W4A16_DECODE
#undef W4A16_WGMMA
#undef W4A16_PERSISTENT
#undef W4A16_CUTLASS
  return nullptr;
}

}  // namespace w4a16
