// Middle and large M on Hopper: the transposed product, packed weights as wgmma's register operand.
//
//   out[m, n] = alpha * sum_k x[m, k] * w[k, n] + bias[n]
//   w[k, n] = T((code[k, n] - zero[k / g, n]) * scale[k / g, n])
//
// computed as out^T[N, M] = w^T x^T, accumulated in float32; T rounds to x's type.
//
//                kTileM tokens (wgmma's n)     One CTA: a tile of kTileN rows of weights by
//               +-------------------------+    kTileM tokens. Each consumer warpgroup owns 64
//   rows  0..63 |  consumer warpgroup 0   |    rows (wgmma's m). Warp w of warpgroup g owns block
//        64..   |  consumer warpgroup 1   |    row 4 * g + w of 16 rows; the 16 bytes of lane l in
//         ...   |         ...             |    a packed block are its A fragments of the block's
//               +-------------------------+    four k16 steps (layout.h).
//
//   There are kTeams teams of such warpgroups, which take the stages in turn.
//   Up to three further warps are producers: one lane of each starts the copies of codes, of x, or
//   of scales and zeros.
//
//   A stage holds kBlocks packed blocks along K (64 codes each) of the tile:
//     x       kBlocks tiles of kTileM rows x 128 bytes, swizzled     tensor copy, zero-filled
//     codes   kBlocks x kTileN / 16 packed blocks of 512 bytes       tensor copy, zero-filled
//     scales  kTileN values for every group that the stage meets     tensor copy or bulk copies
//     zeros   likewise, if kHasZeros
//
//   Folding (few tokens, groups of whole blocks, not batch-invariant): A is T(code - zero), each
//   group is summed by itself and added times its scale in float32. Otherwise A is w, and one sum
//   runs through all of K.
//
//   split-K: the kSplitK CTAs of a cluster take consecutive parts of K and finish a slice of the
//   tile's tokens each, out of the float32 sums that they send one another, those of a rank's teams
//   added up, in the order of ranks. Every element is summed and written by one thread, or by two
//   in the same way (FirstToken), so its bits do not depend on timing.
//
//   Dealing (kSplitK == 2, an odd number of blocks of 64 rows, more than four): a cluster's CTAs
//   share the tile's rows rather than K. Each takes all of K for half of the blocks; the one in the
//   middle is both CTAs', which take every second stage of it each, and is finished like split-K.
//   So an SM may have 3.5 blocks of rows: 64 clusters of 448 rows keep 128 of 132 SMs busy with
//   28672 rows, which 112 CTAs of 256 did not, and x comes to an SM once for all its rows.
//
// What bounds it, measured on an H200:
//
//   Instructions. A wgmma whose A is in registers holds up its warp's next instructions until A has
//   been read, that is, until the wgmma before it is done; and one of n tokens takes n / 4 + 4 of
//   the cycles in which a quarter of an SM issues instructions. From four warpgroups an SM on, a 64
//   x 64 block takes about 4 * (n / 4 + 4) cycles and one for each instruction of a warp, but at
//   least 2 * n, the tensor cores' time (53 at 16). With one or two warpgroups it is latency that
//   counts: one alone takes 270 cycles for a block, two teams 220. So descriptors are one sum,
//   waits are one for two wgmmas, codes become numbers by 9 instructions for 8 codes, and whole
//   rounds of stages are unrolled, so that what depends on the slot is part of the instructions.
//   That left 54 a block in bfloat16, 69 of 80 in float16, 60 of 70 folded (32 tokens), and took 2
//   to 7% off tiles of 16 to 48 tokens, 1 to 4% off those of 64 (eight sizes). Float16 weights by
//   one fma take 58, and 5.4% less time at M = 64, 3.7% at 48 and 128, 3% at 96; where a warp has
//   large scales they take 79 (by 75 it was 6% more time than by 69).
//
//   ptxas. It serialises wgmmas where sums are read after a wait in another iteration, or where one
//   kernel holds both ways: hence a drain for every group, and kernels of their own. It finds too
//   few registers for long unrolled rounds of wide tiles (six stages of 448x64), and adds
//   descriptors in three instructions in some branches. The same loop is up to 7% slower in some
//   builds than in others (192 x 64), for no reason that was found.
//
//   What comes before and after the loop, in small problems: at 4096 x 4096, 64 tokens, 3,900 of a
//   CTA's 9,400 cycles, of which the first stage takes 1,250 to come, and sums 450 from CTA to CTA,
//   be they few. So a release at the cluster's scope, which waits for all that the thread has in
//   flight, gives way to st.async; teams add up before they send; what the end needs is found while
//   the first stage is on its way, without divisions; whole rows are stored where a CTA has all
//   sums. That took 12% off there, 5% in the mean of eight sizes at 64 and 128 tokens, 2% at 32.
//
//   x on its way to tiles of 64 rows: with copies alone, all SMs together draw 13 TB/s from L2
//   while they ask for the same x at the same time, but 9 where each starts elsewhere in K, and the
//   kernel takes about as long as the latter. An SM takes in 67 bytes a cycle at best. Copies alone
//   of 64 x 64 tiles, one CTA an SM: 265 ns a stage where one warp starts them all, 155 where three
//   do.
//
//   Whole waves: 30 clusters of four fit at one CTA an SM, so 128 CTAs of such take two waves, and
//   40 clusters of three do as well; 66 clusters of two fit.
//
//   Power, in large layers: the card's limit sets the time, by all the work there is, however it is
//   shared out. At 8192 x 28672, after 0.25 s, M = 32 runs at 1.58 GHz instead of 1.98, M = 128 at
//   1.43. A product in bfloat16 takes 33 mJ there at M = 32, 43 at 64, 71 at 128 (22 at M = 1):
//   reading memory 14, what the card draws idle 6, 8 and 13, copies of x and into shared memory 4,
//   6 and 14, the rest products; dequantising alone 1.5. In float16 products take 1, 4 and 5 more.
//   (Before unrolling and dealing.)
//
//   Without gain: sums of x in place of code - zero (14 instructions less, but the wgmma that adds
//   these and the warps that form them cost as much); two tiles of rows a warpgroup (2% less); four
//   wgmmas at once, but for teams that fold; the end run once by an idle producer, so that its
//   instructions are in the cache; codes asked of L2 before the barriers exist (2 to 7% more); x
//   shared by multicast along N (47 bytes a cycle; of some 30 lines none was the best of any size);
//   tiles of 96, 160 and 224 rows, which take as long as those of the next 64, be two warps of a
//   warpgroup idle in turn or the last 32 rows left to mma.sync, which waits for others' wgmmas;
//   split-K by four as two clusters of two, one of which gets the other's sums through memory,
//   marked 16 bytes by 16 bytes (2 to 3 us); split-K by three or four in tiles of 64 x 64; one
//   branch for a stage of large scales (WeightMaker), whose wgmmas ptxas then serialises.
//
// Preconditions (checked by)
//   N % 8 == 0, K % 8 == 0, M, N, K > 0, sm_90                   CanImplement
//   pointers aligned to 16 bytes                                 CheckOperands
//   group_size a multiple of 32, or at least K                   CheckProblem
//   number of tiles * kSplitK fits a grid                        RunWgmma
//
// Synchronisation
//   S1  full[s]: completes when the bytes that the producers announced for stage s have landed.
//   S2  empty[s]: completes when every warp that the stage is for has arrived: those of its team,
//       but of the shared rows in a stage that the other CTA multiplies by them. One lane arrives
//       for its warp, after the wait that retires the warp's wgmmas on the stage; what the warp
//       itself read from the stage is in their operands. A stage is always the same team's: another
//       could take the barrier's phase before the last for the one that it waits for.
//       compute-sanitizer's racecheck does not follow this from lane to lane: built with
//       W4A16_RACECHECK, every lane arrives for itself.
//   S3  A registers: buffers of kBatch k16 steps. One is rewritten only after a wait that leaves in
//       flight no more than the wgmmas that read the others.
//   S4  What teams give each other, and rows of tokens, overlay the stages. A consumer writes there
//       once all consumers of the CTA have passed their last read (named barrier 2), and reads
//       what others wrote once all have passed that barrier again.
//   S5  A CTA sends to another only after the cluster barrier at which each arrives when it has
//       initialised its barriers. Inboxes overlay nothing. racecheck lets no thread past the
//       barrier until all of the cluster are at its wait, to which producers come after their last
//       copy: built with W4A16_RACECHECK, consumers come to it after their last product.
//   S6  received: completes when the sums of all other ranks have landed in the inbox (st.async
//       counts its bytes there). Each CTA that has a slice waits for it, so none exits while others
//       write to it.
//   S7  Consumers and the other producers pass named barrier 1 first: the first producer's warp
//       arrives there when it has initialised the mbarriers.
#pragma once

