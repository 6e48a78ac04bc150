// Large M on Hopper: the transposed product with packed weights as wgmma's register operand, by
// CTAs that stay on their SM and take one tile after another.
//
//   out[m, n] = alpha * sum_k x[m, k] * w[k, n] + bias[n]
//   w[k, n] = T((code[k, n] - zero[k / g, n]) * scale[k / g, n])
//
// computed as out^T[N, M] = w^T x^T, accumulated in float32; T rounds to x's type.
//
//                kTileM tokens (wgmma's n)     A tile: kTileN rows of weights by kTileM tokens; in
//               +-------------------------+    the last wave also parts of one
//   rows  0..63 |  consumer warpgroup 0   |    (gemm_persistent.h). A tile is blocks of 64 rows
//        64..   |  consumer warpgroup 1   |    (wgmma's m), dealt to two or three consumer
//         ...   |  warpgroup 0 again ...  |    warpgroups in turn. Warp w of a warpgroup has 16 of
//               +-------------------------+    the rows; the 16 bytes of lane l in a packed block
//                                              are its A fragments of the block's four k16 steps
//                                              (layout.h).
//
//   A further warpgroup gives up its registers; one of its threads, the producer, starts every load
//   and runs ahead, into the next tile while consumers finish the last one.
//   A cluster is kCluster CTAs along N of the same tokens: each loads its share of the x tile for
//   all of them, which spares L2 and power; a large product runs at the power limit.
//
//   A stage holds one packed block along K (64 codes), or two of a part of at most half a tile's
//   tokens:
//     x       128 bytes a token, swizzled             tensor copies, zero-filled
//     codes   kTileN / 16 packed blocks of 512 bytes  bulk copy
//     scales  kTileN values of the block's group      bulk copy
//     zeros   likewise, if kHasZeros
//
//   The end of a tile: accumulators are rounded, transposed by stmatrix into the warpgroup's own
//   staging memory and leave by tensor stores, which run on during the next tile. Before that, the
//   next tile's first steps are dequantised, while the last wgmmas run. float32 output goes
//   straight from registers to memory.
//
// Every element is summed in the order of K by one thread, or by two in the same way (FirstToken);
// its bits depend on neither the schedule nor on timing.
//
// Preconditions (checked by)
//   N % 8 == 0, K % 8 == 0, M, N, K > 0, sm_90                   CanImplement
//   group_size a multiple of 64, or at least K                   CanImplement
//   pointers aligned to 16 bytes                                 CheckOperands
//   number of units fits 31 bits                                 RunPersistent
//
// Synchronisation
//   S1  full[s]: completes when the bytes that this CTA's producer announced for stage s have
//       landed: its own copies and, in a cluster, the other CTAs' shares of x, which may land first
//       (the phase is still held back by the producer's arrival).
//   S2  empty[s]: completes when every consumer warp of every CTA of the cluster has arrived, since
//       a stage's x is written in all of them at once. Lane r < kCluster arrives at rank r for its
//       warp, after the wait that retires the warp's wgmmas on the stage. With W4A16_RACECHECK
//       every lane arrives everywhere, which compute-sanitizer's racecheck can follow.
//   S3  A registers: the two buffers alternate. A buffer is rewritten only after a wait that leaves
//       no wgmmas but those of the other buffer in flight.
//   S4  Staging memory is rewritten only after the thread that starts a warpgroup's stores has
//       waited for the last ones to be read (named barrier 1 + warpgroup); what was staged is
//       fenced to the async proxy before that barrier's next phase, behind which the stores start.
//   S5  No CTA exits before the last cluster barrier: others arrive at its barriers until then.
#pragma once

#include <climits>
#include <utility>

#include "dequant.cuh"
#include "gemm_persistent.h"
#include "kernels.h"
#include "panels.cuh"
#include "ptx_sm90.cuh"

