// Decode: few tokens, the packed weight streamed once from memory.
//
//   out[m, n] = alpha * sum_k x[m, k] * (code[k, n] - zero[k/g, n]) * scale[k/g, n] + bias[n]
//
// computed as out^T = w^T x^T with mma.m16n8k16, the packed weight being operand A as it is stored.
//
//             tokens                    K (units of kBlocks blocks of 64)
//            +-------+              +----+----+----+----+----+----+----+----+
//   tile_n   |       |     tile_n   | w0 | w1 | w2 | w3 | w0 | w1 | w2 | w3 |   a CTA's share of K
//   (N)      |  CTA  |  =  (N)      |    |    |    |    |    |    |    |    |   (1 / split_k of it)
//            +-------+              +----+----+----+----+----+----+----+----+
//             tile_m                   |
//                                      v  one stage of warp w0's private ring of kStages
//   weights: per block of K, tile_n/16 x 512 B (lane l reads 16 bytes of each) | x: per block,
//   tile_m x 128 B, swizzled | scales, then zeros: kParts rows of tile_n | barrier of x
//
// A warp owns a ring and every warps-th unit of its CTA's share. No CTA barrier in the loop. A unit
// has kParts equal parts, each within one group. A part's products accumulate in float32 from zero,
// then partial * scale is added to the total. With affine codes (dequant.cuh) A holds
// (code + offset) / step, and sum(x) of the part comes from mma as well (SumTokens):
//   sum x (code - zero) / step  =  sum(x a) - (zero + offset) * sum(x / step);
// where rows 0 .. 7 of a block hold the codes of rows 8 .. 15 as well (CodeBytes), sum(x a) of the
// latter is subtracted first. The totals are multiplied by step at the end.
//
// What the speed hangs on (H200, measured): CTAs of equal work, one or two to an SM, hence tiles of
// any multiple of 16; stages that begin at multiples of 128 bytes (else up to 13% slower); and few
// instructions, because some 8 warps an SM hide little latency, while more than about 64 KB in
// flight an SM cost time again. Addresses held in registers, found between products, took 0 to 6%
// off, weights not marked evict-first cost 2 to 5% at M = 1. Bulk copies of weights and scales were
// never faster, nor were shifts of the codes by multiplying, nor all of a stage read and refilled
// before its first product, nor weights loaded to registers, nor another order of K in every CTA,
// nor tiles of up to 448 rows in clusters of 4 and 8, nor three stages, nor predicates in place of
// a branch for units that are not whole.
//
// More than a few rows of x come by tensor copies on Hopper: one lane asks for what takes the load
// unit 26 cycles for 512 bytes, of weights 7, because rows of x go through L1. At M = 16 that took
// 3 to 12% off, at M = 8 3% of 4096 x 4096, while layers of several CTAs an SM, which shared L1,
// got 1 to 2% slower; one row cost 1% more. A box of more rows than there are costs 5 to 20% (at
// M = 1), x asked for before the first weights 2 to 8, all of a CTA's x fetched at its start up to
// 40.
//
// Nothing hides what a CTA does after its last copy has come: at 4096 x 4096, M = 1, it was 0.8 of
// 4.7 us. Sums of several quads at a time, and addresses found while the first copies were under
// way, took 5% off (at M = 8 3%, of larger layers 1 to 3%). Its instructions come from memory too:
// a branch for each of a warp's stores cost 0.5 us at M = 16, no code for quads that N cuts 0.3%,
// and SwiGLU is 2% faster with one loop for the sums of gate and up and half a warp for a row's
// factor (0.3 us of 28672 x 4096 at M = 1). One address for a warp's sums and constants beyond it,
// and their steps left to the sum of all warps, took 0.3% off, at M = 16 0.5 to 1. To run the loop
// and the end once on nothing meanwhile, so that they are in the cache, cost 3 to 10%. A bias
// loaded as the warps meet costs 0.5%; loaded after that 2.5, at the start (and converted there) 5.
//
// In a unit, what is neither a code nor a product counts at M = 16: to hold the lane and the other
// stage's address (the compiler read special registers and parameters for them, which takes long),
// to go on by whole groups, to read scales by ldmatrix, and to have one way for x alone took 5% off
// in float16, 4 in bfloat16; at M = 1 to 8 1%, of 4096 x 4096 3. Groups of 32, with all addresses
// held: 2.5%; without the code for unaligned rows, which a kernel of their own does not have, 4.6%
// at M = 1, 2.5 at 8 and 16. Four row blocks abreast, or more warps, gained nothing. At 16 tokens
// groups of 64 and 32 got 1.3 and 1.5% faster with addresses held, 1.4 and 3.8 with codes as bits,
// not as bytes, which at 8 tokens cost 3.4 and nothing. Tiles of 24 tokens are as fast as wgmma's
// on two of eight shapes and 5 to 15% slower on the others, those of 32 tokens 20% and more: x goes
// through shared memory once for each CTA, twice as many bytes as codes.
//
// Codes of fewer instructions: of a word's seven in bfloat16, two gone with x made LargeX took 3 to
// 5% off (geometric mean of 8 shapes; 12% of 8192 x 28672 at M = 8), one more with CodeBytes 1 to
// 2%; in float16, where that one was the fifth, 1% up to M = 8 and nothing at M = 16. Exact ones of
// eight instructions instead of eleven took 6% off 4096 x 4096 at M = 16.
//
// What limits M = 16 is no one thing: with weights in L2 it takes as long, without any copies 11%
// less (M = 1: 21), without half of the products 7 (0), without the end 6 (3), without copies of x
// 4 (0), without sums of x 3 (0.5). At 8192 x 28672 warps mostly wait for the tensor cores, which
// are busy for half of the time, or for another's instruction. Two tokens' sums by one mma took 1
// to 4% off. 9 rows take as long as 16.
//
// Preconditions (checked by): every pointer aligned to 16 bytes (CheckOperands); extents up to
// 2^30, group_size a multiple of 32 or >= K (CheckProblem); split_k == cluster size, the tiles fit
// the grid, shared memory as in decode.h (RunDecode); sm_75, sm_80 for bfloat16, sm_90 for split_k
// > 1, enough shared memory (CanImplement). Rows of x, scales and out may be unaligned: x_aligned
// and n_aligned choose slower copies.
//
// Synchronisation invariants
//  1. A lane reads a stage only after its own cp.async.wait_group for that stage and then
//     __syncwarp: each lane waits for its own copies, the barrier joins them. x that comes by
//     tensor copies it reads after the phase of the stage's mbarrier.
//  2. A stage is refilled only after a __syncwarp that follows every lane's last read of it.
//  3. A warp stores its partial tile over its own ring alone, after its last read (a __syncwarp)
//  and
//     short of the barriers: a partial tile is smaller than a stage's weights and x.
//  4. Partial tiles are read by other warps only after __syncthreads.
//  5. No CTA sends to another before the cluster's one barrier: all have started, and their
//     mbarriers are initialised and expect the bytes that will come.
//  6. Received sums are read only after the mbarrier's phase: all of them are there. A CTA that
//     exits has received all that is ever sent to it.
// All sums run in a fixed order: units within a warp, warps within a CTA, CTAs within a cluster.
#pragma once

