// Decode: few tokens, the packed weight streamed once from memory.
//
//   out[m, n] = alpha * sum_k x[m, k] * (code[k, n] - zero[k/g, n]) * scale[k/g, n] + bias[n]
//
// computed as out^T = w^T x^T with mma.m16n8k16, the packed weight being operand A as it is stored.
//
//             tokens                          K (blocks of 64)
//            +-------+              +----+----+----+----+----+----+----+----+
//   tile_n   |       |     tile_n   | w0 | w1 | w2 | w3 | w0 | w1 | w2 | w3 |   a CTA's share of K
//   (N)      |  CTA  |  =  (N)      |    |    |    |    |    |    |    |    |   (1 / split_k of it)
//            +-------+              +----+----+----+----+----+----+----+----+
//             tile_m                   |
//                                      v  one stage of warp w0's private ring of kStages
//   weights tile_n/16 x 512 B (lane l's 16 bytes of each block) | x rows x 128 B, 16-byte chunk c
//   of row r at c ^ (r % 8) | scales, zeros: tile_n x 2 B each, one row per group in the block
//
// Each warp owns a ring and every blocks_k-th block of its CTA's share; no CTA barrier in the loop.
// Accumulators are float32: a block's (or, where a group ends inside it, half block's) products
// first, then partial * scale is added to the total. With `affine` codes (dequant.cuh) A holds
// (code + offset) / step, and sum(x) of the same block comes from one more mma whose A is 1 / step
// throughout:    sum x (code - zero) / step  =  sum(x a) - (zero + offset) * sum(x / step).
//
// Preconditions (checked by): every pointer aligned to 16 bytes (CheckOperands); extents up to
// 2^30, group_size a multiple of 32 or >= K (CheckProblem); split_k == cluster size, the tiles fit
// the grid, shared memory as in decode.h (RunDecode); sm_80, and sm_90 for split_k > 1
// (CanImplement). Rows of x, scales and out may be unaligned: x_aligned and n_aligned choose slower
// copies.
//
// Synchronisation invariants
//  1. A lane reads a stage only after its own cp.async.wait_group for that stage and then a
//     __syncwarp: each lane waits for its own copies, the barrier joins them.
//  2. A stage is refilled only after a __syncwarp that follows every lane's last read of it.
//  3. A warp stores its partial tile over its own ring alone, after its last read (a __syncwarp).
//  4. Partial tiles are read by other warps only after __syncthreads.
//  5. No CTA stores to another's shared memory before the first cluster barrier: all have started.
//  6. Received sums are read only after the second cluster barrier, and nothing touches another
//     CTA's shared memory after it: a CTA may then exit.
// All sums run in a fixed order: blocks within a warp, warps within a CTA, CTAs within a cluster.
#pragma once

#include "convert.cuh"
#include "decode.h"
#include "dequant.cuh"
#include "ptx.cuh"

namespace w4a16 {

template <typename T>
__device__ __forceinline__ float LoadSharedFloat(uint32_t address) {
  const uint16_t bits = LoadShared16(address);
  return ToFloat(*reinterpret_cast<const T*>(&bits));
}

// Where `idx` (in K) lies: its group, and its distance from the group's start.
struct GroupCursor {
  int group, offset;

  __device__ __forceinline__ GroupCursor(int idx, int group_size)
      : group(idx / group_size), offset(idx % group_size) {}

  __device__ __forceinline__ void Advance(const GroupCursor& step, int group_size) {
    group += step.group;
    offset += step.offset;
    if (offset >= group_size) {
      offset -= group_size;
      ++group;
    }
  }
};

// Registers of the accumulators decide how many warps fit.
constexpr int DecodeMaxThreads(int tile_n, int tile_m) {
  return tile_n * tile_m <= 1024 ? 512 : 256;
}

// Fills stages with blocks of K: one per warp.
template <typename T, int kTileN, int kTileM, bool kZeros, bool kSplitBlocks>
class StageLoader {
 public:
  static constexpr int kRowBlocks = kTileN / kBlockN;
  static constexpr int kParts = kSplitBlocks ? 2 : 1;  // groups in a block
  static constexpr int kScaleRowBytes = 2 * kTileN;
  static constexpr int kWeightBytes = kRowBlocks * kBlockBytes;