namespace w4a16 {

struct PersistentParams {
  const uint32_t* qweight;
  const void* scales;
  const void* zeros;
  const void* bias;
  void* out;
  int m, n, k;
  int x_rows, x_part_rows;  // of a CTA's box of x
  int blocks_per_group;
  Panels panels;   // of whole units
  Divisor tail_m;  // units of the last waves to a column
  int whole_columns, whole_units, units, tail_tokens, tail_rows;  // PersistentSchedule
  uint64_t x_policy, weight_policy;
  float alpha;
  bool out_is_f32;
};

// x for whole tiles and for parts of tiles; out in boxes of kStoreRows x kStoreTokens.
struct PersistentMaps {
  CUtensorMap x, x_part, out;
};

inline constexpr int kStoreRows = 64, kStoreTokens = 32;

// What the host needs to launch an instantiation.
struct PersistentKernel {
  void (*kernel)(PersistentMaps, PersistentParams);
  int threads;
  int shared_bytes;
};

template <bool kHasZeros_, int kTileN_, int kTileM_, int kStages_, int kCluster_>
struct PersistentShape {
  static constexpr bool kHasZeros = kHasZeros_;
  static constexpr int kTileN = kTileN_, kTileM = kTileM_, kStages = kStages_, kCluster = kCluster_;
  // Blocks of 64 rows, shared out to two or three consumer warpgroups.
  static constexpr int kRowBlocks = kTileN / 64;
  static constexpr int kWarpgroups = WarpgroupsOf(kTileN);
  static constexpr int kMostRows = (kRowBlocks + kWarpgroups - 1) / kWarpgroups;  // of one
  static constexpr int kLeastRows = kRowBlocks / kWarpgroups;                     // of the last one
  static constexpr int kConsumers = 128 * kWarpgroups;
  static constexpr int kThreads = kConsumers + 128;
  static_assert(kTileN % 64 == 0 && kRowBlocks >= 2 && kRowBlocks <= 5);
  static_assert(kTileM % (8 * kCluster) == 0 && kTileM % kStoreTokens == 0 && kStages >= 3);

  // k16 steps whose wgmmas a warpgroup starts at a time. Two leave registers for a second block of
  // rows; four are up to 4% faster where they fit.
  static constexpr int kSteps = kMostRows == 1 ? 4 : 2;
  static constexpr bool kCutsTokens = CutsTokens(kTileN, kTileM);

#if defined(W4A16_RACECHECK)
  static constexpr int kReleasingLanes = 32;
#else
  static constexpr int kReleasingLanes = 1;
#endif
  static constexpr bool kTellsScales = true;  // WeightMaker

  static constexpr int kProducerRegisters = 40;
  static constexpr int kMostRegisters = kWarpgroups == 2 ? 232 : kMostRows == 1 ? 152 : 176;
  static constexpr int kLeastRegisters = kMostRows == kLeastRows ? kMostRegisters : 120;
  static constexpr int kFirstRegisters = 65536 / kThreads / 8 * 8;  // at launch
  static_assert(kMostRegisters > kFirstRegisters &&
                kMostRegisters * (kWarpgroups - 1) + kLeastRegisters + kProducerRegisters <=
                    kFirstRegisters * (kWarpgroups + 1));

  // Blocks of 64 codes to a stage: one, or two of a part of at most half a tile's tokens.
  static constexpr int kPartBlocks = kCutsTokens ? 2 : 1;
  __host__ __device__ static constexpr int BlocksOf(int tokens) {
    return 2 * tokens <= kTileM ? kPartBlocks : 1;
  }
  static constexpr int kXBytes = kTileM * 128;                       // a stage
  static constexpr int kCodeBytes = kTileN / kBlockN * kBlockBytes;  // one block
  static constexpr int kRowBytes = kTileN * 2;                       // one block
  static constexpr int kStageBytes =
      kXBytes + kPartBlocks * (kCodeBytes + kRowBytes * (kHasZeros ? 2 : 1));

  // Staging memory for a whole tile, or for half of it at a time.
  static constexpr int kSharedPerCta = 227 * 1024, kBarrierBytes = 2 * kStages * 8;
  static constexpr int kStagedTokens =
      kStages * kStageBytes + kWarpgroups * 128 * kTileM + kBarrierBytes <= kSharedPerCta
          ? kTileM
          : kTileM / 2;
  static constexpr int kStagedBytes = kStagedTokens * kStoreRows * 2;  // one warpgroup