#include <climits>
#include <type_traits>

#include "dequant.cuh"
#include "gemm_wgmma.h"
#include "kernels.h"
#include "ptx_sm90.cuh"
#include "wgmma_finish.cuh"
#include "wgmma_shape.cuh"

namespace w4a16 {

// What the host needs to launch an instantiation.
struct WgmmaKernel {
  void (*kernel)(WgmmaMaps, WgmmaParams);
  int blocks;  // of 64 codes to a stage
  int threads;
  int shared_bytes;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Starts the copies of codes, of x, or of scales and zeros of the CTA's part of K: chunks [begin,
// end) of kBlocks blocks. The whole warp calls it. kBoxes is p.scales_in_boxes.
template <typename T, typename Shape, bool kCodes, bool kX, bool kScales, bool kBoxes>
__device__ inline void ProduceStages(const WgmmaMaps& maps, const WgmmaParams& p, uint32_t shared,
                                     int begin, int end, int rank, int expert, int n0, int m0,
                                     int run_shift) {
  if (ptx::ElectOne()) {
    if constexpr (kCodes) ptx::PrefetchTensorMap(&maps.codes);
    if constexpr (kCodes && Shape::kDeals) ptx::PrefetchTensorMap(&maps.own_codes);
    if constexpr (kX) ptx::PrefetchTensorMap(&maps.x);
    if constexpr (kScales && kBoxes) ptx::PrefetchTensorMap(&maps.scales);
  }
  __syncwarp();
  // A CTA may have no rows where its cluster deals them.
  const uint32_t row_bytes = kBoxes ? Shape::kRowBytes : max(0, min(Shape::kRows, p.n - n0)) * 2;
  const uint32_t x_bytes = p.x_rows * 128;  // one block
  const int rows = ((2 * Shape::kBlocks - 1) >> run_shift) + 1;
  const uint32_t bytes = Shape::kBlocks * ((kX ? x_bytes : 0) + (kCodes ? Shape::kCodeBytes : 0)) +
                         (kScales ? rows * row_bytes * (Shape::kHasZeros ? 2 : 1) : 0);
  const int first_block = expert * static_cast<int>(CeilDiv(p.k, kBlockK));

  // The group of the next row of scales, and how many codes of it are left.
  const int first_k = begin * Shape::kBlocks * kBlockK;
  int group = min(static_cast<int>(p.of_group.Quotient(first_k)), p.groups - 1);
  int left = static_cast<int>(
      min(static_cast<int64_t>(group + 1) * p.group_size - first_k, int64_t{INT_MAX}));
  const auto next_group = [&](int codes) {  // of which the next row is
    const bool next = left <= 0 && group + 1 < p.groups;
    if (next) {
      ++group;
      left += p.group_size;
    }
    left -= codes;
    return next;
  };
  const int64_t first_row = static_cast<int64_t>(expert) * p.groups;
  const T* scales = static_cast<const T*>(p.scales) + (first_row + group) * p.n + n0;
  const T* zeros = static_cast<const T*>(p.zeros) + (first_row + group) * p.n + n0;

  // First all that needs no barrier.
  uint64_t weight_policy = p.weight_policy;
  Hold<true>(group), Hold<true>(left), Hold<true>(n0), Hold<true>(m0), Hold<true>(weight_policy);
  Hold<true>(shared);
  // The first producer has initialised the barriers; the others wait for that.
  if constexpr (kCodes)
    ptx::NamedBarrierArrive(1, Shape::kReaders);  // S7
  else
    ptx::NamedBarrier(1, Shape::kReaders);  // S7
  if (!ptx::ElectOne()) return;
  int slot = 0;
  uint32_t parity = 1;
  bool refills = false;
#pragma unroll 1
  for (int chunk = begin; chunk < end; ++chunk) {
    const uint32_t full = Shape::Full(shared, slot);
    if (refills) ptx::MbarrierWait(Shape::Empty(shared, slot), parity);  // S2
    const bool has_shared = !Shape::kDeals || chunk % 2 == rank;
    ptx::MbarrierArriveExpectTx(
        full, kCodes && !has_shared ? bytes - Shape::kBlocks * Shape::kSharedCodeBytes : bytes);
    if constexpr (kCodes) {
      const uint32_t codes =
          shared + Shape::kCodeOffset + slot * (Shape::kBlocks * Shape::kCodeBytes);
      const int block = first_block + chunk * Shape::kBlocks;
      if (has_shared) {
        ptx::TensorLoad3d(codes, &maps.codes, 0, n0 / kBlockN, block, full, weight_policy);
      } else {
        const int first_row = rank == 0 ? 0 : 64;
        for (int b = 0; b < Shape::kBlocks; ++b)
          ptx::TensorLoad3d(codes + b * Shape::kCodeBytes + first_row / kBlockN * kBlockBytes,
                            &maps.own_codes, 0, (n0 + first_row) / kBlockN, block + b, full,
                            weight_policy);
      }
    }
    if constexpr (kX) {
      const uint32_t x = shared + Shape::kXOffset + slot * (Shape::kBlocks * Shape::kXBytes);
      if (p.x_in_blocks) {
        ptx::TensorLoad3d(x, &maps.x, 0, m0, chunk * Shape::kBlocks, full, kEvictLast);
      } else {
        for (int b = 0; b < Shape::kBlocks; ++b)
          ptx::TensorLoad2d(x + b * Shape::kXBytes, &maps.x, (chunk * Shape::kBlocks + b) * kBlockK,
                            m0, full, kEvictLast);
      }
    }
    uint32_t row_at = shared + slot * (Shape::kScaleRows * Shape::kRowBytes);
    if constexpr (kScales && kBoxes) {
      if (rows == 1) next_group(Shape::kBlocks * kBlockK);
      const int row = static_cast<int>(first_row) + (rows == 1 ? group : chunk * rows);
      ptx::TensorLoad2d(row_at + Shape::kScaleOffset, &maps.scales, n0, row, full, weight_policy);
      if constexpr (Shape::kHasZeros)
        ptx::TensorLoad2d(row_at + Shape::kZeroOffset, &maps.zeros, n0, row, full, weight_policy);
    } else if constexpr (kScales) {
#pragma unroll 1
      for (int row = 0; row < rows; ++row) {
        // Codes beyond K meet zeros of x; they take the last group's scale.
        if (next_group(32 << run_shift)) {
          scales += p.n;
          zeros += p.n;
        }
        if (Shape::kDeals && row_bytes == 0) continue;
        ptx::BulkLoad(row_at + Shape::kScaleOffset, scales, row_bytes, full, weight_policy);
        if constexpr (Shape::kHasZeros)
          ptx::BulkLoad(row_at + Shape::kZeroOffset, zeros, row_bytes, full, weight_policy);
        row_at += Shape::kRowBytes;
      }
    }
    if (++slot == Shape::kStages) {
      slot = 0;
      parity ^= 1;
      refills = true;
    }
  }
}

// One consumer thread's way through the stages, of which it takes every kStride-th.
template <typename T, typename Shape, int kStride>
struct Consumer {
  using Maker = WeightMaker<T, Shape::kHasZeros, !Shape::kFolds, Shape::kTellsScales>;
  using Factors = typename Maker::Factors;
  static constexpr int kBlocks = Shape::kBlocks, kTileM = Shape::kTileM;
  static constexpr int kBatch = Shape::kBatch, kBuffers = Shape::kBuffers;

