// Large M on Hopper: the transposed product with packed weights as wgmma's register operand, by
// CTAs that stay on their SM and take one tile after another.
//
//   out[m, n] = alpha * sum_k x[m, k] * w[k, n] + bias[n]
//   w[k, n] = T((code[k, n] - zero[k / g, n]) * scale[k / g, n])
//
// computed as out^T[N, M] = w^T x^T, accumulated in float32; T rounds to x's type.
//
//                kTileM tokens (wgmma's n)     A tile: kTileN rows of weights by kTileM tokens. A
//               +-------------------------+    consumer warpgroup owns 64 rows (wgmma's m), warp w
//   rows  0..63 |  consumer warpgroup 0   |    of warpgroup g block row 4 * g + w of 16 rows; the
//        64..   |  consumer warpgroup 1   |    16 bytes of lane l in a packed block are its A
//         ...   |         ...             |    fragments of the block's four k16 steps (layout.h).
//               +-------------------------+
//
//   A further warpgroup gives up its registers; one of its threads, the producer, starts every load
//   and runs ahead, into the next tile while consumers finish the last one.
//   A cluster is kCluster CTAs along N of the same tokens: each loads its share of the x tile for
//   all of them, which spares L2 and power; a large product runs at the power limit.
//
//   A stage holds one packed block along K (64 codes) of the tile:
//     x       kTileM rows x 128 bytes, swizzled       tensor copies, zero-filled
//     codes   kTileN / 16 packed blocks of 512 bytes  bulk copy
//     scales  kTileN values of the block's group      bulk copy
//     zeros   likewise, if kHasZeros
//
//   The end of a tile: accumulators are rounded, transposed by stmatrix into the warpgroup's own
//   staging memory and leave by tensor stores, which run on during the next tile. Before that, the
//   next tile's first block is dequantised, while the last wgmmas run. float32 output goes straight
//   from registers to memory.
//
//   The last wave may be streamed (gemm_persistent.h): the tiles that are left share out their
//   blocks along K evenly, a CTA's run ending in one tile and starting in another. Accumulators of
//   a tile that a run does not begin go through memory to the CTA whose run does, which adds them
//   up in the order of K.
//
// Every element is summed in an order that the problem and the number of SMs fix, and written by
// one thread; its bits do not depend on timing.
//
// Preconditions (checked by)
//   N % 8 == 0, K % 8 == 0, M, N, K > 0, sm_90                   CanImplement
//   group_size a multiple of 64, or at least K                   CanImplement
//   pointers aligned to 16 bytes                                 CheckOperands
//   number of a CTA's blocks fits 31 bits                        RunPersistent
//
// Synchronisation
//   S1  full[s]: completes when the bytes that this CTA's producer announced for stage s have
//       landed: its own copies and, in a cluster, the other CTAs' shares of x, which may land first
//       (the phase is still held back by the producer's arrival).
//   S2  empty[s]: completes when every consumer warp of every CTA of the cluster has arrived, since
//       a stage's x is written in all of them at once. Lane r < kCluster arrives at rank r for its
//       warp, after the wait that retires the warp's wgmmas on the stage.
//   S3  A registers: the two buffers alternate. A buffer is rewritten only after a wait that leaves
//       no wgmmas but those of the other buffer in flight.
//   S4  Staging memory is rewritten only after the thread that starts a warpgroup's stores has
//       waited for the last ones to be read (named barrier 1 + warpgroup); what was staged is
//       fenced to the async proxy before that barrier's next phase, behind which the stores start.
//   S5  No CTA exits before the last cluster barrier: others arrive at its barriers until then.
//   S6  Sums: a warpgroup's threads write them, then (named barrier) one of them releases the flag;
//       one thread of the receiver acquires it, then (named barrier) all of them read. A receiver
//       waits only for CTAs of lower index, which have been started before it and wait for nobody
//       before they send. Flags start as anything but the token, and are left so.
#pragma once

#include <climits>

#include "dequant.cuh"
#include "gemm_persistent.h"
#include "kernels.h"
#include "ptx_sm90.cuh"

namespace w4a16 {

// Division of 0 <= a < 2^31 by a fixed 1 <= d < 2^31 as a multiplication.
struct Divisor {
  uint32_t d, multiplier, shift;