  __device__ __forceinline__ StageLoader(const DecodeParams& p, int n0, int m0, int block_k,
                                         int step, int lane)
      : p_(p),
        lane_(lane),
        n0_(n0),
        rows_(min(p.x_rows, p.m - m0)),
        row_blocks_(min(kRowBlocks, p.blocks_n - n0 / kBlockN)),
        policy_(EvictFirstPolicy()),
        weights_(reinterpret_cast<const char*>(p.qweight) +
                 (static_cast<int64_t>(block_k) * p.blocks_n + n0 / kBlockN) * kBlockBytes +
                 16 * lane),
        weights_step_(static_cast<int64_t>(step) * p.blocks_n * kBlockBytes),
        x_(static_cast<const T*>(p.x) + static_cast<int64_t>(m0) * p.k),
        k_(block_k * kBlockK),
        k_step_(step * kBlockK),
        cursor_(block_k * kBlockK, p.group_size),
        cursor_step_(step * kBlockK, p.group_size) {}

  // Starts the copies of the next block into `stage`, as one group.
  __device__ __forceinline__ void Load(uint32_t stage) {
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) {
      if (r < row_blocks_)
        CopyAsync(stage + r * kBlockBytes + 16 * lane_, weights_ + r * kBlockBytes, policy_);
    }
    LoadX(stage + kWeightBytes);
    LoadScales(stage + kWeightBytes + p_.x_rows * kXRowBytes);
    weights_ += weights_step_;
    k_ += k_step_;
    cursor_.Advance(cursor_step_, p_.group_size);
  }

 private:
  static __device__ __forceinline__ uint32_t XOffset(int row, int chunk) {
    return row * kXRowBytes + 16 * (chunk ^ (row & 7));
  }

  __device__ __forceinline__ void LoadX(uint32_t dst) {
    if (p_.x_aligned) {
      const int chunk = lane_ % 8;
      const int k = k_ + 8 * chunk;
      const bool valid = k < p_.k;
      const T* src = x_ + (valid ? k : 0);
#pragma unroll
      for (int i = 0; i < (kTileM + 3) / 4; ++i) {
        const int row = 4 * i + lane_ / 8;
        if (row < rows_)
          CopyAsyncOrZero(dst + XOffset(row, chunk), src + static_cast<int64_t>(row) * p_.k, valid);
      }
    } else {
      for (int i = lane_; i < rows_ * kBlockK; i += 32) {
        const int row = i / kBlockK, k = k_ + i % kBlockK;
        uint16_t v = 0;
        if (k < p_.k)
          v = reinterpret_cast<const uint16_t*>(x_)[static_cast<int64_t>(row) * p_.k + k];
        StoreShared16(dst + XOffset(row, i % kBlockK / 8) + i % 8 * 2, v);
      }
    }
  }

  // The row of scales or zeros `row` (part + kParts * is_zero) at its group, from column n0_ on.
  __device__ __forceinline__ const T* ScaleSource(int row) const {
    int group = cursor_.group;
    if (kSplitBlocks && row % kParts == 1 && cursor_.offset + kBlockK / 2 >= p_.group_size) ++group;
    // The second half of the last block may lie past K.
    group = min(group, p_.num_groups - 1);
    return static_cast<const T*>(row < kParts ? p_.scales : p_.zeros) +
           static_cast<int64_t>(group) * p_.n + n0_;
  }