  int start;
  // Of stage `start`, its first:
  uint64_t x;       // the descriptor of x
  uint32_t codes;   // the lane's 16 bytes of the first block
  uint32_t scales;  // the scale of its row, of registers 0 and 2 of A; the others hold row + 8
  uint32_t full;    // the barrier
  bool releases;    // arrives at empty[]
  uint32_t parity = 0;
  float acc[kTileM / 2] = {};
  uint32_t a[kBuffers][kBatch][4];  // A fragments: a register set for each k16 step

  __device__ inline Factors LoadFactors(int slot, int part) {
    const uint32_t row = scales + (slot * Shape::kScaleRows + part) * Shape::kRowBytes;
    return Maker::Load(row, row + (Shape::kZeroOffset - Shape::kScaleOffset));
  }

  // The lane's codes of a stage, a word for each k16 step.
  struct Codes {
    uint32_t word[4 * kBlocks];
  };

  __device__ inline void LoadCodes(int slot, int block, Codes* c) {
    const uint4 words = ptx::LoadShared128(codes + slot * (kBlocks * Shape::kCodeBytes) +
                                           block * Shape::kCodeBytes);
    c->word[4 * block] = words.x;
    c->word[4 * block + 1] = words.y;
    c->word[4 * block + 2] = words.z;
    c->word[4 * block + 3] = words.w;
  }