  explicit Divisor(uint32_t divisor) : d(divisor), multiplier(0), shift(0) {
    while ((uint64_t{1} << shift) < d) ++shift;
    if (d > 1) multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + d - 1) / d);
  }
#if defined(__CUDACC__)
  __device__ uint32_t Quotient(uint32_t a) const {
    return d == 1 ? a : __umulhi(a, multiplier) >> (shift - 1);
  }
#endif
};

// Units are walked in panels of kPanelM token tiles, so that those in flight share both operands in
// L2.
inline constexpr int kPanelM = 8;

struct PersistentParams {
  const uint32_t* qweight;
  const void* scales;
  const void* zeros;
  const void* bias;
  void* out;
  int m, n;
  int blocks_k, blocks_per_group;
  Divisor per_panel, last_width;  // units in a full panel; token tiles in the last panel
  int full_panels;
  int whole_units;  // gemm_persistent.h
  int streamed_share,
      streamed_extra;         // streamed blocks of each cluster, one more of the first ones
  float* sums;                // [CTA][kTileN * kTileM]
  unsigned long long* flags;  // [CTA][kWarpgroups]
  unsigned long long token;   // a flag's value when the sums are there; no other call uses it
  float alpha;
  bool out_is_f32;
};

// x in boxes of a CTA's share of a tile; out in boxes of kStoreTokens x kStoreRows.
struct PersistentMaps {
  CUtensorMap x, out;
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
  static constexpr int kWarpgroups = kTileN / 64;
  static constexpr int kConsumers = 128 * kWarpgroups;
  static constexpr int kThreads = kConsumers + 128;
  static_assert(kTileN % 64 == 0 && (kWarpgroups == 2 || kWarpgroups == 3));
  static_assert(kTileM % (8 * kCluster) == 0 && kTileM % kStoreTokens == 0 && kStages >= 2);

  // A warp that starts wgmmas is held up until they have read its registers, all but the last
  // batch's time. What it does next, until it starts the next ones, is hidden only if the other
  // warpgroups' wgmmas take longer. With few tokens they do not, and so codes are read from shared
  // memory a step early; with many, that would only cost a stage.
  static constexpr bool kReadsEarly = kTileM <= 128;

  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 232 : 152;

  static constexpr int kXBytes = kTileM * 128;
  static constexpr int kCodeBytes = kTileN / kBlockN * kBlockBytes;
  static constexpr int kRowBytes = kTileN * 2;
  static constexpr int kStageBytes = kXBytes + kCodeBytes + kRowBytes * (kHasZeros ? 2 : 1);

  // Staging memory for a whole tile, or for half of it at a time.
  static constexpr int kSharedPerCta = 227 * 1024, kBarrierBytes = 2 * kStages * 8;
  static constexpr int kStagedTokens =
      kStages * kStageBytes + kTileN * 2 * kTileM + kBarrierBytes <= kSharedPerCta ? kTileM
                                                                                   : kTileM / 2;
  static constexpr int kStagedBytes = kStagedTokens * kStoreRows * 2;  // one warpgroup

  static constexpr int kXOffset = 0;
  static constexpr int kStagedOffset = kXOffset + kStages * kXBytes;
  static constexpr int kCodeOffset = kStagedOffset + kWarpgroups * kStagedBytes;
  static constexpr int kScaleOffset = kCodeOffset + kStages * kCodeBytes;
  static constexpr int kZeroOffset = kScaleOffset + kStages * kRowBytes;
  static constexpr int kBarrierOffset = kZeroOffset + (kHasZeros ? kStages * kRowBytes : 0);
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

// What a CTA does at a time: blocks [begin, end) of K, kTileM tokens from m0 on, kTileN rows of
// weights from n0 on.
struct Unit {
  int n0, m0, begin, end;
};

// The units of a CTA, in order: every stride-th whole one, then its run of streamed blocks.
template <typename Shape>
struct Walk {
  const PersistentParams& p;
  int rank, index;
  int at, run_end;  // of the run

  __device__ Walk(const PersistentParams& params, int cluster_rank)
      : p(params),
        rank(cluster_rank),
        index(blockIdx.x / Shape::kCluster),
        at(RunBegin(Run())),
        run_end(RunBegin(Run() + 1)) {}

  // A run's sums go to runs before it: those of later CTAs, which wait for earlier ones (S6).
  __device__ int Run() const { return (gridDim.x - 1 - blockIdx.x) / Shape::kCluster; }