  __device__ __forceinline__ void LoadScales(uint32_t dst) {
    constexpr int kRows = kParts * (kZeros ? 2 : 1);
    if (p_.n_aligned) {
      constexpr int kChunks = kScaleRowBytes / 16;
#pragma unroll
      for (int i = 0; i < kRows * kChunks; i += 32) {
        const int idx = i + lane_;
        const int row = idx / kChunks, n = idx % kChunks * 8;
        if (idx < kRows * kChunks && n0_ + n < p_.n)
          CopyAsync(dst + 16 * idx, ScaleSource(row) + n);
      }
    } else {
      for (int idx = lane_; idx < kRows * kTileN; idx += 32) {
        const int row = idx / kTileN, n = idx % kTileN;
        if (n0_ + n < p_.n)
          StoreShared16(dst + 2 * idx, reinterpret_cast<const uint16_t*>(ScaleSource(row))[n]);
      }
    }
  }

  const DecodeParams& p_;
  const int lane_, n0_, rows_, row_blocks_;
  const uint64_t policy_;
  const char* weights_;
  const int64_t weights_step_;
  const T* const x_;
  int k_;
  const int k_step_;
  GroupCursor cursor_;
  const GroupCursor cursor_step_;
};

// The products of one block: acc[r][j] += rows 16 r .. of the tile times tokens 8 j .. .
template <typename T, int kTileN, int kTileM, bool kZeros, bool kSplitBlocks>
__device__ __forceinline__ void MultiplyBlock(uint32_t stage, int x_bytes,
                                              const uint32_t (&x_address)[kTileM / 8],
                                              const bool (&x_exists)[kTileM / 8], uint32_t zero_row,
                                              int lane, float (&acc)[kTileN / 16][kTileM / 8][4]) {
  using D = Dequantizer<T>;
  constexpr int kRowBlocks = kTileN / kBlockN, kTokenBlocks = kTileM / 8;
  constexpr int kParts = kSplitBlocks ? 2 : 1;
  constexpr int kSteps = 4 / kParts;  // mma steps in a part
  // Without zero points more tokens pay for subtracting 8 from each code once; with few, sum(x) is
  // cheaper.
  constexpr bool kAffine = kZeros || kTileM == 8;

  uint32_t x[kTokenBlocks][2][4];
#pragma unroll
  for (int j = 0; j < kTokenBlocks; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      LoadMatrix4(x_exists[j] ? stage + (x_address[j] ^ (64 * h)) : zero_row, x[j][h]);
  }

  float sum[kParts][kTokenBlocks][4] = {};
  if constexpr (kAffine) {
    constexpr uint32_t kOnes[4] = {D::InverseStep(0), D::InverseStep(1), D::InverseStep(0),
                                   D::InverseStep(1)};
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int j = 0; j < kTokenBlocks; ++j)
        Mma<T>(sum[s / kSteps][j], kOnes, x[j][s / 2][s % 2 * 2], x[j][s / 2][s % 2 * 2 + 1]);
    }
  }

  const uint32_t scale_address = stage + kRowBlocks * kBlockBytes + x_bytes + 2 * (lane / 4);
#pragma unroll
  for (int r = 0; r < kRowBlocks; ++r) {
    const uint4 packed = LoadShared128(stage + r * kBlockBytes + 16 * lane);
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float partial[kTokenBlocks][4] = {};
#pragma unroll
      for (int s = part * kSteps; s < (part + 1) * kSteps; ++s) {
        uint32_t a[4];
        if constexpr (kAffine) {
          D::Affine(words[s], a);
        } else {
          D::template Exact<kSymmetricZero>(words[s], a);
        }
#pragma unroll
        for (int j = 0; j < kTokenBlocks; ++j)
          Mma<T>(partial[j], a, x[j][s / 2][s % 2 * 2], x[j][s / 2][s % 2 * 2 + 1]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t row = scale_address + 2 * (part * kTileN + 16 * r + 8 * half);
        float scale = LoadSharedFloat<T>(row);
        if constexpr (kAffine) scale *= D::Step(half);
        float zero = kSymmetricZero + D::kOffset;
        if constexpr (kZeros) zero = LoadSharedFloat<T>(row + 2 * kParts * kTileN) + D::kOffset;
#pragma unroll
        for (int j = 0; j < kTokenBlocks; ++j) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            float v = partial[j][i];
            if constexpr (kAffine) v = fmaf(-zero, sum[part][j][i], v);
            acc[r][j][i] = fmaf(scale, v, acc[r][j][i]);
          }
        }
      }
    }
  }
}

