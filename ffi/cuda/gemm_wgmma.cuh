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
//   One further warp is the producer: one of its lanes starts every copy.
//
//   A stage holds kBlocks packed blocks along K (64 codes each) of the tile:
//     x       kBlocks tiles of kTileM rows x 128 bytes, swizzled     tensor copies, zero-filled
//     codes   kBlocks x kTileN / 16 packed blocks of 512 bytes       bulk copies
//     scales  kTileN values for every group that the stage meets     bulk copies
//     zeros   likewise, if kHasZeros
//
//   split-K: the kSplitK CTAs of a cluster take consecutive parts of K and finish kTileM / kSplitK
//   tokens each, out of the float32 partial tiles that they send one another, summed in rank order.
//   Every element is summed and written by one thread, so its bits do not depend on timing.
//
// A wgmma and the instructions that dequantise compete for the register file: a block costs about
// the sum of both, not the larger. So the loop is kept short, and wide token tiles pay.
//
// Preconditions (checked by)
//   N % 8 == 0, K % 8 == 0, M, N, K > 0, sm_90                   CanImplement
//   pointers aligned to 16 bytes                                 CheckOperands
//   group_size a multiple of 32, or at least K                   CheckProblem
//   number of tiles * kSplitK fits a grid                        RunWgmma
//
// Synchronisation
//   S1  full[s]: completes when the bytes that the producer announced for stage s have landed.
//   S2  empty[s]: completes when every consumer warp has arrived. One lane arrives for its warp,
//       after the wait that retires the warp's wgmmas on the stage; what the warp itself read from
//       the stage is in their operands. compute-sanitizer's racecheck does not follow this from
//       lane to lane: built with W4A16_RACECHECK, every lane arrives for itself.
//   S3  A registers: the two buffers alternate. A buffer is rewritten only after a wait that leaves
//       no wgmmas but those of the other buffer in flight.
//   S4  Partial tiles overlay the stages. A consumer writes its part once all consumers of the CTA
//       have passed their last read (named barrier 1).
//   S5  A CTA sends to another only after the cluster barrier that all consumers reach after their
//       last read: the receiver's stages are free then, and `received` is initialised.
//   S6  What the sender's threads wrote is fenced to the async proxy before named barrier 1, behind
//       which one warp starts the copies; `received` completes when all peers' bytes have landed.
//   S7  No CTA exits before the second cluster barrier, which each reaches after `received`: copies
//       read the sender's shared memory until then.
#pragma once

#include <climits>

#include "dequant.cuh"
#include "kernels.h"
#include "ptx_sm90.cuh"

namespace w4a16 {

struct WgmmaParams {
  const uint32_t* qweight;
  const void* scales;
  const void* zeros;
  const void* bias;
  void* out;
  int m, n, k;
  int group_size;  // at most K rounded up to a multiple of 32
  int groups;
  int tiles_m, tiles_n;
  float alpha;
  bool out_is_f32;
};

// What the host needs to launch an instantiation.
struct WgmmaKernel {
  void (*kernel)(CUtensorMap, WgmmaParams);
  int threads;
  int shared_bytes;
};

template <typename T>
struct Pair;
template <>
struct Pair<__half> {
  using Type = __half2;
};
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};

template <bool kHasZeros_, int kTileN_, int kTileM_, int kStages_, int kSplitK_>
struct WgmmaShape {
  static constexpr bool kHasZeros = kHasZeros_;
  static constexpr int kTileN = kTileN_, kTileM = kTileM_, kStages = kStages_, kSplitK = kSplitK_;
  static_assert(kTileN % 64 == 0 && kTileM % kSplitK == 0 && kStages >= 2);

  static constexpr int kWarpgroups = kTileN / 64;
  static constexpr int kConsumers = 128 * kWarpgroups;