  __device__ int RunBegin(int run) const {
    return run * p.streamed_share + min(run, p.streamed_extra);
  }

  // Blocks of all units.
  __device__ int Blocks() const {
    const int stride = gridDim.x / Shape::kCluster;
    const int whole = (p.whole_units - index + stride - 1) / stride;
    return max(whole, 0) * p.blocks_k + run_end - at;
  }

  __device__ bool More() const { return index < p.whole_units || at < run_end; }

  __device__ Unit Next() {
    int tile = index, begin = 0, end = p.blocks_k;
    if (index >= p.whole_units) {
      tile = at / p.blocks_k;
      begin = at - tile * p.blocks_k;
      end = min(p.blocks_k, begin + run_end - at);
      at += end - begin;
      tile += p.whole_units;
    }
    index += gridDim.x / Shape::kCluster;
    const int panel = p.per_panel.Quotient(tile), inside = tile - panel * p.per_panel.d;
    const bool full = panel < p.full_panels;
    const int column = full ? inside / kPanelM : p.last_width.Quotient(inside);
    const int row = inside - column * (full ? kPanelM : p.last_width.d);
    return {.n0 = (column * Shape::kCluster + rank) * Shape::kTileN,
            .m0 = (panel * kPanelM + row) * Shape::kTileM,
            .begin = begin,
            .end = end};
  }
};

// L2 policies, as createpolicy makes them. Every unit reads x; few share codes and scales.
inline constexpr uint64_t kEvictNormal = 0x1000000000000000, kEvictLast = 0x14f0000000000000;

// Starts every load of the CTA's units. Runs in one thread.
template <typename T, typename Shape>
__device__ inline void ProduceUnits(const PersistentMaps& maps, const PersistentParams& p,
                                    uint32_t shared, int rank) {
  const int blocks_n = static_cast<int>(CeilDiv(p.n, kBlockN));
  int slot = 0;
  uint32_t parity = 1;  // a fresh barrier passes a wait for the phase before its first
  Walk<Shape> walk(p, rank);
  while (walk.More()) {
    const Unit unit = walk.Next();
    // The last cluster along N may reach beyond N by whole CTAs.
    const int rows = min(Shape::kTileN, p.n - unit.n0);
    const uint32_t code_bytes =
        min(Shape::kTileN / kBlockN, blocks_n - unit.n0 / kBlockN) * kBlockBytes;
    const uint32_t row_bytes = rows * 2;
    const uint32_t bytes =
        Shape::kXBytes + (rows > 0 ? code_bytes + row_bytes * (Shape::kHasZeros ? 2 : 1) : 0);
    const char* codes =
        reinterpret_cast<const char*>(p.qweight) +
        (static_cast<int64_t>(unit.begin) * blocks_n + unit.n0 / kBlockN) * kBlockBytes;
    const int group = unit.begin / p.blocks_per_group;
    int64_t row = static_cast<int64_t>(group) * p.n + unit.n0;  // of scales and zeros
    int left_in_group = (group + 1) * p.blocks_per_group - unit.begin;
#pragma unroll 1
    for (int block = unit.begin; block < unit.end; ++block) {
      const uint32_t full = Shape::Full(shared, slot);
      ptx::MbarrierWait(Shape::Empty(shared, slot), parity);  // S2
      ptx::MbarrierArriveExpectTx(full, bytes);
      if (rows > 0) {
        ptx::BulkLoad(shared + Shape::kCodeOffset + slot * Shape::kCodeBytes, codes, code_bytes,
                      full, kEvictNormal);
        ptx::BulkLoad(shared + Shape::kScaleOffset + slot * Shape::kRowBytes,
                      static_cast<const T*>(p.scales) + row, row_bytes, full, kEvictNormal);
        if constexpr (Shape::kHasZeros)
          ptx::BulkLoad(shared + Shape::kZeroOffset + slot * Shape::kRowBytes,
                        static_cast<const T*>(p.zeros) + row, row_bytes, full, kEvictNormal);
      }
      constexpr int kShare = Shape::kTileM / Shape::kCluster;
      const uint32_t x = shared + Shape::kXOffset + slot * Shape::kXBytes + rank * (kShare * 128);
      if constexpr (Shape::kCluster == 1)
        ptx::TensorLoad2d(x, &maps.x, block * kBlockK, unit.m0, full, kEvictLast);
      else
        ptx::TensorLoad2dMulticast(x, &maps.x, block * kBlockK, unit.m0 + rank * kShare, full,
                                   (1 << Shape::kCluster) - 1, kEvictLast);
      codes += static_cast<int64_t>(blocks_n) * kBlockBytes;
      if (--left_in_group == 0) {
        left_in_group = p.blocks_per_group;
        row += p.n;
      }
      if (++slot == Shape::kStages) {
        slot = 0;
        parity ^= 1;
      }
    }
  }
}

template <typename T>
struct PairOf;
template <>
struct PairOf<__half> {
  using Type = __half2;
  __device__ static inline Type Round(float lo, float hi) { return __floats2half2_rn(lo, hi); }
};
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  __device__ static inline Type Round(float lo, float hi) { return __floats2bfloat162_rn(lo, hi); }
};