  static constexpr int kXOffset = 0;
  static constexpr int kStagedOffset = kXOffset + kStages * kXBytes;
  static constexpr int kCodeOffset = kStagedOffset + kWarpgroups * kStagedBytes;
  static constexpr int kScaleOffset = kCodeOffset + kStages * kPartBlocks * kCodeBytes;
  static constexpr int kZeroOffset = kScaleOffset + kStages * kPartBlocks * kRowBytes;
  static constexpr int kBarrierOffset =
      kZeroOffset + (kHasZeros ? kStages * kPartBlocks * kRowBytes : 0);
  static constexpr int kSharedBytes = kBarrierOffset + kBarrierBytes;
  static_assert(kSharedBytes <= kSharedPerCta);

  __device__ static uint32_t Full(uint32_t shared, int slot) {
    return shared + kBarrierOffset + 8 * slot;
  }
  __device__ static uint32_t Empty(uint32_t shared, int slot) {
    return Full(shared, kStages + slot);
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What a CTA does at a time: `tokens` from m0 on, `rows` of weights from n0 on.
struct Unit {
  int n0, m0, tokens, rows;
  int end = 0, expert = 0;  // of a ragged product: rows of x from `end` on are not the expert's
};

template <typename Shape>
__device__ inline Unit UnitOf(const PersistentParams& p, int index, int rank) {
  int row, column;
  if (index < p.whole_units) {
    p.panels.Find(index, &row, &column);
    return {.n0 = (column * Shape::kCluster + rank) * Shape::kTileN,
            .m0 = FirstToken(row * Shape::kTileM, Shape::kTileM, p.m),
            .tokens = Shape::kTileM,
            .rows = Shape::kTileN};
  }
  const int left = index - p.whole_units;
  column = p.tail_m.Quotient(left);
  row = left - column * static_cast<int>(p.tail_m.d);
  const int tokens = Shape::kCutsTokens ? p.tail_tokens : Shape::kTileM;
  const int rows = Shape::kMostRows > 1 ? p.tail_rows * 64 : Shape::kTileN;
  return {.n0 = p.whole_columns * Shape::kCluster * Shape::kTileN +
                (column * Shape::kCluster + rank) * rows,
          .m0 = FirstToken(row * tokens, tokens, p.m),
          .tokens = tokens,
          .rows = rows};
}

// The units of a product, and where their weights are. A ragged product has others
// (ragged_persistent.cuh).
struct DenseUnits {
  static constexpr bool kRagged = false;
  __device__ inline int Count(const PersistentParams& p) const { return p.units; }
  template <typename Shape>
  __device__ inline Unit Of(const PersistentParams& p, int index, int rank) const {
    return UnitOf<Shape>(p, index, rank);
  }
  __device__ inline int64_t QweightWords(const Unit&) const { return 0; }
  __device__ inline int64_t ScaleElements(const Unit&) const { return 0; }
};

// Starts every load of the CTA's units. Runs in one thread.
template <typename T, typename Shape, typename Units>
__device__ inline void ProduceUnits(const PersistentMaps& maps, const PersistentParams& p,
                                    const Units& units, uint32_t shared, int first, int stride,
                                    int rank) {
  const int blocks_k = static_cast<int>(CeilDiv(p.k, kBlockK));
  const int blocks_n = static_cast<int>(CeilDiv(p.n, kBlockN));
  int slot = 0;
  uint32_t parity = 1;  // a fresh barrier passes a wait for the phase before its first
  for (int index = first; index < units.Count(p); index += stride) {
    const Unit unit = units.template Of<Shape>(p, index, rank);
    const bool whole = unit.tokens == Shape::kTileM;
    const int share = unit.tokens / Shape::kCluster;
    const int x_rows = whole ? p.x_rows : p.x_part_rows;
    const CUtensorMap* x_map = whole ? &maps.x : &maps.x_part;
    // The last cluster along N may reach beyond N by whole CTAs.
    const int rows = min(unit.rows, p.n - unit.n0);
    const uint32_t code_bytes =
        min(unit.rows / kBlockN, blocks_n - unit.n0 / kBlockN) * kBlockBytes;
    const uint32_t row_bytes = rows * 2;
    const uint32_t block_bytes =
        Shape::kCluster * x_rows * 128 +
        (rows > 0 ? code_bytes + row_bytes * (Shape::kHasZeros ? 2 : 1) : 0);
    const char* codes = reinterpret_cast<const char*>(p.qweight + units.QweightWords(unit)) +
                        static_cast<int64_t>(unit.n0 / kBlockN) * kBlockBytes;
    int64_t row = unit.n0 + units.ScaleElements(unit);  // of scales and zeros
    int left_in_group = p.blocks_per_group;
    const int last_in_stage = Shape::BlocksOf(unit.tokens) - 1;
#pragma unroll 1
    for (int block = 0; block < blocks_k; ++block) {
      const int inside = block & last_in_stage, place = slot * Shape::kPartBlocks + inside;
      const uint32_t full = Shape::Full(shared, slot);
      if (inside == 0) {
        ptx::MbarrierWait(Shape::Empty(shared, slot), parity);  // S2
        ptx::MbarrierArriveExpectTx(full, min(last_in_stage + 1, blocks_k - block) * block_bytes);
      }
      if (rows > 0) {
        ptx::BulkLoad(shared + Shape::kCodeOffset + place * Shape::kCodeBytes, codes, code_bytes,
                      full, p.weight_policy);
        ptx::BulkLoad(shared + Shape::kScaleOffset + place * Shape::kRowBytes,
                      static_cast<const T*>(p.scales) + row, row_bytes, full, p.weight_policy);
        if constexpr (Shape::kHasZeros)
          ptx::BulkLoad(shared + Shape::kZeroOffset + place * Shape::kRowBytes,
                        static_cast<const T*>(p.zeros) + row, row_bytes, full, p.weight_policy);
      }
      const uint32_t x = shared + Shape::kXOffset + slot * Shape::kXBytes +
                         (inside * Shape::kCluster + rank) * share * 128;
      if constexpr (Shape::kCluster == 1)
        ptx::TensorLoad2d(x, x_map, block * kBlockK, unit.m0, full, p.x_policy);
      else
        ptx::TensorLoad2dMulticast(x, x_map, block * kBlockK, unit.m0 + rank * share, full,
                                   (1 << Shape::kCluster) - 1, p.x_policy);
      codes += static_cast<int64_t>(blocks_n) * kBlockBytes;
      if (--left_in_group == 0) {
        left_in_group = p.blocks_per_group;
        row += p.n;
      }
      if (inside == last_in_stage || block + 1 == blocks_k) {
        if (++slot == Shape::kStages) {
          slot = 0;
          parity ^= 1;
        }
      }
    }
  }
}

// One consumer thread's way through the stages. Its warpgroup owns kRows blocks of 64 rows of a
// unit: its r-th is the unit's block r * kWarpgroups + warpgroup. A stage is taken in parts of
// kSteps k16 steps of 64 rows.
template <typename T, typename Shape>
struct PersistentConsumer {
  using Maker = WeightMaker<T, Shape::kHasZeros, true, Shape::kTellsScales>;
  static constexpr int kSteps = Shape::kSteps, kPer = 4 / kSteps;  // parts of 64 rows
  // With two blocks of rows, codes are loaded before the wgmmas that hide their dequantisation, and
  // sums start from 0: the compiler would keep registers for values that were never set. With one,
  // neither is as fast (1%).
  static constexpr bool kAhead = Shape::kMostRows > 1, kClears = kAhead;

  uint32_t shared;
  uint32_t codes;   // the lane's 16 bytes of the block of stage 0
  uint32_t scales;  // the scale of its row, of registers a[][0] and a[][2]; the others hold row + 8
  uint32_t empty;   // empty[0] of the CTA that the lane tells
  bool releases;    // whether it tells any
  int slot = 0, previous = 0;
  uint32_t parity = 0;
  uint32_t a[2][kSteps][4];  // of even parts and of odd parts
  uint32_t word[4];          // codes, scales and zeros of the 64 rows being dequantised
  typename Maker::Factors factors;

  __device__ inline void Acquire() { ptx::MbarrierWait(Shape::Full(shared, slot), parity); }  // S1

  template <int kBlock, int kRow>
  __device__ inline void Load() {
    const int place = slot * Shape::kPartBlocks + kBlock;
    const uint4 words = ptx::LoadShared128(codes + place * Shape::kCodeBytes +
                                           kRow * Shape::kWarpgroups * 4 * kBlockBytes);
    word[0] = words.x;
    word[1] = words.y;
    word[2] = words.z;
    word[3] = words.w;
    const uint32_t row = scales + place * Shape::kRowBytes + kRow * Shape::kWarpgroups * 128;
    factors = Maker::Load(row, row + (Shape::kZeroOffset - Shape::kScaleOffset));
  }

  // Makes a[kBuffer] of the steps from kStep on of what was loaded.
  template <int kBuffer, int kStep>
  __device__ inline void Dequantize() {
    Maker::Make(word + kStep, kStep == 0, factors, a[kBuffer]);
  }

  __device__ inline void Advance() {
    previous = slot;
    if (++slot == Shape::kStages) {
      slot = 0;
      parity ^= 1;
    }
  }

  __device__ inline void Release(int stage) {
#if defined(W4A16_RACECHECK)
    for (int rank = 0; rank < Shape::kCluster; ++rank)
      ptx::MbarrierArriveCluster(ptx::MapShared(Shape::Empty(shared, stage), rank));  // S2
#else
    if (releases) ptx::MbarrierArriveCluster(empty + 8 * stage);  // S2
#endif
  }

  // Readies the first part of the first unit.
  __device__ inline void Begin() {
    Acquire();
    Load<0, 0>();
    Dequantize<0, 0>();
  }

  // Takes parts kPart to kParts of the current stage, of which a[kBuffer] holds the first: starts
  // the wgmmas of each and, while they run, dequantises the next; after the last that of the next
  // stage, if there are `more`.
  template <int kRows, int kTokens, int kBuffer, int kPart, int kParts>
  __device__ inline void Stage(float (&acc)[kRows][kTokens / 2], bool first, bool more) {
    constexpr int kRow = kPart / kPer % kRows, kBlock = kPart / kPer / kRows;
    constexpr int kStep = kPart % kPer * kSteps, kNext = kPart + 1;
    const uint64_t x = ptx::DescriptorSwizzle128(shared + Shape::kXOffset + slot * Shape::kXBytes +
                                                 kBlock * kTokens * 128) +
                       2 * kStep;
    const int retired = previous;
    const auto next = [&] {
      if constexpr (kNext == kParts) {
        Advance();
        if (more) {
          Acquire();
          Load<0, 0>();
        }
      } else if constexpr (kNext % kPer == 0) {
        Load<kNext / kPer / kRows, kNext / kPer % kRows>();
      }
    };
    if constexpr (kAhead) next();
    ptx::WgmmaFence(a[kBuffer]);
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      ptx::Wgmma<T, kTokens>(acc[kRow], a[kBuffer][step], x + 2 * step,
                             kClears || kBlock > 0 || kStep + step > 0 || !first);
    ptx::WgmmaCommit();
    ptx::WgmmaWait<1>();  // S3
    ptx::KeepAlive(a[kBuffer ^ 1]);
    if (kPart == 0 && !first) Release(retired);
    if constexpr (!kAhead) next();
    if constexpr (kNext < kParts) {
      Dequantize<kBuffer ^ 1, kNext % kPer * kSteps>();
      Stage<kRows, kTokens, kBuffer ^ 1, kNext, kParts>(acc, first, more);
    } else {
      if (more) Dequantize<kBuffer ^ 1, 0>();
    }
  }

  // A unit: `blocks` blocks, of which a[0] holds the first part. Leaves that of the next unit in
  // a[0], if there are `more`.
  template <int kRows, int kTokens>
  __device__ inline void Run(float (&acc)[kRows][kTokens / 2], int blocks, bool more) {
    constexpr int kBlocks = Shape::BlocksOf(kTokens);
    constexpr int kParts = kPer * kRows * kBlocks;  // of a stage
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kClears) {
#pragma unroll
        for (float& sum : acc[r]) sum = 0.0f;
      } else {
        ptx::Undefined(acc[r]);
      }
    }
    if constexpr (kClears) {
#pragma unroll
      for (int i = 0; i < 4 * kSteps; ++i) a[1][i / 4][i % 4] = 0;
    }
    int i = 0;
    if constexpr (kParts % 2 == 0) {
#pragma unroll 1
      for (; i + kBlocks <= blocks; i += kBlocks)
        Stage<kRows, kTokens, 0, 0, kParts>(acc, i == 0, i + kBlocks < blocks || more);
    } else {
      for (; i + 2 <= blocks; i += 2) {
        Stage<kRows, kTokens, 0, 0, kParts>(acc, i == 0, true);
        Stage<kRows, kTokens, 1, 0, kParts>(acc, false, i + 2 < blocks || more);
      }
    }
    if constexpr (kPer == 1) {
      if (i < blocks) Stage<kRows, kTokens, 0, 0, kRows>(acc, i == 0, more);
    }
    ptx::WgmmaWait<0>();
    ptx::KeepAlive(a[0]);
    ptx::KeepAlive(a[1]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) ptx::Settle(acc[r]);
    Release(previous);
    if constexpr (kPer == 1) {
      if (i < blocks) {
#pragma unroll
        for (int j = 0; j < 16; ++j) a[0][j / 4][j % 4] = a[1][j / 4][j % 4];
      }
    }
  }
};

// From a warpgroup's accumulators of 64 rows from first_n on to `out`, tokens m0 to `end`. kRagged:
// tokens from `end` on are others'.
template <typename T, typename Shape, int kTokens, bool kRagged>
__device__ inline void StoreUnit(const PersistentMaps& maps, const PersistentParams& p,
                                 const float (&acc)[kTokens / 2], uint32_t shared, int first_n,
                                 int m0, int end) {
  constexpr float kUnit = PersistentConsumer<T, Shape>::Maker::kUnit;
  const float alpha = p.alpha * kUnit;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int n = first_n + 16 * warp + lane / 4;
  float bias[2] = {-0.0f, -0.0f};  // adding -0 changes nothing
  if (p.bias != nullptr) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (n + 8 * r < p.n) bias[r] = static_cast<float>(static_cast<const T*>(p.bias)[n + 8 * r]);
    }
  }
  if (p.out_is_f32) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int token = m0 + 8 * (i / 4) + 2 * (lane % 4) + (i & 1), r = (i >> 1) & 1;
      if (token < (kRagged ? end : p.m) && n + 8 * r < p.n)
        static_cast<float*>(p.out)[static_cast<int64_t>(token) * p.n + n + 8 * r] =
            fmaf(alpha, acc[i], bias[r]);
    }
    return;
  }
  // [token][row], 128 bytes a token, in the tensor copies' 128-byte swizzle: the 16-byte pieces of
  // a token are permuted by token % 8, which also spreads stmatrix over all banks.
  const uint32_t staged = shared + Shape::kStagedOffset + group * Shape::kStagedBytes;
  const uint32_t mine =
      staged + (8 * (lane / 16) + lane % 8) * 128 + (((2 * warp + lane / 8 % 2) ^ (lane % 8)) * 16);
  constexpr int kTokensAtOnce = kTokens <= Shape::kStagedTokens ? kTokens : kTokens / 2;
  static_assert(kTokensAtOnce <= Shape::kStagedTokens && kTokensAtOnce >= kStoreTokens);
  const bool stores = threadIdx.x % 128 == 0;