  // The descriptor of the stage's x. The compiler would keep those of all stages in registers.
  __device__ inline uint64_t DescribeX(int slot) {
    x = ptx::Opaque(x);
    return x + slot * (kBlocks * Shape::kXBytes / 16);
  }

  // Dequantises batch `number` of a stage into its buffer, which must be free. Every
  // kPart halves of blocks share factors, those of the first of them.
  template <int kPart>
  __device__ inline void DequantizeBatch(int number, const Codes& c, Factors (&f)[2 * kBlocks]) {
    static_assert(!Maker::kByOneFma || kBatch == 2);
    const int step = number * kBatch;
    Maker::Make(c.word + step, step % (2 * kPart) == 0, f[step / 2 / kPart * kPart],
                a[number % kBuffers]);
  }

  // Starts the wgmmas of batch `number`: sums (+)= x * A.
  __device__ inline void StartBatch(int number, uint64_t stage_x, float (&sums)[kTileM / 2],
                                    bool accumulate) {
    uint32_t (&from)[kBatch][4] = a[number % kBuffers];
    ptx::WgmmaFence(from);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int step = number * kBatch + i;
      ptx::Wgmma<T, kTileM>(sums, from[i],
                            stage_x + step / 4 * (Shape::kXBytes / 16) + 2 * (step % 4),
                            accumulate || i > 0);
    }
    ptx::WgmmaCommit();
  }