// One consumer thread's way through the stages.
template <typename T, typename Shape>
struct PersistentConsumer {
  using T2 = typename PairOf<T>::Type;

  uint32_t shared;
  uint32_t codes;   // the lane's 16 bytes of the block of stage 0
  uint32_t scales;  // the scale of its row, of registers a[][0] and a[][2]; the others hold row + 8
  uint32_t empty;   // empty[0] of the CTA that the lane tells
  bool releases;    // whether it tells any
  int unread;       // blocks, of all units, whose codes have not been read
  int read_slot = 0, slot = 0, previous = 0;
  uint32_t parity = 0;  // of the stage to read next
  uint4 words;          // codes, and the scales and zeros of two rows, as read
  uint16_t scale[2], zero[2];
  uint32_t a[2][16];

  __device__ static inline T2 Splat(uint16_t bits) {
    const T value = reinterpret_cast<const T&>(bits);
    return T2(value, value);
  }

  // Reads what the next block takes to dequantise it, if there is one.
  __device__ inline void Read() {
    if (unread == 0) return;
    --unread;
    ptx::MbarrierWait(Shape::Full(shared, read_slot), parity);  // S1
    words = ptx::LoadShared128(codes + read_slot * Shape::kCodeBytes);
    const uint32_t row = scales + read_slot * Shape::kRowBytes;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      scale[r] = ptx::LoadShared16(row + 16 * r);
      if constexpr (Shape::kHasZeros)
        zero[r] = ptx::LoadShared16(row + (Shape::kZeroOffset - Shape::kScaleOffset) + 16 * r);
    }
    if (++read_slot == Shape::kStages) {
      read_slot = 0;
      parity ^= 1;
    }
  }

  // a[kBuffer] = T((code - zero) * scale) of the block that was read.
  template <int kBuffer>
  __device__ inline void Dequantize() {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t unscaled[4];
      Dequantizer<T>::template Exact<Shape::kHasZeros ? 0 : kSymmetricZero>(word[step], unscaled);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T2 value = reinterpret_cast<const T2&>(unscaled[i]);
        if constexpr (Shape::kHasZeros) value = __hsub2(value, Splat(zero[i & 1]));
        value = __hmul2(value, Splat(scale[i & 1]));
        a[kBuffer][4 * step + i] = reinterpret_cast<const uint32_t&>(value);
      }
    }
  }

  __device__ inline void Release() {
    if (releases) ptx::MbarrierArriveCluster(empty + 8 * previous);  // S2
  }

  // Before the first unit: its first block, in a[0].
  __device__ inline void Begin() {
    Read();
    Dequantize<0>();
    if constexpr (Shape::kReadsEarly) Read();
  }

  // Starts the wgmmas of the block in a[kBuffer], the first of a unit or not; while they run,
  // dequantises the next block, which may be the next unit's. (After the last one, what lies in the
  // registers, to no effect.)
  template <int kBuffer>
  __device__ inline void Step(float (&acc)[Shape::kTileM / 2], bool first) {
    const uint64_t x = ptx::DescriptorSwizzle128(shared + Shape::kXOffset + slot * Shape::kXBytes);
    ptx::WgmmaFence(a[kBuffer]);
#pragma unroll
    for (int step = 0; step < 4; ++step)
      ptx::Wgmma<T, Shape::kTileM>(acc, &a[kBuffer][4 * step], x + 2 * step, step > 0 || !first);
    ptx::WgmmaCommit();
    ptx::WgmmaWait<1>();  // S3
    ptx::KeepAlive(a[kBuffer ^ 1]);
    if (!first) Release();
    previous = slot;
    if (++slot == Shape::kStages) slot = 0;
    if constexpr (!Shape::kReadsEarly) Read();
    Dequantize<kBuffer ^ 1>();
    if constexpr (Shape::kReadsEarly) Read();
  }

  // A unit: `blocks` blocks, of which a[0] holds the first. Leaves the next unit's first in a[0].
  __device__ inline void Run(float (&acc)[Shape::kTileM / 2], int blocks) {
    ptx::Undefined(acc);
    int i = 0;
    for (; i + 2 <= blocks; i += 2) {
      Step<0>(acc, i == 0);
      Step<1>(acc, false);
    }
    if (i < blocks) Step<0>(acc, i == 0);
    ptx::WgmmaWait<0>();
    ptx::KeepAlive(a[0]);
    ptx::KeepAlive(a[1]);
    ptx::Settle(acc);
    Release();
    if (i < blocks) {
#pragma unroll
      for (int j = 0; j < 16; ++j) a[0][j] = a[1][j];
    }
  }
};