// out[n .. n + 3] of one token.
template <typename Out, typename T>
__device__ __forceinline__ void StoreOut(const DecodeParams& p, int m, int n, float4 sum) {
  const T* bias = static_cast<const T*>(p.bias);
  Out* out = static_cast<Out*>(p.out) + static_cast<int64_t>(m) * p.n + n;
  const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
  alignas(16) Out values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float b = bias != nullptr && n + i < p.n ? ToFloat(bias[n + i]) : 0.0f;
    values[i] = FromFloat<Out>(fmaf(p.alpha, sums[i], b));
  }
  if (p.n % 4 == 0) {
    using Vector = std::conditional_t<sizeof(Out) == 4, float4, uint2>;
    if (n < p.n) *reinterpret_cast<Vector*>(out) = *reinterpret_cast<const Vector*>(values);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n + i < p.n) out[i] = values[i];
    }
  }
}

template <typename T, int kTileN, int kTileM, int kStages, bool kZeros, bool kSplitBlocks>
__global__ void __launch_bounds__(DecodeMaxThreads(kTileN, kTileM))
    DecodeKernel(const __grid_constant__ DecodeParams p) {
  static_assert(kTileN % kBlockN == 0 && kTileM % 8 == 0);
  constexpr int kRowBlocks = kTileN / kBlockN, kTokenBlocks = kTileM / 8;
  extern __shared__ __align__(128) char shared[];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  const int rank = blockIdx.x % p.split_k;
  const int tile = blockIdx.x / p.split_k;
  const int n0 = tile / p.tiles_m * kTileN, m0 = tile % p.tiles_m * kTileM;
  const int block_begin = static_cast<int>(static_cast<int64_t>(p.blocks_k) * rank / p.split_k);
  const int block_end = static_cast<int>(static_cast<int64_t>(p.blocks_k) * (rank + 1) / p.split_k);
  const int blocks = (block_end - block_begin - warp + num_warps - 1) / num_warps;  // this warp's

  char* const partials = shared + ReceivedBytes(kTileN, kTileM, p.split_k);
  char* const ring = partials + warp * p.warp_bytes;
  const uint32_t ring_address = SharedAddress(ring);

  StageLoader<T, kTileN, kTileM, kZeros, kSplitBlocks> loader(p, n0, m0, block_begin + warp,
                                                              num_warps, lane);
#pragma unroll
  for (int s = 0; s < kStages; ++s) {
    if (s < blocks) loader.Load(ring_address + s * p.stage_bytes);
    CopyAsyncCommit();
  }

#if __CUDA_ARCH__ >= 900
  if (p.split_k > 1) ClusterArriveRelaxed();
#endif

  const uint32_t zero_row = ring_address + kStages * p.stage_bytes;
  if (lane < kZeroBytes / 4) reinterpret_cast<uint32_t*>(ring + kStages * p.stage_bytes)[lane] = 0;
  const int rows = min(p.x_rows, p.m - m0);
  uint32_t x_address[kTokenBlocks];
  bool x_exists[kTokenBlocks];
#pragma unroll
  for (int j = 0; j < kTokenBlocks; ++j) {
    const int row = 8 * j + lane % 8;
    x_exists[j] = row < rows;
    x_address[j] = kRowBlocks * kBlockBytes + row * kXRowBytes + 16 * ((lane / 8) ^ (lane % 8));
  }

  float acc[kRowBlocks][kTokenBlocks][4] = {};
  int slot = 0;
  for (int i = 0; i < blocks; ++i) {
    const uint32_t stage = ring_address + slot * p.stage_bytes;
    CopyAsyncWait<kStages - 1>();
    __syncwarp();  // invariant 1
    MultiplyBlock<T, kTileN, kTileM, kZeros, kSplitBlocks>(stage, p.x_rows * kXRowBytes, x_address,
                                                           x_exists, zero_row, lane, acc);
    __syncwarp();  // invariants 2 and 3
    if (i + kStages < blocks) loader.Load(stage);
    CopyAsyncCommit();
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }

  constexpr int kStride = PartialStride(kTileN);
  float* const partial = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int r = 0; r < kRowBlocks; ++r) {
#pragma unroll
    for (int j = 0; j < kTokenBlocks; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        partial[(8 * j + lane % 4 * 2 + i % 2) * kStride + 16 * r + lane / 4 + i / 2 * 8] =
            acc[r][j][i];
    }
  }