#pragma unroll
  for (int begin = 0; begin < kTokens; begin += kTokensAtOnce) {
    if (stores) ptx::BulkWaitRead<0>();
    ptx::NamedBarrier(1 + group, 128);  // S4
    const auto stage = [&]<bool kPlain>() {
#pragma unroll
      for (int next = 0; next < kTokensAtOnce; next += 16) {
        const int token = min(next, kTokensAtOnce - 16);
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &acc[(begin + token) / 2 + 2 * i];
          float lo = pair[0], hi = pair[1];
          if constexpr (!kPlain) {
            lo = fmaf(alpha, lo, bias[i & 1]);
            hi = fmaf(alpha, hi, bias[i & 1]);
          } else if constexpr (kUnit != 1.0f) {
            lo *= kUnit;
            hi *= kUnit;
          }
          v[i] = Pair<T>::Round(lo, hi);
        }
        ptx::StoreMatrix4Transposed(mine + token * 128, v[0], v[1], v[2], v[3]);
      }
    };
    if (p.alpha == 1.0f && p.bias == nullptr)
      stage.template operator()<true>();
    else
      stage.template operator()<false>();
    ptx::FenceProxyAsync();
    ptx::NamedBarrier(1 + group, 128);  // S4
    if (stores && first_n < p.n) {
      for (int next = 0; next < kTokensAtOnce; next += kStoreTokens) {
        const int token = min(next, kTokensAtOnce - kStoreTokens);
        if (!kRagged || m0 + begin + token + kStoreTokens <= end)
          ptx::TensorStore2d(&maps.out, staged + token * 128, first_n, m0 + begin + token);
      }
      ptx::BulkCommit();
    }
    if constexpr (kRagged) {  // the box that the end cuts
      const int whole = max(end - m0 - begin, 0) / kStoreTokens * kStoreTokens;
      const int tokens = min(end - m0 - begin, kTokensAtOnce);
      for (int i = threadIdx.x % 128 + whole * 8; i < tokens * 8; i += 128) {
        const int token = i / 8, piece = i % 8, n8 = first_n + 8 * piece;
        if (n8 >= p.n) continue;
        const uint4 v = ptx::LoadShared128(staged + token * 128 + ((piece ^ (token % 8)) * 16));
        T* const to = static_cast<T*>(p.out) + static_cast<int64_t>(m0 + begin + token) * p.n + n8;
        *reinterpret_cast<uint4*>(to) = v;
      }
    }
  }
}