#include "decode_epilogue.cuh"
#include "decode_loader.cuh"
#include "ptx_sm90.cuh"

namespace w4a16 {

// Threads of a CTA, at most: with them go 128, 168 or 255 registers a thread. `most_parts`: of a
// stage, which take more of them.
__host__ __device__ constexpr int MaxThreads(int tile_n, int tile_m, bool most_parts) {
  if (kTuring) return 32 * kTuringWarps;
  const int outputs = tile_n * tile_m;
  return outputs <= (most_parts ? 32 : 64) * 8 ? 512 : outputs <= 64 * 8 ? 384 : 256;
}

template <typename T, int kTileN, int kTileM, int kBlocks, int kStages, bool kZeros, int kParts,
          bool kGeneral, w4a16_epilogue kEpilogue>
__global__ void __launch_bounds__(MaxThreads(kTileN, kTileM, kParts == 2 * kBlocks), 1)
    DecodeKernel(const __grid_constant__ DecodeParams p,
                 const __grid_constant__ CUtensorMap x_map) {
  static_assert(kTileN % kBlockN == 0 && kTileM % 8 == 0);
  if (kTuring && kTileN * kTileM > kTuringOutputs) return;  // never launched
  constexpr int kTileBlocks = kTileN / kBlockN, kTokenBlocks = kTileM / 8;
  extern __shared__ __align__(1024) char shared[];

  constexpr bool kHold = HoldsAddresses(kTileN, kTileM, kZeros, kParts);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int lane = threadIdx.x % 32;
  // Else the compiler reads it in every unit, which takes long.
  constexpr bool kHoldLane = kHold && kParts == 1;
  Hold<kHoldLane>(lane);
  const int log2_split = p.log2_split_k, split = 1 << log2_split;
  const int rank = blockIdx.x & (split - 1);
  int tile_n = blockIdx.x >> log2_split, tile_m = 0;
  if (p.tiles_m > 1) {
    tile_m = tile_n % p.tiles_m;
    tile_n /= p.tiles_m;
  }
  const int n0 = tile_n * kTileN, m0 = tile_m * kTileM;

  // This warp's units of K: `first`, first + warps, ... below `end`. All CTAs take them in the
  // same order, so that those of one SM find each other's x in L1.
  const int first = (p.units * rank >> log2_split) + warp;
  int end = p.units * (rank + 1) >> log2_split;
  int step = warps;
  Hold<kHold>(end), Hold<kHold>(step);

  const uint32_t factors = SharedAddress(shared), partials = factors + p.head_bytes;
  const uint32_t ring_address = partials + warp * p.warp_bytes;
  const uint32_t ring_end = ring_address + kStages * p.stage_bytes;

  StageLoader<T, kTileN, kTileM, kBlocks, kZeros, kParts, kGeneral> loader(p, x_map, n0, m0, lane,
                                                                           first, warps);
  // A warp runs this once, and its instructions come from memory as well: the order of the copies
  // and the room that they take in the code count.
  if (first < end) loader.LoadWeights(ring_address, loader.IsWhole());
#if __CUDA_ARCH__ >= 900
  if (p.x_tensor && threadIdx.x == 0) ptx::PrefetchTensorMap(&x_map);
#endif
  loader.Prepare();
  if (loader.TensorX()) loader.InitBarriers(ring_address, kStages);
  if (first < end) {
    loader.LoadX(ring_address, loader.IsWhole());
    loader.LoadScales(ring_address);
  }
  const int rows = min(kTileM, p.m - m0);
  PrepareEpilogue<T, kEpilogue, kTileN>(p, n0, m0, rows);
  CopyAsyncCommit();
#pragma unroll 1
  for (int s = 1; s < kStages; ++s) {
    const uint32_t stage = ring_address + s * p.stage_bytes;
    loader.Advance();
    if (first + s * warps < end) loader.Load(stage);
    CopyAsyncCommit();
  }

  // Outputs go in quads: 4 columns of one token.
  constexpr int kQuads = kTileN / 4, kLog2Quads = CeilLog2(kQuads);
#if __CUDA_ARCH__ >= 900
  // Every split-th block of a token's outputs is this CTA's to sum.
  const int share = (kTileBlocks + split - 1) >> log2_split << 2;
  const uint32_t barrier = factors + (kEpilogue == W4A16_SWIGLU ? kFactorBytes : 0);
  const uint32_t received = barrier + kBarrierBytes;
  if (log2_split > 0) {
    const int quads = (kTileBlocks - rank + split - 1) >> log2_split << 2;
    if (threadIdx.x < 32) {
      if (lane == 0) {
        ptx::MbarrierInit(barrier, 1);
        ptx::FenceMbarrierInit();
      }
      __syncwarp();  // for racecheck, which blames the warp's last lane for the initialisation
      if (lane == 0) ptx::MbarrierArriveExpectTx(barrier, split * rows * quads * 16);
    }
    ptx::ClusterArriveRelaxed();
  }
#endif
  // Without a cluster a thread finishes every blockDim-th item of the tile. Where registers are
  // left it finds the first before it waits for copies.
  constexpr int kStride = PartialStride(kTileN), kLog2Items = CeilLog2(ItemsOf<kEpilogue>(kQuads));
  constexpr bool kHoldMore = kHold && kTileN * kTileM <= 64 * 16;
  constexpr bool kWhole = !kGeneral;  // N and K are multiples of 8
  auto find_quad = [&](int idx) {
    const int token = idx >> kLog2Items;
    const int quad = QuadOf<kEpilogue>(idx & ((1 << kLog2Items) - 1)), n = n0 + 4 * quad;
    return Quad{.exists = token < rows && quad < kQuads && (!kWhole || n < p.n),
                .n = n,
                .terms = partials + 4 * kStride * token + 16 * quad,
                .out = OutOf<kEpilogue>(p, m0 + token, n)};
  };
  Quad quad = {};
  if constexpr (kHoldMore) {
    quad = find_quad(threadIdx.x);
    Hold<true>(quad.exists), Hold<true>(quad.n), Hold<true>(quad.terms), Hold<true>(quad.out);
  }

  constexpr auto kFindOffsets = FindOffsets<kTileN, kTileM, kBlocks, kZeros, kParts>;
  uint32_t turn = 0;  // units so far
  StageOffsets offsets = kFindOffsets(lane);
  Hold<kHold>(offsets.words), Hold<kHold>(offsets.scales), Hold<kHold>(offsets.x);
  Hold<kHoldLane>(offsets.sum_lane);

  float acc[kTileBlocks][kTokenBlocks][4] = {};
  uint32_t stage = ring_address, both_stages = 2 * ring_address + p.stage_bytes;
  Hold<kHold>(both_stages);
#pragma unroll 1
  for (int unit = first; unit < end; unit += step) {
    CopyAsyncWait<kStages - 1>();
    __syncwarp();  // invariant 1
#if __CUDA_ARCH__ >= 900
    if (loader.TensorX()) ptx::MbarrierWait(StageBarrier(p, stage), turn++ / kStages % 2);
#endif
    if constexpr (kHold) loader.Advance();
    if constexpr (!kHold && kTileN * kTileM > 112 * 16) {  // few registers are left
      int l = lane;
      Hold<true>(l);
      offsets = kFindOffsets(l);
    }
    MultiplyStage<T, kTileN, kTileM, kTileM, kBlocks, kZeros, kParts>(stage, offsets, acc);
    __syncwarp();  // invariants 2 and 3
    if constexpr (!kHold) loader.Advance();
    if (unit + kStages * step < end) loader.Load(stage);
    CopyAsyncCommit();
    if constexpr (kHold && kStages == 2) {
      stage = both_stages - stage;
    } else {
      stage = stage + p.stage_bytes == ring_end ? ring_address : stage + p.stage_bytes;
    }
  }

  constexpr bool kAffine = UsesAffineCodes(kTileN, kTileM, kZeros, kParts);
  StorePartial<kTileN, kTileM>(ring_address, lane, acc);
  if constexpr (kEpilogue == W4A16_SWIGLU) FindFactors(p, factors, m0, rows);
  if (kHoldMore && log2_split == 0) {
    Addends addends = {};  // of the first quad: on their way while the warps meet
    if (quad.exists) addends = LoadAddends<T, kEpilogue, kWhole>(p, quad);
    __syncthreads();  // invariant 4
    for (int idx = threadIdx.x; idx < rows << kLog2Items; idx += blockDim.x) {
      if (idx >= blockDim.x) {
        quad = find_quad(idx);
        if (quad.exists) addends = LoadAddends<T, kEpilogue, kWhole>(p, quad);
      }
      if (quad.exists)
        Finish<T, kEpilogue, kWhole, kAffine>(p, quad, p.warp_bytes, warps, addends,
                                              factors + 4 * (idx >> kLog2Items));
    }
    return;
  }

#if __CUDA_ARCH__ >= 900
  if (log2_split > 0) ptx::ClusterWait();  // invariant 5
#endif
  __syncthreads();  // invariant 4

  // Where a quad's terms lie: the warps' partial tiles or, in a cluster, what its CTAs sent of
  // them.
  uint32_t terms = partials;
  int num_terms = warps, term_bytes = p.warp_bytes, token_bytes = 4 * kStride;
#if __CUDA_ARCH__ >= 900
  if (log2_split > 0) {
    for (int idx = threadIdx.x; idx < rows << kLog2Quads; idx += blockDim.x) {
      const int token = idx >> kLog2Quads, i = idx & ((1 << kLog2Quads) - 1);
      if (i >= kQuads) continue;
      const int block = i >> 2, to = block & (split - 1);
      const int at = (rank * kTileM + token) * share + (block >> log2_split << 2) + i % 4;
      const float4 sum = SumQuads(terms + token * token_bytes + 16 * i, term_bytes, num_terms);
      ptx::StoreAsync(ptx::MapShared(received + 16 * at, to), ptx::MapShared(barrier, to), sum.x,
                      sum.y, sum.z, sum.w);
    }
    ptx::MbarrierWaitCluster(barrier, 0);  // invariant 6
    terms = received;
    num_terms = split, term_bytes = kTileM * share * 16, token_bytes = share * 16;
  }
#endif
  const int log2_items = kLog2Items - log2_split;
  for (int idx = threadIdx.x; idx < rows << log2_items; idx += blockDim.x) {
    const int token = idx >> log2_items, i = QuadOf<kEpilogue>(idx & ((1 << log2_items) - 1));
    const int n = n0 + kBlockN * ((i >> 2 << log2_split) + rank) + 4 * (i % 4);
    if (n >= n0 + kTileN || (kWhole && n >= p.n)) continue;
    const Quad own = {.exists = true,
                      .n = n,
                      .terms = terms + token * token_bytes + 16 * i,
                      .out = OutOf<kEpilogue>(p, m0 + token, n)};
    Finish<T, kEpilogue, kWhole, kAffine>(p, own, term_bytes, num_terms,
                                          LoadAddends<T, kEpilogue, kWhole>(p, own),
                                          factors + 4 * token);
  }
}

template <typename T, int kTileN, int kTileM, int kBlocks, int kStages, bool kZeros,
          w4a16_epilogue kEpilogue>
const void* KernelForParts(int parts, bool general) {
  constexpr int kMost = 2 * kBlocks;
  const void* kernel = nullptr;
  const auto find = [&]<int kParts, bool kGeneral>() {
    if (parts == kParts && general == kGeneral)
      kernel = reinterpret_cast<const void*>(
          DecodeKernel<T, kTileN, kTileM, kBlocks, kStages, kZeros, kParts, kGeneral, kEpilogue>);
  };
  find.template operator()<1, false>();
  find.template operator()<2, false>();
  if constexpr (kEpilogue == W4A16_NO_EPILOGUE) {  // CanImplement refuses others with an epilogue
    find.template operator()<kMost, false>();
    find.template operator()<kMost, true>();
  }
  return kernel;
}

template <typename T, w4a16_epilogue kEpilogue>
const void* FindDecodeKernel(const Config& c, bool has_zeros, int parts, bool general) {
#define W4A16_DECODE(N, M, BLOCKS, WARPS, STAGES, SPLIT, ...)                                   \
  static_assert((kTuring || WARPS * 32 <= MaxThreads(N, M, true)) && SPLIT * kBlockN <= N &&    \
                (SPLIT & (SPLIT - 1)) == 0);                                                    \
  if (c.tile_n == N && c.tile_m == M && c.blocks == BLOCKS && c.stages == STAGES)               \
    return has_zeros ? KernelForParts<T, N, M, BLOCKS, STAGES, true, kEpilogue>(parts, general) \
                     : KernelForParts<T, N, M, BLOCKS, STAGES, false, kEpilogue>(parts, general);
#define W4A16_WGMMA(...)
#define W4A16_PERSISTENT(...)
#define W4A16_CUTLASS(...)
#include "../configs.inc"
#undef W4A16_DECODE
#undef W4A16_WGMMA
#undef W4A16_PERSISTENT
#undef W4A16_CUTLASS
  return nullptr;
}

}  // namespace w4a16