  // Registers are shared out per quarter of an SM, so a lone producer warp costs as much as four.
  // Tiles that need more than an even share get a producer warpgroup, which gives up its registers.
  static constexpr int kRegisters = kTileM / 2 + 64;  // accumulators, A twice, addresses
  static constexpr bool kReallocate = kRegisters > 65536 / (kConsumers + 128);
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  static_assert(!kReallocate || kWarpgroups == 2);
#if defined(W4A16_RACECHECK)
  static constexpr int kReleasingLanes = 32;
#else
  static constexpr int kReleasingLanes = 1;
#endif
  static constexpr int kThreads = kConsumers + (kReallocate ? 128 : 32);

  // Blocks of 64 codes to a stage: small token tiles need larger copies to keep the memory busy.
  static constexpr int kBlocks = kTileM <= 64 ? 2 : 1;
  static constexpr int kScaleRows = 2 * kBlocks;  // one for every 32 codes at most

  static constexpr int kXBytes = kTileM * 128;                       // one block
  static constexpr int kCodeBytes = kTileN / kBlockN * kBlockBytes;  // one block
  static constexpr int kRowBytes = kTileN * 2;                       // one row of scales
  static constexpr int kXOffset = 0;
  static constexpr int kCodeOffset = kXOffset + kStages * kBlocks * kXBytes;
  static constexpr int kScaleOffset = kCodeOffset + kStages * kBlocks * kCodeBytes;
  static constexpr int kZeroOffset = kScaleOffset + kStages * kScaleRows * kRowBytes;
  static constexpr int kPipelineBytes =
      kZeroOffset + (kHasZeros ? kStages * kScaleRows * kRowBytes : 0);

  // Partial tiles are [token][row]; the pitch makes a warp's fragment stores hit all 32 banks.
  static constexpr int kPitch = kTileN + 4;
  static constexpr int kSliceTokens = kTileM / kSplitK;
  static constexpr int kSliceBytes = kSliceTokens * kPitch * 4;
  static constexpr int kPartialBytes = kTileM * kPitch * 4;
  static constexpr int kEpilogueBytes = kPartialBytes + (kSplitK - 1) * kSliceBytes;

  static constexpr int kBarrierOffset =
      kPipelineBytes > kEpilogueBytes ? kPipelineBytes : kEpilogueBytes;
  static constexpr int kSharedBytes = kBarrierOffset + (2 * kStages + 1) * 8;

  __device__ static uint32_t Full(uint32_t shared, int slot) {
    return shared + kBarrierOffset + 8 * slot;
  }
  __device__ static uint32_t Empty(uint32_t shared, int slot) {
    return Full(shared, kStages + slot);
  }
  __device__ static uint32_t Received(uint32_t shared) { return Full(shared, 2 * kStages); }

