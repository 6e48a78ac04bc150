// What a wgmma kernel is given, and how it lays out its threads, registers and shared memory:
// gemm_wgmma.cuh has the picture.
#pragma once

#include <cuda.h>

#include "../config.h"
#include "gemm_wgmma.h"
#include "panels.cuh"

namespace w4a16 {

// In the order in which they are needed.
struct WgmmaParams {
  int k;
  Panels panels;
  int run_shift;   // runs of 32 << run_shift codes, aligned to their length, lie in one group
  int group_size;  // at most K rounded up to a multiple of 32
  Divisor of_group;
  uint64_t weight_policy;
  int groups;
  int n;
  int x_rows;                         // of a box of x
  bool x_in_blocks, scales_in_boxes;  // WgmmaMaps
  bool out_is_f32;
  const void* scales;
  const void* zeros;
  int m;
  float alpha;
  const void* bias;
  void* out;
};

// x in boxes of x_rows tokens x 64 values, or of kBlocks of these, one after the other, if that
// makes whole stages (K % 64 == 0, x_rows == kTileM); packed blocks in boxes of kRows / 16 x
// kBlocks, or of kOwnRows / 16 x 1; scales and zeros, unless bulk copies bring them row by row, in
// boxes of kRows x as many groups as a stage meets. What lies outside reads as zero. Codes, scales
// and zeros are those of all experts, one after the other.
struct WgmmaMaps {
  CUtensorMap x, codes, own_codes, scales, zeros;
};

template <bool kHasZeros_, bool kFolds_, int kTileN_, int kTileM_, int kStages_, int kSplitK_,
          int kTeams_>
struct WgmmaShape {
  static constexpr bool kHasZeros = kHasZeros_;
  static constexpr bool kFolds = kFolds_;  // scales sums, not weights (Consumer)
  static constexpr int kTileN = kTileN_, kTileM = kTileM_, kStages = kStages_;
  static constexpr int kSplitK = kSplitK_, kTeams = kTeams_;
  static_assert(kTileN % 64 == 0 && kTileM % 8 == 0);
  static_assert(kStages % kTeams == 0 && kStages >= 2 * kTeams);  // S2

  // Rows of the tile that a CTA works at, and of these, what it does not share with the other.
  static constexpr bool kDeals = DealsRows(kTileN, kSplitK);
  static constexpr int kRows = RowsOfCta(kTileN, kSplitK);
  static constexpr int kOwnRows = kDeals ? kRows - 64 : kRows;
  static_assert(!kDeals || (kTileN % 128 == 64 && kTeams == 1 && kStages % 2 == 0));

  static constexpr int kTeamThreads = 2 * kRows;  // a warpgroup for every 64 rows
  static constexpr int kConsumers = kTeams * kTeamThreads;

  // k16 steps whose wgmmas a consumer starts together, from each of its buffers of A in turn.
  static constexpr int kBatch = kFolds && kTeams > 1 ? 4 : 2, kBuffers = 2;
  // Of a consumer thread: accumulators, A, addresses.
  static constexpr int kRegisters =
      (kFolds ? kTileM : kTileM / 2 + 24) + 4 * kBatch * kBuffers + 24;

  // Registers are shared out per quarter of an SM, so a lone producer warp costs as much as four.
  // If consumers need more than an even share, a producer warpgroup gives up its registers.
  static constexpr int kProducerRegisters = 32;
  static constexpr int LaunchRegisters(int ctas) {
    return 65536 / ctas / (kConsumers + 128) / 8 * 8;
  }
  static constexpr int ConsumerRegisters(int ctas) {
    const int free = (LaunchRegisters(ctas) * (kConsumers + 128) - kProducerRegisters * 128) /
                     kConsumers / 8 * 8;
    return free < 240 ? free : 240;
  }
#if defined(W4A16_RACECHECK)
  static constexpr bool kForRacecheck = true;
#else
  static constexpr bool kForRacecheck = false;
#endif
  static constexpr int kReleasingLanes = kForRacecheck ? 32 : 1;  // S2
  static constexpr bool kMeetsLate = kForRacecheck;               // S5

  // Blocks of 64 codes to a stage: small token tiles need larger copies to keep the memory busy.
  static constexpr int kBlocks = kTileM <= 64 ? 2 : 1;
  static constexpr int kScaleRows = 2 * kBlocks;  // one for every 32 codes at most
  static constexpr bool kHasScaleBoxes = HasScaleBoxes(kRows);

  static constexpr int kXBytes = kTileM * 128;                         // one block
  static constexpr int kCodeBytes = kRows / kBlockN * kBlockBytes;     // one block
  static constexpr int kSharedCodeBytes = 64 / kBlockN * kBlockBytes;  // of them, what CTAs share
  static constexpr int kRowBytes = kRows * 2;                          // one row of scales
  static constexpr int kXOffset = 0;
  static constexpr int kCodeOffset = kXOffset + kStages * kBlocks * kXBytes;
  static constexpr int kScaleOffset = kCodeOffset + kStages * kBlocks * kCodeBytes;
  static constexpr int kZeroOffset = kScaleOffset + kStages * kScaleRows * kRowBytes;
  static constexpr int kPipelineBytes =
      kZeroOffset + (kHasZeros ? kStages * kScaleRows * kRowBytes : 0);