// The part of a consumer warp in the CTA's units; its warpgroup owns kMine blocks of 64 rows of a
// whole tile.
template <typename T, typename Shape, int kMine, typename Units>
__device__ inline void ConsumeUnits(const PersistentMaps& maps, const PersistentParams& p,
                                    const Units& units, uint32_t shared, int first, int stride,
                                    int rank, int warp) {
  const int lane = threadIdx.x % 32, told = lane < Shape::kCluster ? lane : 0, group = warp / 4;
  const int blocks = static_cast<int>(CeilDiv(p.k, kBlockK));
  int index = first;
  PersistentConsumer<T, Shape> consumer{
      .shared = shared,
      .codes = shared + Shape::kCodeOffset + warp * kBlockBytes + lane * 16,
      .scales = shared + Shape::kScaleOffset + (16 * warp + lane / 4) * 2,
      .empty = ptx::MapShared(Shape::Empty(shared, 0), told),
      .releases = lane < Shape::kCluster,
  };
  if (!Units::kRagged || index < units.Count(p)) consumer.Begin();
  const auto run = [&]<int kRows, int kTokens>(int end) {
    for (; index < end; index += stride) {
      float acc[kRows][kTokens / 2];
      consumer.template Run<kRows, kTokens>(acc, blocks, index + stride < units.Count(p));
      const Unit unit = units.template Of<Shape>(p, index, rank);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        StoreUnit<T, Shape, kTokens, Units::kRagged>(
            maps, p, acc[r], shared, unit.n0 + 64 * (r * Shape::kWarpgroups + group), unit.m0,
            unit.end);
    }
  };
  if constexpr (Units::kRagged) {
    run.template operator()<kMine, Shape::kTileM>(units.Count(p));
  } else if constexpr (Shape::kMostRows == 1) {
    run.template operator()<1, Shape::kTileM>(p.whole_units);
    if constexpr (Shape::kCutsTokens) {
      const auto run_tail = [&]<int kTokens>() {
        if constexpr (ClusterShares(kTokens, Shape::kCluster)) {
          if (p.tail_tokens == kTokens) run.template operator()<1, kTokens>(p.units);
        }
      };
      [&]<size_t... kI>(std::index_sequence<kI...>) {
        (run_tail.template operator()<kTailTokens[kI]>(), ...);
      }(std::make_index_sequence<kNumTailTokens>());
    }
  } else {
    // The warpgroup's blocks of rows of a unit of the last wave: as many as of a whole tile, or
    // one.
    const int rows = (p.tail_rows - group + Shape::kWarpgroups - 1) / Shape::kWarpgroups;
    run.template operator()<kMine, Shape::kTileM>(rows == kMine ? p.units : p.whole_units);
    if constexpr (kMine > 1) run.template operator()<1, Shape::kTileM>(p.units);
  }
  if (threadIdx.x % 128 == 0) ptx::BulkWaitRead<0>();
  __syncwarp();
}