  static constexpr int kSharedPerSm = 227 * 1024, kReserved = 1024;
  static_assert(kSharedBytes <= kSharedPerSm);
  // Several CTAs of small tiles hide each other's start and end.
  static constexpr bool Fits(int ctas) {
    const int warps_per_quarter = (ctas * kThreads / 32 + 3) / 4;
    return ctas * (kSharedBytes + kReserved) <= kSharedPerSm + kReserved &&
           warps_per_quarter * 32 * kRegisters <= 65536 / 4;
  }
  static constexpr int kCtasPerSm = Fits(3) ? 3 : Fits(2) ? 2 : 1;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Starts every copy of the CTA's part of K: chunks [begin, end) of kBlocks blocks. Runs in one
// converged warp.
template <typename T, typename Shape>
__device__ inline void ProduceStages(const CUtensorMap& x_map, const WgmmaParams& p,
                                     uint32_t shared, int begin, int end, int n0, int m0,
                                     int scale_shift) {
  const int blocks_k = static_cast<int>(CeilDiv(p.k, kBlockK));
  const int blocks_n = static_cast<int>(CeilDiv(p.n, kBlockN));
  const uint32_t code_bytes = min(Shape::kTileN / kBlockN, blocks_n - n0 / kBlockN) * kBlockBytes;
  const uint32_t row_bytes = min(Shape::kTileN, p.n - n0) * 2;
  const int64_t code_stride = static_cast<int64_t>(blocks_n) * kBlockBytes;
  const char* codes = reinterpret_cast<const char*>(p.qweight) +
                      begin * Shape::kBlocks * code_stride +
                      static_cast<int64_t>(n0 / kBlockN) * kBlockBytes;
  // Codes and scales are read once unless several token tiles share them; every tile of rows reads
  // x.
  const uint64_t keep = ptx::PolicyEvictLast();
  const uint64_t weight_policy =
      p.tiles_m == 1 ? ptx::PolicyEvictFirst() : ptx::PolicyEvictNormal();

  // The group of the next row of scales, and where along K that row and the group after it start.
  int row_k = begin * Shape::kBlocks * kBlockK;
  int group = min(row_k / p.group_size, p.groups - 1);
  int64_t next_group_k = static_cast<int64_t>(group + 1) * p.group_size;
  const T* scales = static_cast<const T*>(p.scales) + static_cast<int64_t>(group) * p.n + n0;
  const T* zeros = static_cast<const T*>(p.zeros) + static_cast<int64_t>(group) * p.n + n0;

  int slot = 0;
  uint32_t parity = 1;  // a fresh barrier passes a wait for the phase before its first
  for (int chunk = begin; chunk < end; ++chunk) {
    const int blocks = min(Shape::kBlocks, blocks_k - chunk * Shape::kBlocks);
    const int rows = ((2 * blocks - 1) >> scale_shift) + 1;
    const uint32_t full = Shape::Full(shared, slot);
    ptx::MbarrierWait(Shape::Empty(shared, slot), parity);  // S2
    const bool elected = ptx::ElectOne();
    if (elected)
      ptx::MbarrierArriveExpectTx(full, blocks * (Shape::kXBytes + code_bytes) +
                                            rows * row_bytes * (Shape::kHasZeros ? 2 : 1));
#pragma unroll
    for (int b = 0; b < Shape::kBlocks; ++b) {
      if (b >= blocks) break;
      const int place = slot * Shape::kBlocks + b;
      if (elected) {
        ptx::BulkLoad(shared + Shape::kCodeOffset + place * Shape::kCodeBytes, codes, code_bytes,
                      full, weight_policy);
        ptx::TensorLoad2d(shared + Shape::kXOffset + place * Shape::kXBytes, &x_map,
                          (chunk * Shape::kBlocks + b) * kBlockK, m0, full, keep);
      }
      codes += code_stride;
    }
    for (int row = 0; row < rows; ++row) {
      // Codes beyond K meet zeros of x; they take the last group's scale.
      if (row_k >= next_group_k && group + 1 < p.groups) {
        ++group;
        next_group_k += p.group_size;
        scales += p.n;
        zeros += p.n;
      }
      row_k += 32 << scale_shift;
      const int place = slot * Shape::kScaleRows + row;
      if (elected) {
        ptx::BulkLoad(shared + Shape::kScaleOffset + place * Shape::kRowBytes, scales, row_bytes,
                      full, weight_policy);
        if constexpr (Shape::kHasZeros)
          ptx::BulkLoad(shared + Shape::kZeroOffset + place * Shape::kRowBytes, zeros, row_bytes,
                        full, weight_policy);
      }
    }
    if (++slot == Shape::kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
}

// One consumer thread's way through the stages.
template <typename T, typename Shape>
struct Consumer {
  using T2 = typename Pair<T>::Type;

  uint32_t shared;
  uint32_t codes;   // the lane's 16 bytes of the first block of stage 0
  uint32_t scales;  // the scale of its row, of registers a[][0] and a[][2]; the others hold row + 8
  int scale_shift;
  bool releases;  // arrives at empty[]
  int slot = 0, previous = 0;
  uint32_t parity = 0;
  float acc[Shape::kTileM / 2] = {};
  uint32_t a[2][16];

  __device__ static inline T2 Splat(uint16_t bits) {
    const T value = reinterpret_cast<const T&>(bits);
    return T2(value, value);
  }

  // a[kBuffer] = T((code - zero) * scale) of block kBlock of the current stage.
  template <bool kFineGroups, int kBlock, int kBuffer>
  __device__ inline void Dequantize() {
    const uint4 words = ptx::LoadShared128(codes + slot * (Shape::kBlocks * Shape::kCodeBytes) +
                                           kBlock * Shape::kCodeBytes);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    uint16_t scale[2], zero[2];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      if (step == 0 || (step == 2 && kFineGroups)) {
        const int part = kFineGroups ? 2 * kBlock + step / 2 : (2 * kBlock) >> scale_shift;
        const uint32_t row = scales + (slot * Shape::kScaleRows + part) * Shape::kRowBytes;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          scale[r] = ptx::LoadShared16(row + 16 * r);
          if constexpr (Shape::kHasZeros)
            zero[r] = ptx::LoadShared16(row + (Shape::kZeroOffset - Shape::kScaleOffset) + 16 * r);
        }
      }
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

  // Dequantises while the previous block's wgmmas run, then starts this block's.
  template <bool kFineGroups, int kBlock, int kBuffer>
  __device__ inline void Step(bool release_previous) {
    Dequantize<kFineGroups, kBlock, kBuffer>();
    const uint64_t x = ptx::DescriptorSwizzle128(shared + Shape::kXOffset +
                                                 (slot * Shape::kBlocks + kBlock) * Shape::kXBytes);
    ptx::WgmmaFence(a[kBuffer]);
#pragma unroll
    for (int step = 0; step < 4; ++step)
      ptx::Wgmma<T, Shape::kTileM>(acc, &a[kBuffer][4 * step], x + 2 * step);
    ptx::WgmmaCommit();
    ptx::WgmmaWait<1>();  // S3
    ptx::KeepAlive(a[kBuffer ^ 1]);
    if (release_previous && releases) ptx::MbarrierArrive(Shape::Empty(shared, previous));  // S2
  }

  __device__ inline void Acquire() { ptx::MbarrierWait(Shape::Full(shared, slot), parity); }  // S1

  __device__ inline void Advance() {
    previous = slot;
    if (++slot == Shape::kStages) {
      slot = 0;
      parity ^= 1;
    }
  }

  // `blocks` blocks, from the start of a stage. kFineGroups: groups may change in the middle of a
  // block, which only sizes that are odd multiples of 32 do. The last stage is not released: nobody
  // waits for it.
  template <bool kFineGroups>
  __device__ inline void Run(int blocks) {
#pragma unroll
    for (int i = 0; i < 16; ++i) a[0][i] = a[1][i] = 0;
    int i = 0;
    for (; i + 2 <= blocks; i += 2) {
      Acquire();
      Step<kFineGroups, 0, 0>(i > 0);
      if constexpr (Shape::kBlocks == 1) {
        Advance();
        Acquire();
        Step<kFineGroups, 0, 1>(true);
      } else {
        Step<kFineGroups, 1, 1>(false);
      }
      Advance();
    }
    if (i < blocks) {
      Acquire();
      Step<kFineGroups, 0, 0>(i > 0);
    }
    ptx::WgmmaWait<0>();
    ptx::KeepAlive(a[0]);
    ptx::KeepAlive(a[1]);
    ptx::Settle(acc);
  }
};

// Converts, scales and stores eight consecutive outputs of a token.
template <typename T>
__device__ inline void StoreEight(const WgmmaParams& p, int token, int n, float (&v)[8]) {
  T bias[8];
  if (p.bias != nullptr)
    *reinterpret_cast<uint4*>(bias) =
        *reinterpret_cast<const uint4*>(static_cast<const T*>(p.bias) + n);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    v[i] = p.bias != nullptr ? fmaf(p.alpha, v[i], static_cast<float>(bias[i])) : p.alpha * v[i];
  const int64_t offset = static_cast<int64_t>(token) * p.n + n;
  if (p.out_is_f32) {
    float4* out = reinterpret_cast<float4*>(static_cast<float*>(p.out) + offset);
    out[0] = make_float4(v[0], v[1], v[2], v[3]);
    out[1] = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    T rounded[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) rounded[i] = static_cast<T>(v[i]);
    *reinterpret_cast<uint4*>(static_cast<T*>(p.out) + offset) =
        *reinterpret_cast<const uint4*>(rounded);
  }
}

// From the accumulators to `out`, through shared memory and, if kSplitK > 1, the cluster.
template <typename T, typename Shape>
__device__ inline void FinishTile(const WgmmaParams& p, const float (&acc)[Shape::kTileM / 2],
                                  char* shared, int rank, int n0, int m0) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  float* partial = reinterpret_cast<float*>(shared);
  if constexpr (Shape::kSplitK > 1) ptx::ClusterArrive();  // S5
  ptx::NamedBarrier(1, Shape::kConsumers);                 // S4
#pragma unroll
  for (int i = 0; i < Shape::kTileM / 2; ++i) {
    const int token = 8 * (i / 4) + 2 * (lane % 4) + (i & 1);
    partial[token * Shape::kPitch + 16 * warp + lane / 4 + 8 * ((i >> 1) & 1)] = acc[i];
  }
  if constexpr (Shape::kSplitK > 1) {
    ptx::FenceProxyAsync();  // S6
    ptx::ClusterWait();      // S5
  }
  ptx::NamedBarrier(1, Shape::kConsumers);
  const char* inbox = shared + Shape::kPartialBytes;  // slices of the other ranks, in rank order
  if constexpr (Shape::kSplitK > 1) {
    const uint32_t here = ptx::SharedAddress(shared), received = Shape::Received(here);
    if (thread < Shape::kSplitK && thread != rank)
      ptx::BulkSend(here + Shape::kPartialBytes + (rank - (rank > thread)) * Shape::kSliceBytes,
                    here + thread * Shape::kSliceBytes, Shape::kSliceBytes, received, thread);
    ptx::MbarrierWait(received, 0);  // S6
    __syncwarp();
    ptx::ClusterArrive();  // S7
  }

  constexpr int kPieces = Shape::kTileN / 8;
  const int first = rank * Shape::kSliceTokens;
  for (int i = thread; i < Shape::kSliceTokens * kPieces; i += Shape::kConsumers) {
    const int token = i / kPieces, n = i % kPieces * 8;
    if (m0 + first + token >= p.m || n0 + n >= p.n) continue;
    float v[8] = {};
#pragma unroll
    for (int source = 0; source < Shape::kSplitK; ++source) {
      const char* slice = source == rank ? shared + first * Shape::kPitch * 4
                                         : inbox + (source - (source > rank)) * Shape::kSliceBytes;
      const float4* from = reinterpret_cast<const float4*>(reinterpret_cast<const float*>(slice) +
                                                           token * Shape::kPitch + n);
      const float4 lo = from[0], hi = from[1];
      const float w[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = source == 0 ? w[j] : v[j] + w[j];
    }
    StoreEight<T>(p, m0 + first + token, n0 + n, v);
  }
  if constexpr (Shape::kSplitK > 1) {
    __syncwarp();
    ptx::ClusterWait();  // S7
  }
}

// Token tiles are walked in panels of kPanelM, so that the tiles in flight share both operands in
// L2.
__device__ inline void TileOf(const WgmmaParams& p, uint32_t tile, int* tile_n, int* tile_m) {
  constexpr uint32_t kPanelM = 8;
  const uint32_t per_panel = kPanelM * p.tiles_n;  // N < 2^30: below 2^28
  const uint32_t panel = tile / per_panel, inside = tile % per_panel;
  const uint32_t width = min(kPanelM, p.tiles_m - panel * kPanelM);
  *tile_m = panel * kPanelM + inside % width;
  *tile_n = inside / width;
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kCtasPerSm)
    GemmWgmma(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ WgmmaParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char storage[];
  const uint32_t shared = ptx::SharedAddress(storage);
  const int lane = threadIdx.x % 32;
  // The shuffle tells the compiler that a warp's threads agree on their role.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  if (threadIdx.x == Shape::kConsumers) {
    ptx::PrefetchTensorMap(&x_map);
    for (int i = 0; i < Shape::kStages; ++i) {
      ptx::MbarrierInit(Shape::Full(shared, i), 1);
      ptx::MbarrierInit(Shape::Empty(shared, i), Shape::kConsumers / 32 * Shape::kReleasingLanes);
    }
    ptx::MbarrierInit(Shape::Received(shared), 1);
    ptx::FenceMbarrierInit();
    if constexpr (Shape::kSplitK > 1)
      ptx::MbarrierArriveExpectTx(Shape::Received(shared),
                                  (Shape::kSplitK - 1) * Shape::kSliceBytes);
  }
  __syncthreads();

  const int rank = blockIdx.x % Shape::kSplitK;
  int tile_n, tile_m;
  TileOf(p, blockIdx.x / Shape::kSplitK, &tile_n, &tile_m);
  const int n0 = tile_n * Shape::kTileN, m0 = tile_m * Shape::kTileM;

  const int blocks_k = static_cast<int>(CeilDiv(p.k, kBlockK));
  const int64_t chunks = CeilDiv(blocks_k, Shape::kBlocks);
  const int begin = static_cast<int>(chunks * rank / Shape::kSplitK);
  const int end = static_cast<int>(chunks * (rank + 1) / Shape::kSplitK);
  // Runs of 2^scale_shift x 32 codes, aligned to their length, lie in one group.
  constexpr int kMaxShift = Shape::kBlocks == 2 ? 2 : 1;
  const int scale_shift = p.groups == 1 ? kMaxShift : min(kMaxShift, __ffs(p.group_size / 32) - 1);

  if (warp >= Shape::kConsumers / 32) {
    if constexpr (Shape::kReallocate) ptx::ReleaseRegisters<Shape::kProducerRegisters>();
    if (warp == Shape::kConsumers / 32)
      ProduceStages<T, Shape>(x_map, p, shared, begin, end, n0, m0, scale_shift);
    if constexpr (Shape::kSplitK > 1) {
      __syncwarp();
      ptx::ClusterArrive();  // S5
      ptx::ClusterWait();
      ptx::ClusterArrive();  // S7
      ptx::ClusterWait();
    }
  } else {
    if constexpr (Shape::kReallocate) ptx::TakeRegisters<Shape::kConsumerRegisters>();
    Consumer<T, Shape> consumer{
        .shared = shared,
        .codes = shared + Shape::kCodeOffset + warp * kBlockBytes + lane * 16,
        .scales = shared + Shape::kScaleOffset + (16 * warp + lane / 4) * 2,
        .scale_shift = scale_shift,
        .releases = lane < Shape::kReleasingLanes,
    };
    const int blocks = min(end * Shape::kBlocks, blocks_k) - min(begin * Shape::kBlocks, blocks_k);
    if (scale_shift == 0)
      consumer.template Run<true>(blocks);
    else
      consumer.template Run<false>(blocks);
    FinishTile<T, Shape>(p, consumer.acc, storage, rank, n0, m0);
  }
#else
  __trap();
#endif
}

// The instantiation for `config`; kernel is nullptr if configs.inc has no such line.
template <typename T>
WgmmaKernel FindWgmma(const Config& config, bool has_zeros) {
#define W4A16_DECODE(...)
#define W4A16_PERSISTENT(...)
#define W4A16_CUTLASS(...)
#define W4A16_WGMMA(N, M, STAGES, SPLIT, ...)                                                  \
  if (config.tile_n == N && config.tile_m == M && config.stages == STAGES &&                   \
      config.split_k == SPLIT) {                                                               \
    using Plain = WgmmaShape<false, N, M, STAGES, SPLIT>;                                      \
    using Zeros = WgmmaShape<true, N, M, STAGES, SPLIT>;                                       \
    return has_zeros ? WgmmaKernel{GemmWgmma<T, Zeros>, Zeros::kThreads, Zeros::kSharedBytes}  \
                     : WgmmaKernel{GemmWgmma<T, Plain>, Plain::kThreads, Plain::kSharedBytes}; \
  }
#include "configs.inc"
#undef W4A16_DECODE
#undef W4A16_PERSISTENT
#undef W4A16_CUTLASS
#undef W4A16_WGMMA
  return {};
}

WgmmaKernel FindWgmmaF16(const Config& config, bool has_zeros);
WgmmaKernel FindWgmmaBf16(const Config& config, bool has_zeros);

}  // namespace w4a16