#if __CUDA_ARCH__ >= 900
  if (p.split_k > 1) ClusterWait();  // invariant 5
#endif
  __syncthreads();  // invariant 4

  const auto store = [&](int idx, float4 sum) {
    const int m = m0 + idx / (kTileN / 4), n = n0 + idx % (kTileN / 4) * 4;
    if (p.out_float32) {
      StoreOut<float, T>(p, m, n, sum);
    } else {
      StoreOut<T, T>(p, m, n, sum);
    }
  };
  const auto add = [](float4& a, const float4& b) {
    a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w;
  };
  const int quads = rows * (kTileN / 4);  // groups of 4 outputs
#if __CUDA_ARCH__ >= 900
  const int quads_per_rank = (quads + p.split_k - 1) / p.split_k;
#endif
  for (int idx = threadIdx.x; idx < quads; idx += blockDim.x) {
    const int offset = (idx / (kTileN / 4) * kStride + idx % (kTileN / 4) * 4) * 4;
    float4 sum = *reinterpret_cast<const float4*>(partials + offset);
    for (int w = 1; w < num_warps; ++w)
      add(sum, *reinterpret_cast<const float4*>(partials + w * p.warp_bytes + offset));
    if (p.split_k == 1) {
      store(idx, sum);
      continue;
    }
#if __CUDA_ARCH__ >= 900
    const int owner = idx / quads_per_rank;
    StoreCluster(SharedAddress(shared) + 16 * (rank * quads_per_rank + idx % quads_per_rank), owner,
                 sum);
#endif
  }
#if __CUDA_ARCH__ >= 900
  if (p.split_k == 1) return;
  ClusterArriveRelease();
  ClusterWait();  // invariant 6
  const int first = rank * quads_per_rank;
  const int count = min(quads_per_rank, quads - first);
  for (int idx = threadIdx.x; idx < count; idx += blockDim.x) {
    const float4* parts = reinterpret_cast<const float4*>(shared) + idx;
    float4 sum = parts[0];
    for (int s = 1; s < p.split_k; ++s) add(sum, parts[s * quads_per_rank]);
    store(first + idx, sum);
  }
#endif
}

template <typename T>
DecodeKernelPointer FindDecodeKernel(const Config& c, bool has_zeros, bool split_blocks) {
#define W4A16_DECODE(N, M, WARPS, STAGES, SPLIT)                                      \
  static_assert(WARPS * 32 <= DecodeMaxThreads(N, M));                                \
  if (c.tile_n == N && c.tile_m == M && c.stages == STAGES) {                         \
    return has_zeros      ? split_blocks ? DecodeKernel<T, N, M, STAGES, true, true>  \
                                         : DecodeKernel<T, N, M, STAGES, true, false> \
           : split_blocks ? DecodeKernel<T, N, M, STAGES, false, true>                \
                          : DecodeKernel<T, N, M, STAGES, false, false>;              \
  }
#define W4A16_WGMMA(...)
#define W4A16_CUTLASS(...)
#include "../configs.inc"
#undef W4A16_DECODE
#undef W4A16_WGMMA
#undef W4A16_CUTLASS
  return nullptr;
}

}  // namespace w4a16