// Where a warpgroup of CTA `cta` leaves its sums for another: float4 number i of thread t is at
// 128 * i + t. Its flag is at cta * kWarpgroups + group.
template <typename Shape>
__device__ inline float4* SumsOf(const PersistentParams& p, int cta, int group) {
  return reinterpret_cast<float4*>(p.sums) +
         (static_cast<int64_t>(cta) * Shape::kWarpgroups + group) * (Shape::kTileM * 16) +
         threadIdx.x % 128;
}

template <typename Shape>
__device__ inline void SendSums(const PersistentParams& p, const float (&acc)[Shape::kTileM / 2]) {
  const int cta = blockIdx.x, group = threadIdx.x / 128;
  float4* sums = SumsOf<Shape>(p, cta, group);
#pragma unroll
  for (int i = 0; i < Shape::kTileM / 8; ++i)
    __stcg(sums + 128 * i, make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
  ptx::NamedBarrier(1 + group, 128);  // S6
  if (threadIdx.x % 128 == 0)
    ptx::StoreRelease(p.flags + cta * Shape::kWarpgroups + group, p.token);
}

// Adds what the later runs of the tile that ends with streamed block `end` have sent, in order.
template <typename Shape>
__device__ inline void AddSums(const PersistentParams& p, float (&acc)[Shape::kTileM / 2],
                               const Walk<Shape>& walk, int end) {
  const int group = threadIdx.x / 128;
  int cta = blockIdx.x;
  for (int run = walk.Run() + 1; walk.RunBegin(run) < end; ++run) {
    cta -= Shape::kCluster;
    if (threadIdx.x % 128 == 0) {
      unsigned long long* flag = p.flags + cta * Shape::kWarpgroups + group;
      while (ptx::LoadAcquire(flag) != p.token) {
      }
      *flag = 0;  // nobody else waits for it; a later call with this workspace must not see it
    }
    ptx::NamedBarrier(1 + group, 128);  // S6
    const float4* sums = SumsOf<Shape>(p, cta, group);
    constexpr int kBatch = 8;
#pragma unroll
    for (int begin = 0; begin < Shape::kTileM / 8; begin += kBatch) {
      float4 v[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) v[i] = __ldcg(sums + 128 * (begin + i));
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        float* sum = &acc[4 * (begin + i)];
        sum[0] += v[i].x;
        sum[1] += v[i].y;
        sum[2] += v[i].z;
        sum[3] += v[i].w;
      }
    }
  }
}