  // Until the next batch's buffer is free.
  __device__ inline void WaitForBuffer(int number) {  // S3
    ptx::WgmmaWait<kBuffers - 1>();
    ptx::KeepAlive(a[number % kBuffers]);
  }

  __device__ inline void WaitForAll() {  // S3
    ptx::WgmmaWait<0>();
#pragma unroll
    for (int i = 0; i < kBuffers; ++i) ptx::KeepAlive(a[i]);
  }

  __device__ inline void Acquire(int slot) { ptx::MbarrierWait(full + 8 * slot, parity); }  // S1

  __device__ inline void Release(int slot) {  // S2
    if (releases) ptx::MbarrierArrive(full + 8 * (Shape::kStages + slot));
  }

  // acc += scale * sums.
  __device__ inline void Fold(float (&sums)[kTileM / 2], const Factors& f) {
    ptx::Settle(sums);
    const float scale[2] = {static_cast<float>(f.scale.x), static_cast<float>(f.scale.y)};
#pragma unroll
    for (int i = 0; i < kTileM / 2; ++i) acc[i] = fmaf(scale[i / 2 % 2], sums[i], acc[i]);
  }

  // The first kCount blocks of a stage, which is released.
  template <int kPart, int kCount>
  __device__ inline void FoldStage(int slot, float (&sums)[kTileM / 2]) {
    constexpr int kPerBlock = 4 / kBatch, kPerPart = kPart * kPerBlock / 2;
    Codes c;
    Factors f[2 * kBlocks];
    Acquire(slot);
    LoadCodes(slot, 0, &c);
    f[0] = LoadFactors(slot, 0);
    const uint64_t stage_x = DescribeX(slot);
#pragma unroll
    for (int i = 0; i < kCount * kPerBlock; ++i) {
      if (i > 0 && i % kPerPart == 0) {
        f[2] = LoadFactors(slot, 1);
        WaitForAll();
        Fold(sums, f[0]);
      } else if (i % kPerPart >= kBuffers) {
        WaitForBuffer(i);
      }
      DequantizeBatch<kPart>(i, c, f);
      StartBatch(i, stage_x, sums, i % kPerPart > 0);
      if (i == kPerBlock - 1 && kCount == 2) LoadCodes(slot, 1, &c);
    }
    WaitForAll();
    Release(slot);
    Fold(sums, f[kPart == 2 ? 2 * (kCount - 1) : 0]);
  }

  // The first kCount blocks of a stage. The previous one is released once its wgmmas are done.
  template <int kPart, int kCount>
  __device__ inline void ScaleStage(int slot, bool release_previous) {
    constexpr int kPerBlock = 4 / kBatch;
    constexpr int kAtOnce = Shape::kLoadsLate ? 1 : kCount;
    Codes c;
    Factors f[2 * kBlocks];
    const auto load = [&](int block) {
      LoadCodes(slot, block, &c);
#pragma unroll
      for (int i = 2 * block; i < 2 * block + 2; ++i) {
        if (i % kPart == 0) f[i] = LoadFactors(slot, i / kPart);
      }
    };
    Acquire(slot);
#pragma unroll
    for (int block = 0; block < kAtOnce; ++block) load(block);
    const uint64_t stage_x = DescribeX(slot);
#pragma unroll
    for (int i = 0; i < kCount * kPerBlock; ++i) {
      const int next = i / kPerBlock + 1;
      if ((i + 1) % kPerBlock == 0 && next >= kAtOnce && next < kCount) load(next);
      WaitForBuffer(i);
      if (i == kBuffers - 1 && release_previous)  // S2: none but this stage's in flight
        Release((slot > 0 ? slot : Shape::kStages) - kStride);
      DequantizeBatch<kPart>(i, c, f);
      StartBatch(i, stage_x, acc, true);
    }
  }