// By one thread, which another barrier follows.
template <typename Shape>
__device__ inline void InitBarriers(const PersistentMaps& maps, uint32_t shared) {
  ptx::PrefetchTensorMap(&maps.x);
  ptx::PrefetchTensorMap(&maps.x_part);
  ptx::PrefetchTensorMap(&maps.out);
  for (int i = 0; i < Shape::kStages; ++i) {
    ptx::MbarrierInit(Shape::Full(shared, i), 1);
    ptx::MbarrierInit(Shape::Empty(shared, i),
                      Shape::kConsumers / 32 * Shape::kReleasingLanes * Shape::kCluster);
  }
  ptx::FenceMbarrierInit();
}

// A warp's part in the CTA's units.
template <typename T, typename Shape, typename Units>
__device__ inline void RunUnits(const PersistentMaps& maps, const PersistentParams& p,
                                const Units& units, uint32_t shared, int warp) {
  const int rank = Shape::kCluster == 1 ? 0 : ptx::ClusterRank();
  const int first = blockIdx.x / Shape::kCluster, stride = gridDim.x / Shape::kCluster;
  if (warp >= Shape::kConsumers / 32) {
    ptx::ReleaseRegisters<Shape::kProducerRegisters>();
    if (warp == Shape::kConsumers / 32 && ptx::ElectOne())
      ProduceUnits<T, Shape>(maps, p, units, shared, first, stride, rank);
    __syncwarp();
  } else {
    if (Shape::kMostRows == Shape::kLeastRows || warp < Shape::kConsumers / 32 - 4) {
      ptx::TakeRegisters<Shape::kMostRegisters>();
      ConsumeUnits<T, Shape, Shape::kMostRows>(maps, p, units, shared, first, stride, rank, warp);
    } else {
      if constexpr (Shape::kLeastRegisters < Shape::kFirstRegisters)
        ptx::ReleaseRegisters<Shape::kLeastRegisters>();
      else
        ptx::TakeRegisters<Shape::kLeastRegisters>();
      ConsumeUnits<T, Shape, Shape::kLeastRows>(maps, p, units, shared, first, stride, rank, warp);
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    GemmPersistent(const __grid_constant__ PersistentMaps maps,
                   const __grid_constant__ PersistentParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char storage[];
  const uint32_t shared = ptx::SharedAddress(storage);
  // The shuffle tells the compiler that a warp's threads agree on their role.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  if (threadIdx.x == Shape::kConsumers) InitBarriers<Shape>(maps, shared);
  if constexpr (Shape::kCluster == 1) {
    __syncthreads();
  } else {
    ptx::ClusterArrive();
    ptx::ClusterWait();
  }
  RunUnits<T, Shape>(maps, p, DenseUnits{}, shared, warp);
  if constexpr (Shape::kCluster > 1) {
    ptx::ClusterArrive();  // S5
    ptx::ClusterWait();
  }
#else
  __trap();
#endif
}

// The instantiation for `config`; kernel is nullptr if configs.inc has no such line.
template <typename T>
PersistentKernel FindPersistent(const Config& config, bool has_zeros) {
#define W4A16_DECODE(...)
#define W4A16_WGMMA(...)
#define W4A16_CUTLASS(...)
#define W4A16_PERSISTENT(N, M, STAGES, CLUSTER, ...)                                               \
  if (config.tile_n == N && config.tile_m == M && config.stages == STAGES &&                       \
      config.cluster_n == CLUSTER) {                                                               \
    using Plain = PersistentShape<false, N, M, STAGES, CLUSTER>;                                   \
    using Zeros = PersistentShape<true, N, M, STAGES, CLUSTER>;                                    \
    return has_zeros                                                                               \
               ? PersistentKernel{GemmPersistent<T, Zeros>, Zeros::kThreads, Zeros::kSharedBytes}  \
               : PersistentKernel{GemmPersistent<T, Plain>, Plain::kThreads, Plain::kSharedBytes}; \
  }
#include "configs.inc"
#undef W4A16_DECODE
#undef W4A16_WGMMA
#undef W4A16_CUTLASS
#undef W4A16_PERSISTENT
  return {};
}

PersistentKernel FindPersistentF16(const Config& config, bool has_zeros);
PersistentKernel FindPersistentBf16(const Config& config, bool has_zeros);

}  // namespace w4a16