// From a warpgroup's accumulators to `out`.
template <typename T, typename Shape>
__device__ inline void StoreUnit(const PersistentMaps& maps, const PersistentParams& p,
                                 const float (&acc)[Shape::kTileM / 2], uint32_t shared, int n0,
                                 int m0) {
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int first_n = n0 + kStoreRows * group, n = first_n + 16 * warp + lane / 4;
  float bias[2] = {-0.0f, -0.0f};  // adding -0 changes nothing
  if (p.bias != nullptr) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (n + 8 * r < p.n) bias[r] = static_cast<float>(static_cast<const T*>(p.bias)[n + 8 * r]);
    }
  }
  if (p.out_is_f32) {
#pragma unroll
    for (int i = 0; i < Shape::kTileM / 2; ++i) {
      const int token = m0 + 8 * (i / 4) + 2 * (lane % 4) + (i & 1), r = (i >> 1) & 1;
      if (token < p.m && n + 8 * r < p.n)
        static_cast<float*>(p.out)[static_cast<int64_t>(token) * p.n + n + 8 * r] =
            fmaf(p.alpha, acc[i], bias[r]);
    }
    return;
  }
  // [token][row], 128 bytes a token, in the tensor copies' 128-byte swizzle: the 16-byte pieces of
  // a token are permuted by token % 8, which also spreads stmatrix over all banks.
  const uint32_t staged = shared + Shape::kStagedOffset + group * Shape::kStagedBytes;
  const uint32_t mine =
      staged + (8 * (lane / 16) + lane % 8) * 128 + (((2 * warp + lane / 8 % 2) ^ (lane % 8)) * 16);
  const bool stores = threadIdx.x % 128 == 0;
#pragma unroll
  for (int begin = 0; begin < Shape::kTileM; begin += Shape::kStagedTokens) {
    if (stores) ptx::BulkWaitRead<0>();
    ptx::NamedBarrier(1 + group, 128);  // S4
    const auto stage = [&]<bool kPlain>() {
#pragma unroll
      for (int token = 0; token < Shape::kStagedTokens; token += 16) {
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &acc[(begin + token) / 2 + 2 * i];
          float lo = pair[0], hi = pair[1];
          if constexpr (!kPlain) {
            lo = fmaf(p.alpha, lo, bias[i & 1]);
            hi = fmaf(p.alpha, hi, bias[i & 1]);
          }
          const auto rounded = PairOf<T>::Round(lo, hi);
          v[i] = reinterpret_cast<const uint32_t&>(rounded);
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
      for (int token = 0; token < Shape::kStagedTokens; token += kStoreTokens)
        ptx::TensorStore2d(&maps.out, staged + token * 128, first_n, m0 + begin + token);
      ptx::BulkCommit();
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
  const int lane = threadIdx.x % 32;
  // The shuffle tells the compiler that a warp's threads agree on their role.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  if (threadIdx.x == Shape::kConsumers) {
    ptx::PrefetchTensorMap(&maps.x);
    ptx::PrefetchTensorMap(&maps.out);
    for (int i = 0; i < Shape::kStages; ++i) {
      ptx::MbarrierInit(Shape::Full(shared, i), 1);
      ptx::MbarrierInit(Shape::Empty(shared, i), Shape::kConsumers / 32 * Shape::kCluster);
    }
    ptx::FenceMbarrierInit();
  }
  if constexpr (Shape::kCluster == 1) {
    __syncthreads();
  } else {
    ptx::ClusterArrive();
    ptx::ClusterWait();
  }

  const int rank = Shape::kCluster == 1 ? 0 : ptx::ClusterRank();
  if (warp >= Shape::kConsumers / 32) {
    ptx::ReleaseRegisters<Shape::kProducerRegisters>();
    if (warp == Shape::kConsumers / 32 && ptx::ElectOne())
      ProduceUnits<T, Shape>(maps, p, shared, rank);
    __syncwarp();
  } else {
    ptx::TakeRegisters<Shape::kConsumerRegisters>();
    Walk<Shape> walk(p, rank);
    const int told = lane < Shape::kCluster ? lane : 0;
    PersistentConsumer<T, Shape> consumer{
        .shared = shared,
        .codes = shared + Shape::kCodeOffset + warp * kBlockBytes + lane * 16,
        .scales = shared + Shape::kScaleOffset + (16 * warp + lane / 4) * 2,
        .empty = ptx::MapShared(Shape::Empty(shared, 0), told),
        .releases = lane < Shape::kCluster,
        .unread = walk.Blocks(),
    };
    consumer.Begin();
    while (walk.More()) {
      const Unit unit = walk.Next();
      float acc[Shape::kTileM / 2];
      consumer.Run(acc, unit.end - unit.begin);
      if (unit.begin > 0) {
        SendSums<Shape>(p, acc);
      } else {
        if (unit.end < p.blocks_k) AddSums<Shape>(p, acc, walk, walk.at + p.blocks_k - unit.end);
        StoreUnit<T, Shape>(maps, p, acc, shared, unit.n0, unit.m0);
      }
    }
    if (threadIdx.x % 128 == 0) ptx::BulkWaitRead<0>();
    __syncwarp();
  }
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