  // Calls stage(count, slot, is_first) for its stages out of `blocks` blocks, a last one of one
  // block included, with slots counted from its first. Whole rounds of them are unrolled: what
  // depends on the slot is then part of the instructions.
  template <typename Stage>
  __device__ inline void ForEachStage(int blocks, const Stage& stage) {
    constexpr int kRound = Shape::kStages * kBlocks;
    bool is_first = true;
    blocks -= start * kBlocks;
#pragma unroll 1
    for (; blocks >= kRound - (kStride - 1) * kBlocks; blocks -= kRound) {
#pragma unroll
      for (int slot = 0; slot < Shape::kStages; slot += kStride)
        stage(std::integral_constant<int, kBlocks>(), slot, slot == 0 && is_first);
      parity ^= 1;
      is_first = false;
    }
    int slot = 0;
#pragma unroll 1
    for (; blocks >= kBlocks; blocks -= kStride * kBlocks) {
      stage(std::integral_constant<int, kBlocks>(), slot, slot == 0 && is_first);
      slot += kStride;
    }
    if (blocks > 0) stage(std::integral_constant<int, 1>(), slot, slot == 0 && is_first);
  }

  // As Run; kPart is 2 or 4.
  template <int kPart>
  __device__ inline void RunFolded(int blocks) {
    float sums[kTileM / 2];
    ptx::Undefined(sums);
    ForEachStage(blocks, [&](auto count, int slot, bool) { FoldStage<kPart, count>(slot, sums); });
  }