  // Each rank of the cluster finishes a slice of the tile's chunks of eight tokens, of which each
  // team sums every kTeams-th; the other ranks' sums of it come to its inbox.
  static constexpr int kChunks = kTileM / 8;
  static constexpr int kSliceChunks = (kChunks + kSplitK - 1) / kSplitK;
  static constexpr int kOwners = (kChunks + kSliceChunks - 1) / kSliceChunks;  // of slices
  static constexpr int kTeamChunks = (kSliceChunks + kTeams - 1) / kTeams;
  static constexpr int kSharers = kDeals ? 128 : kTeamThreads;  // threads of one team
  static constexpr int kChunkBytes = kSharers * 16;             // four sums a thread
  static constexpr int kRankBytes = kTeamChunks * kTeams * kChunkBytes;
  static constexpr int kInboxOffset = kPipelineBytes;
  static_assert(kTeams == 1 || kOwners * kRankBytes <= kPipelineBytes);
  __device__ static int ChunksOf(int rank) {
    return max(0, min(kSliceChunks, kChunks - rank * kSliceChunks));
  }

  static constexpr int kBarrierOffset = kInboxOffset + (kSplitK - 1) * kRankBytes;
  static constexpr int kSharedBytes = kBarrierOffset + (2 * kStages + 1) * 8;

  __device__ static uint32_t Full(uint32_t shared, int slot) {
    return shared + kBarrierOffset + 8 * slot;
  }
  __device__ static uint32_t Empty(uint32_t shared, int slot) {
    return Full(shared, kStages + slot);
  }
  __device__ static uint32_t Received(uint32_t shared) { return Full(shared, 2 * kStages); }

  static constexpr int kSharedPerSm = 227 * 1024, kReserved = 1024;
  // Several CTAs of small tiles hide each other's start and end.
  static constexpr bool Fits(int ctas, int producers) {
    const int warps_per_quarter = (ctas * (kConsumers / 32 + producers) + 3) / 4;
    return ctas * (kSharedBytes + kReserved) <= kSharedPerSm + kReserved &&
           (ctas == 1 || (kFolds ? LaunchRegisters(ctas) >= kProducerRegisters &&
                                       ConsumerRegisters(ctas) >= kRegisters
                                 : warps_per_quarter * 32 * kRegisters <= 65536 / 4));
  }
  static constexpr int MostCtas(int ctas) {
    return ctas == 0 || Fits(ctas, 1) ? ctas : MostCtas(ctas - 1);
  }
  static constexpr int kCtasPerSm = MostCtas(kFolds ? 6 : 4);
  static constexpr int kRegisterCtas = kFolds ? kCtasPerSm : 1;
  // What a consumer needs to tell large scales from others (WeightMaker), which it does where it
  // has as many: with less, ptxas serialises wgmmas.
  static constexpr int kTellingRegisters = kRegisters + 16;
  static constexpr bool kReallocate = LaunchRegisters(kRegisterCtas) < kRegisters ||
                                      (!kFolds && LaunchRegisters(1) < kTellingRegisters &&
                                       ConsumerRegisters(1) >= kTellingRegisters);
  static constexpr int kConsumerRegisters = ConsumerRegisters(kRegisterCtas);
  // One warp starts copies of one kind faster than of all three. It pays (1 to 4%) where stages are
  // taken quickly: by teams, or of one block of not too many tokens.
  static constexpr bool kManyProducers =
      kTeams > 1 || (kBlocks == 1 && kTileM <= 128 && !kReallocate);
  static constexpr int kProducers = !kManyProducers                      ? 1
                                    : kReallocate || Fits(kCtasPerSm, 3) ? 3
                                    : Fits(kCtasPerSm, 2)                ? 2
                                                                         : 1;
  static constexpr int kThreads = kConsumers + (kReallocate ? 128 : 32 * kProducers);
  static constexpr int kReaders = kConsumers + 32 * kProducers;  // of barriers

  // Whether too few registers are left to load the codes of a stage's blocks at once.
  static constexpr bool kLoadsLate = kHasZeros || (kRows == 256 && kTileM == 64);
  static constexpr int kWarpsPerQuarter = (kCtasPerSm * kThreads / 32 + 3) / 4;
  static constexpr bool kTellsScales =
      (kReallocate ? kConsumerRegisters : 512 / kWarpsPerQuarter / 8 * 8) >= kTellingRegisters;
  // Whether registers are left for what a consumer needs after its last product: it finds it while
  // it waits for the first stage.
  static constexpr bool kFindsEarly =
      (kReallocate ? kConsumerRegisters : 65536 / kCtasPerSm / kThreads / 8 * 8) >=
      kRegisters + (kHasZeros ? 32 : 24);
};

// How those finish who have all sums of rows that a cluster deals.
template <typename Shape>
struct OwnRows : Shape {
  static constexpr int kSplitK = 1, kOwners = 1;
  static constexpr int kSliceChunks = Shape::kChunks, kTeamChunks = Shape::kChunks;
  __device__ static int ChunksOf(int) { return Shape::kChunks; }
};

// The shape of a line of configs.inc. With zeros each team has a stage less if that keeps as many
// CTAs on an SM as there are without.
template <bool kHasZeros, bool kFolds, int kTileN, int kTileM, int kStages, int kSplitK, int kTeams>
struct ShapeOfLine {
  static constexpr int kTurns = DealsRows(kTileN, kSplitK) ? 2 : kTeams;
  template <bool kZeros, int kLess>
  using Candidate =
      WgmmaShape<kZeros, kFolds, kTileN, kTileM, kStages - kLess * kTurns, kSplitK, kTeams>;
  static constexpr int kCtas = Candidate<false, 0>::kCtasPerSm;
  static constexpr int kLess =
      Candidate<kHasZeros, 0>::kCtasPerSm < kCtas && Candidate<kHasZeros, 1>::kCtasPerSm == kCtas;
  using Type = Candidate<kHasZeros, kLess>;
};

}  // namespace w4a16