  // Its stages of `blocks` blocks. Runs of kPart x 32 codes lie in one group. The last stage need
  // not be released: nobody waits for it.
  template <int kPart>
  __device__ inline void Run(int blocks) {
    static_assert(4 % (kBatch * kBuffers) == 0);  // a stage begins with the first buffer
#pragma unroll
    for (int i = 0; i < kBuffers * kBatch * 4; ++i) a[i / 4 / kBatch][i / 4 % kBatch][i % 4] = 0;
    ForEachStage(blocks, [&](auto count, int slot, bool is_first) {
      ScaleStage<kPart, count>(slot, !is_first);
    });
    WaitForAll();
    ptx::Settle(acc);
  }
};

// A consumer warp's work: blocks of 16 rows at `block_row`, every kStride-th stage from `start` on.
// `blocks` are those of the CTA's part of K; Finish, of rank `rank`, has the sums at the place that
// `find_place` tells.
template <typename T, typename Shape, int kStride, typename Finish, typename FindPlace>
__device__ __forceinline__ void ConsumeStages(const WgmmaParams& p, uint32_t shared, int start,
                                              int block_row, int blocks, int run_shift, int rank,
                                              const FindPlace& find_place) {
  const int lane = threadIdx.x % 32, first = start * Shape::kBlocks;
  Consumer<T, Shape, kStride> consumer{
      .start = start,
      .x = ptx::DescriptorSwizzle128(shared + Shape::kXOffset + first * Shape::kXBytes),
      .codes = shared + Shape::kCodeOffset + first * Shape::kCodeBytes + block_row * kBlockBytes +
               lane * 16,
      .scales = shared + Shape::kScaleOffset + start * (Shape::kScaleRows * Shape::kRowBytes) +
                (16 * block_row + lane / 4) * 2,
      .full = Shape::Full(shared, start),
      .releases = lane < Shape::kReleasingLanes,
  };
  const auto consume = [&] {
    if constexpr (Shape::kFolds) {
      if (run_shift == 1)
        consumer.template RunFolded<2>(blocks);
      else
        consumer.template RunFolded<4>(blocks);
    } else {
      if (run_shift == 0)
        consumer.template Run<1>(blocks);
      else if (run_shift == 1)
        consumer.template Run<2>(blocks);
      else if constexpr (Shape::kBlocks == 2)
        consumer.template Run<4>(blocks);
    }
    if constexpr (Shape::kSplitK > 1 && Shape::kMeetsLate) ptx::ClusterWait();  // S5
  };
  if constexpr (Shape::kFindsEarly) {
    Finish finish(p, shared, rank, find_place());
    finish.Keep();
    consume();
    finish(p, consumer.acc);
  } else {
    consume();
    Finish(p, shared, rank, find_place())(p, consumer.acc);  // registers are free again
  }
}

// The work of a CTA: rows n0 .. of the expert's weight times tokens m0 .. , which `find` tells it.
template <typename T, typename Shape, typename Find>
__device__ __forceinline__ void GemmTile(const WgmmaMaps& maps, const WgmmaParams& p, int expert,
                                         const Find& find) {
  static_assert(Shape::kCtasPerSm > 0, "too much shared memory");
  extern __shared__ __align__(1024) char storage[];
  const uint32_t shared = ptx::SharedAddress(storage);
  // The shuffle tells the compiler that a warp's threads agree on their role.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  const int rank = blockIdx.x % Shape::kSplitK;
  constexpr int kProducerWarp = Shape::kConsumers / 32, kTeamWarps = Shape::kTeamThreads / 32;
  constexpr int kProducers = Shape::kProducers;
  const uint32_t blocks_k = (static_cast<uint32_t>(p.k) + kBlockK - 1) / kBlockK;
  const uint32_t chunks = (blocks_k + Shape::kBlocks - 1) / Shape::kBlocks;  // less than 2^24
  const int begin = Shape::kDeals ? 0 : static_cast<int>(chunks * rank / Shape::kSplitK);
  const int end = static_cast<int>(Shape::kDeals ? chunks : chunks * (rank + 1) / Shape::kSplitK);
  const int run_shift = min(p.run_shift, Shape::kBlocks == 2 ? 2 : 1);

  const auto find_rows = [&](int* n0, int* m0) {
    find(n0, m0);
    if constexpr (Shape::kDeals) *n0 += rank * Shape::kOwnRows;
  };

  if (warp >= kProducerWarp) {
    int n0, m0;
    find_rows(&n0, &m0);
    if (warp == kProducerWarp) {
      if (ptx::ElectOne()) {
#pragma unroll
        for (int i = 0; i < Shape::kStages; ++i) {
          ptx::MbarrierInit(Shape::Full(shared, i), kProducers);
          const int warps = kTeamWarps - (Shape::kDeals && i % 2 != rank ? 4 : 0);
          ptx::MbarrierInit(Shape::Empty(shared, i), warps * Shape::kReleasingLanes);
        }
        ptx::MbarrierInit(Shape::Received(shared), 1);
        ptx::FenceMbarrierInit();
      }
      __syncwarp();  // for racecheck too, which blames the warp's last lane for the initialisation
    }
    if constexpr (Shape::kSplitK > 1) ptx::ClusterArriveRelaxed();  // S5
    if constexpr (Shape::kReallocate) ptx::ReleaseRegisters<Shape::kProducerRegisters>();
    const auto produce = [&]<bool kCodes, bool kX, bool kScales>() {
      const auto run = [&]<bool kBoxes>() {
        ProduceStages<T, Shape, kCodes, kX, kScales, kBoxes>(maps, p, shared, begin, end, rank,
                                                             expert, n0, m0, run_shift);
      };
      if constexpr (kScales && Shape::kHasScaleBoxes) {
        if (p.scales_in_boxes) return run.template operator()<true>();
      }
      run.template operator()<false>();
    };
    if (warp == kProducerWarp)
      produce.template operator()<true, kProducers == 1, kProducers <= 2>();
    else if (kProducers > 1 && warp == kProducerWarp + 1)
      produce.template operator()<false, true, false>();
    else if (kProducers > 2 && warp == kProducerWarp + 2)
      produce.template operator()<false, false, true>();
    if constexpr (Shape::kSplitK > 1) {
      __syncwarp();
      ptx::ClusterWait();  // S5
    }
    return;
  }

  if constexpr (Shape::kSplitK > 1) ptx::ClusterArriveRelaxed();  // S5
  if constexpr (Shape::kReallocate) ptx::TakeRegisters<Shape::kConsumerRegisters>();
  ptx::NamedBarrier(1, Shape::kReaders);  // S7

  if constexpr (Shape::kSplitK > 1) {
    if (threadIdx.x == 0 && Shape::ChunksOf(rank) > 0)
      ptx::MbarrierArriveExpectTx(
          Shape::Received(shared),
          (Shape::kSplitK - 1) * Shape::ChunksOf(rank) * Shape::kChunkBytes);
    __syncwarp();
    if constexpr (!Shape::kMeetsLate) ptx::ClusterWait();  // S5
  }
  const int blocks = min(end * Shape::kBlocks, static_cast<int>(blocks_k)) -
                     min(begin * Shape::kBlocks, static_cast<int>(blocks_k));
  // Where the sums of a team, or of a warpgroup, are whose first warp and row these are.
  const auto place_at = [&](int team, int first_warp, int first_row) {
    return [=, &find_rows] {
      Place place{.thread = static_cast<int>(threadIdx.x) - 32 * first_warp, .team = team};
      find_rows(&place.n0, &place.m0);
      place.n0 += first_row;
      return place;
    };
  };
  if constexpr (Shape::kDeals) {
    const int shared_group = rank == 0 ? Shape::kOwnRows / 64 : 0;
    if (warp / 4 == shared_group)
      ConsumeStages<T, Shape, 2, FinishFragments<T, Shape>>(
          p, shared, rank, warp, blocks, run_shift, rank,
          place_at(0, 4 * shared_group, 64 * shared_group));
    else
      ConsumeStages<T, Shape, 1, FinishFragments<T, OwnRows<Shape>>>(
          p, shared, 0, warp, blocks, run_shift, 0, place_at(0, 0, 0));
  } else {
    constexpr bool kHasAllSums = Shape::kSplitK == 1 && Shape::kTeams == 1;
    using Finish = std::conditional_t<kHasAllSums, FinishRows<T, Shape>, FinishFragments<T, Shape>>;
    const int team = Shape::kTeams == 1 ? 0 : warp / kTeamWarps, first_warp = team * kTeamWarps;
    ConsumeStages<T, Shape, Shape::kTeams, Finish>(p, shared, team, warp - first_warp, blocks,
                                                   run_shift, rank, place_at(team, first_warp, 0));
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <typename T, typename Shape>
__global__ void __cluster_dims__(Shape::kSplitK, 1, 1)
    __launch_bounds__(Shape::kThreads, Shape::kCtasPerSm)
        GemmWgmma(const __grid_constant__ WgmmaMaps maps, const __grid_constant__ WgmmaParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  GemmTile<T, Shape>(maps, p, 0, [&](int* n0, int* m0) {
    int tile_n, tile_m;
    p.panels.Find(blockIdx.x / Shape::kSplitK, &tile_m, &tile_n);
    *n0 = tile_n * Shape::kTileN;
    *m0 = FirstToken(tile_m * Shape::kTileM, Shape::kTileM, p.m);
  });
#else
  __trap();
#endif
}

// The instantiation for `config`; kernel is nullptr if configs.inc has no such line.
template <typename T, bool kHasZeros, bool kFolds>
WgmmaKernel FindWgmma(const Config& config) {
#define W4A16_DECODE(...)
#define W4A16_PERSISTENT(...)
#define W4A16_CUTLASS(...)
#define W4A16_WGMMA(N, M, STAGES, SPLIT, TEAMS, ...)                                           \
  if constexpr (kFolds ? M <= MostFoldedTokens(std::is_same_v<T, __half>, kHasZeros, TEAMS)    \
                       : !AlwaysFolds(M)) {                                                    \
    if (config.tile_n == N && config.tile_m == M && config.stages == STAGES &&                 \
        config.split_k == SPLIT && config.teams == TEAMS) {                                    \
      using Shape = typename ShapeOfLine<kHasZeros, kFolds, N, M, STAGES, SPLIT, TEAMS>::Type; \
      return {GemmWgmma<T, Shape>, Shape::kBlocks, Shape::kThreads, Shape::kSharedBytes};      \
    }                                                                                          \
  }
#include "configs.inc"
#undef W4A16_DECODE
#undef W4A16_PERSISTENT
#undef W4A16_CUTLASS
#undef W4A16_WGMMA
  return {};
}

template <typename T>
WgmmaKernel FindWgmma(const Config& config, bool has_zeros, bool folds) {
  if (folds)
    return has_zeros ? FindWgmma<T, true, true>(config) : FindWgmma<T, false, true>(config);
  return has_zeros ? FindWgmma<T, true, false>(config) : FindWgmma<T, false, false>(config);
}

WgmmaKernel FindWgmmaF16(const Config& config, bool has_zeros, bool folds);
WgmmaKernel FindWgmmaBf16(const Config& config, bool has_zeros, bool folds);

}  // namespace w4a16
