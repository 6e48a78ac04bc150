// What decode and ragged decode share: the products of a stage, and the sums of partial tiles.
// decode.cuh has the picture of both and says what their speed hangs on.
#pragma once

#include "convert.cuh"
#include "decode.h"
#include "dequant.cuh"
#include "ptx.cuh"

namespace w4a16 {

// Whether this code is for Turing.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
inline constexpr bool kTuring = true;
#else
inline constexpr bool kTuring = false;
#endif

// Whether x comes by tensor copies.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
inline constexpr bool kTensorCopies = true;
#else
inline constexpr bool kTensorCopies = false;
#endif

// A stage's mbarrier.
__device__ __forceinline__ uint32_t StageBarrier(const DecodeParams& p, uint32_t stage) {
  return stage + p.stage_bytes - kStageBarrierBytes;
}

__host__ __device__ constexpr int CeilLog2(int v) { return v > 1 ? 1 + CeilLog2((v + 1) / 2) : 0; }

// Whether scales and zeros of a warp's rows are read by ldmatrix: one instruction instead of four.
// Kernels of many parts, which hold more of them at a time, often have too few registers for it.
__device__ constexpr bool FactorsByMatrix(int tile_n, int tile_m, bool zeros, int parts) {
  return parts == 1 || (kTensorCopies && !zeros && tile_n <= 112 && tile_n * tile_m <= 64 * 16);
}

// Where a warp has rows enough to share it, sum(x) costs less than subtracting 8 from every code:
// the more parts, the more sums (at 16 tokens, 48 rows in groups of 64 take 2.5% less with exact
// codes, 64 rows in groups of 32 1.7).
__host__ __device__ constexpr bool UsesAffineCodes(int rows, int tile_m, bool zeros, int parts) {
  return zeros || rows > (parts < 4 ? parts + 1 : 4) * tile_m;
}

// Where chunk `chunk` < 8 of 16 bytes of row `row` lies in a block of K of a stage's x.
__device__ __forceinline__ uint32_t XChunk(uint32_t row, uint32_t chunk) {
  return row * (kBlockK * 2) + (chunk ^ row % 8) * 16;
}

// Column n0 of the scales (row < kParts) or zeros of part row % kParts of a unit of kUnitK codes
// that begins at k0.
template <typename T, int kUnitK, bool kZeros, int kParts>
__device__ __forceinline__ const T* ScaleSource(const DecodeParams& p, int k0, int n0, int row) {
  const int part = row % kParts;
  // The last unit may reach past K.
  const int k = part == 0 ? k0 : min(k0 + part * (kUnitK / kParts), p.k - 1);
  const int group = static_cast<int>(__umulhi(k, p.group_multiplier) >> p.group_shift);
  return static_cast<const T*>(!kZeros || row < kParts ? p.scales : p.zeros) +
         static_cast<int64_t>(group) * p.n + n0;
}

// Copies a unit's weights: row_blocks of a block of K exist, and all blocks of K below p.k.
// `whole`: all of the unit does.
template <int kTileBlocks, int kBlocks>
__device__ __forceinline__ void CopyWeights(const DecodeParams& p, uint32_t dst,
                                            const char* weights, int64_t block_row_bytes,
                                            uint64_t policy, bool whole, int k0, int row_blocks) {
  if (whole) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < kTileBlocks; ++r)
        CopyAsync(dst + (b * kTileBlocks + r) * kBlockBytes,
                  weights + b * block_row_bytes + r * kBlockBytes, policy);
    }
  } else {
#pragma unroll 1
    for (int b = 0; b < kBlocks && k0 + b * kBlockK < p.k; ++b) {
#pragma unroll 1
      for (int r = 0; r < kTileBlocks && r < row_blocks; ++r)
        CopyAsync(dst + (b * kTileBlocks + r) * kBlockBytes,
                  weights + b * block_row_bytes + r * kBlockBytes, policy);
    }
  }
}

// Copies kUnitK columns of the rows from x on, which need no alignment; zeros beyond K.
template <int kTileM, int kUnitK, typename T>
__device__ __forceinline__ void CopyUnaligned(const DecodeParams& p, uint32_t dst, const T* x,
                                              int lane, int k0, int rows) {
  for (int i = lane; i < rows * kUnitK; i += 32) {
    const int row = i / kUnitK, k = i % kUnitK;
    uint16_t v = 0;
    if (k0 + k < p.k) v = reinterpret_cast<const uint16_t*>(x)[static_cast<int64_t>(row) * p.k + k];
    StoreShared16(dst + k / kBlockK * XBytes(kTileM, 1) + XChunk(row, k % kBlockK / 8) + k % 8 * 2,
                  v);
  }
}

// Where a lane finds its operands in a stage; sum_lane has the sum of its first token, the fourth
// lane from there that of its second.
struct StageOffsets {
  uint32_t words, scales, x, sum_lane;
};

// What stands for a token that does not exist matters to no other.
template <int kTileN, int kXRows, int kBlocks, bool kZeros, int kParts>
__device__ __forceinline__ StageOffsets FindOffsets(uint32_t lane) {
  constexpr int kWeightBytes = kBlocks * (kTileN / kBlockN) * kBlockBytes;
  return {
      .words = 16 * lane,
      .scales = kWeightBytes + XBytes(kXRows, kBlocks) +
                (FactorsByMatrix(kTileN, kXRows, kZeros, kParts) ? lane / 8 * 16 : lane / 4 * 2),
      .x = kWeightBytes + XChunk(lane % 8, lane / 8),
      .sum_lane = lane % 4 * 8,
  };
}

// sum(x) of 8 tokens over Dequantizer's step of row half 0, as accumulators hold them: of token
// lane % 4 * 2 + i. x is operand B of kSteps mma steps. As operand A, that of two steps has a token
// in every row and half of K in rows 0 .. 7 and 8 .. 15, so that one mma sums both; but two steps
// alone, of no other tokens, are summed sooner as operand B.
template <typename T, int kSteps, int kTokenBlocks>
__device__ __forceinline__ void SumTokens(const uint32_t (&x)[kSteps][2], uint32_t sum_lane,
                                          float (&sum)[2]) {
  using D = Dequantizer<T>;
  static_assert(kSteps % 2 == 0);
  if constexpr (kSteps == 2 && kTokenBlocks == 1) {
    constexpr uint32_t kOnes[4] = {D::InverseStep(0), D::InverseStep(0), D::InverseStep(0),
                                   D::InverseStep(0)};
    float tokens[4] = {};
    Mma<T>(tokens, kOnes, x[0][0], x[0][1], tokens);
    Mma<T>(tokens, kOnes, x[1][0], x[1][1], tokens);
    sum[0] = tokens[0], sum[1] = tokens[1];
    return;
  }
  float rows[4] = {};
#pragma unroll
  for (int s = 0; s < kSteps; s += 2) {
    const uint32_t a[4] = {x[s][0], x[s][1], x[s + 1][0], x[s + 1][1]};
    Mma<T>(rows, a, D::InverseStep(0), D::InverseStep(0), rows);
  }
  const float token = rows[0] + rows[2];  // lane / 4
#pragma unroll
  for (int i = 0; i < 2; ++i) sum[i] = __shfl_sync(0xffffffff, token, sum_lane + 4 * i);
}

// Scales, or zeros, of one or two row blocks: [row block][row half]. By ldmatrix a row block is two
// matrices, of which every row is the same 8 values.
template <typename T, bool kByMatrix>
__device__ __forceinline__ void LoadFactors(uint32_t address, int row_blocks,
                                            float (&factors)[2][2]) {
  uint32_t bits[4];
  if constexpr (kByMatrix) {
    if (row_blocks == 2) {
      LoadMatrix4Transposed(address, bits);
    } else {
      LoadMatrix2Transposed(address, bits);
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * row_blocks; ++i) {
    const uint16_t value = kByMatrix ? bits[i] & 0xffff : LoadShared16(address + 16 * i);
    factors[i / 2][i % 2] = ToFloat(reinterpret_cast<const T&>(value));
  }
}

// The products of one unit, over Dequantizer's Step with affine codes, else over its ExactStep:
// acc[r][j] += rows 16 r .. of the tile times tokens 8 j .. .
template <typename T, int kTileN, int kTileM, int kXRows, int kBlocks, bool kZeros, int kParts>
__device__ __forceinline__ void MultiplyStage(uint32_t stage, const StageOffsets& offsets,
                                              float (&acc)[kTileN / 16][kTileM / 8][4]) {
  using D = Dequantizer<T>;
  constexpr int kTileBlocks = kTileN / kBlockN, kTokenBlocks = kTileM / 8;
  constexpr int kSteps = 4 * kBlocks / kParts;  // mma steps in a part
  constexpr bool kAffine = UsesAffineCodes(kTileN, kTileM, kZeros, kParts);
  // Bytes cost an instruction less a word, and two more for every part of 16 rows by 8 tokens.
  constexpr bool kBytes = !kAffine || (D::kAddsHalves && (kParts == 1 || kTileM == 8));
  // An mma takes long to finish and the next on the same accumulator waits for it, so several
  // independent chains run abreast: kRows row blocks, kChains each; one row block first, if they
  // are odd.
  constexpr int kRows = 2, kOdd = kTileBlocks % kRows;
  constexpr int kChains = kTileM == 8 && kSteps > 2 ? 2 : 1;
  constexpr bool kByMatrix = FactorsByMatrix(kTileN, kXRows, kZeros, kParts);
  const uint32_t words_address = stage + offsets.words, scale_address = stage + offsets.scales;
  // Of the first and the second half of a block: the swizzle takes chunk c + 4 to c ^ 4.
  const uint32_t x_addresses[2] = {stage + offsets.x, (stage + offsets.x) ^ 64};

  // Parts are outermost, so that x and its sums live for one part alone.
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    uint32_t x[kTokenBlocks][kSteps][2];  // operand B of every step
#pragma unroll
    for (int j = 0; j < kTokenBlocks; ++j) {
#pragma unroll
      for (int s = 0; s < kSteps; s += 2) {
        const int i = (part * kSteps + s) / 2;
        uint32_t v[4];
        LoadMatrix4(x_addresses[i % 2] + (i / 2 * kXRows + 8 * j) * (kBlockK * 2), v);
        if constexpr (kAffine) {
#pragma unroll
          for (uint32_t& pair : v) pair = D::LargeX(pair);
        }
        x[j][s][0] = v[0], x[j][s][1] = v[1];
        x[j][s + 1][0] = v[2], x[j][s + 1][1] = v[3];
      }
    }
    // At the step of either row half; minus: what 8 more in every code added, to be added to sums
    // as they are.
    float sum[kTokenBlocks][4], minus[kTokenBlocks][4];
    if constexpr (kAffine) {
      constexpr float kRatio = D::Step(0) / D::Step(1), kEight = kSymmetricZero + D::kOffset;
#pragma unroll
      for (int j = 0; j < kTokenBlocks; ++j) {
        float tokens[2];
        SumTokens<T, kSteps, kTokenBlocks>(x[j], offsets.sum_lane, tokens);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sum[j][i] = tokens[i];
          sum[j][i + 2] = kRatio * tokens[i];
          minus[j][i] = -kEight * (kBytes ? 1 + kRatio : 1) * tokens[i];
          minus[j][i + 2] = -kEight * kRatio * tokens[i];
        }
      }
    }
#pragma unroll
    for (int pass = 0; pass < (kTileBlocks + kOdd) / kRows; ++pass) {
      const int r0 = pass == 0 ? 0 : kRows * pass - kOdd;
      const int row_blocks = pass == 0 && kOdd == 1 ? 1 : kRows;
      constexpr int kWords = kSteps < 4 ? kSteps : 4;  // read at a time
      uint32_t words[kRows][kSteps];
#pragma unroll
      for (int r = 0; r < row_blocks; ++r) {
#pragma unroll
        for (int s = 0; s < kSteps; s += kWords) {
          const int b = (part * kSteps + s) / 4, first = (part * kSteps + s) % 4;
          LoadSharedWords(words_address + (b * kTileBlocks + r0 + r) * kBlockBytes + 4 * first,
                          *reinterpret_cast<uint32_t (*)[kWords]>(&words[r][s]));
        }
      }
      float partial[kRows][kChains][kTokenBlocks][4] = {};
      // Without zero points every row subtracts the same: all but the first begin with it, which
      // need not wait for it.
      const bool begun = kAffine && !kZeros && pass > 0;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int r = 0; r < row_blocks; ++r) {
          uint32_t a[4];
          if constexpr (!kAffine) {
            ExactBytes<T>(words[r][s], a);
          } else if constexpr (D::kAddsHalves && !kBytes) {
            CodeBits(words[r][s], a);
          } else {
            D::Affine(words[r][s], a);
          }
#pragma unroll
          for (int j = 0; j < kTokenBlocks; ++j)
            Mma<T>(partial[r][s % kChains][j], a, x[j][s][0], x[j][s][1],
                   begun && s == 0 ? minus[j] : partial[r][s % kChains][j]);
        }
      }
      const uint32_t factors = scale_address + 2 * (part * kTileN + 16 * r0);
      float scale[kRows][2], zero[kRows][2];
      LoadFactors<T, kByMatrix>(factors, row_blocks, scale);
      if constexpr (kZeros)
        LoadFactors<T, kByMatrix>(factors + 2 * kParts * kTileN, row_blocks, zero);
#pragma unroll
      for (int r = 0; r < row_blocks; ++r) {
#pragma unroll
        for (int j = 0; j < kTokenBlocks; ++j) {
          float v[4];
#pragma unroll
          for (int i = 3; i >= 0; --i) {
            v[i] = partial[r][0][j][i];
            if constexpr (kChains == 2) v[i] += partial[r][1][j][i];
            if (kAffine && !kZeros && !begun) v[i] += minus[j][i];
            if (kBytes && i < 2) v[i] -= v[i + 2];
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if constexpr (kAffine && kZeros)
              v[i] = fmaf(-(zero[r][i / 2] + D::kOffset), sum[j][i], v[i]);
            acc[r0 + r][j][i] = fmaf(scale[r][i / 2], v[i], acc[r0 + r][j][i]);
          }
        }
      }
    }
  }
}

// Stores a warp's sums as its partial tile: a row of columns a token.
template <int kTileN, int kTileM>
__device__ __forceinline__ void StorePartial(uint32_t partial, uint32_t lane,
                                             const float (&acc)[kTileN / 16][kTileM / 8][4]) {
  constexpr int kStride = PartialStride(kTileN);
  // All else is constant: with the lane in every address it took 30 instructions.
  const uint32_t first = partial + 4 * (lane / 4 + lane % 4 * 2 * kStride);
#pragma unroll
  for (int r = 0; r < kTileN / 16; ++r) {
#pragma unroll
    for (int j = 0; j < kTileM / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        StoreShared(first + 4 * ((8 * j + i % 2) * kStride + 16 * r + i / 2 * 8), acc[r][j][i]);
    }
  }
}

// What sums over column n, as MultiplyStage leaves them, are to be multiplied by.
template <typename T, bool kAffine>
__device__ __forceinline__ float StepOf(int n) {
  using D = Dequantizer<T>;
  const float first = kAffine ? D::Step(0) : ExactStep<T>(0);
  const float second = kAffine ? D::Step(1) : ExactStep<T>(1);
  return static_cast<uint32_t>(n) % kBlockN < kBlockN / 2 ? first : second;
}

__device__ __forceinline__ void Add(float4& a, const float4& b) {
  a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w;
}

__device__ __forceinline__ float4 LoadQuad(uint32_t address) {
  const uint4 bits = LoadShared128(address);
  return reinterpret_cast<const float4&>(bits);
}

// Adds kAbreast quads at a time, `stride` bytes apart in shared memory, while as many are left; to
// sums[1] those half a block of columns beyond.
template <int kAbreast, int kSums>
__device__ __forceinline__ void AddQuads(float4 (&sums)[kSums], uint32_t& first, int stride,
                                         int& left) {
#pragma unroll 1
  for (; left >= kAbreast; left -= kAbreast, first += kAbreast * stride) {
    float4 quads[kAbreast][kSums];
#pragma unroll
    for (int i = 0; i < kAbreast; ++i) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) quads[i][s] = LoadQuad(first + i * stride + 2 * kBlockN * s);
    }
#pragma unroll
    for (int i = 0; i < kAbreast; ++i) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) Add(sums[s], quads[i][s]);
    }
  }
}

// Sums of `count` quads, in their order.
template <int kSums>
__device__ __forceinline__ void SumQuads(uint32_t first, int stride, int count,
                                         float4 (&sums)[kSums]) {
#pragma unroll
  for (float4& sum : sums) sum = {};
  AddQuads<4>(sums, first, stride, count);
  AddQuads<1>(sums, first, stride, count);
}

__device__ __forceinline__ float4 SumQuads(uint32_t first, int stride, int count) {
  float4 sums[1];
  SumQuads(first, stride, count, sums);
  return sums[0];
}

// `left` of 4 neighbours; `aligned`: all of them or none, at a multiple of their size.
template <typename Out>
__device__ __forceinline__ void StoreQuad(Out* out, const float (&v)[4], int left, bool aligned) {
  alignas(16) Out values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = FromFloat<Out>(v[i]);
  if (aligned) {
    using Vector = std::conditional_t<sizeof(Out) == 4, float4, uint2>;
    if (left > 0) *reinterpret_cast<Vector*>(out) = *reinterpret_cast<const Vector*>(values);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < left) out[i] = values[i];
    }
  }
}

// bias[n .. n + 3] as it is stored; zeros beyond N, or where there is none. `whole`: all of them
// are below N.
template <typename T>
__device__ __forceinline__ uint2 LoadBias(const DecodeParams& p, int n, bool whole) {
  if (p.bias == nullptr) return {};
  const T* bias = static_cast<const T*>(p.bias) + n;
  if (whole || n + 4 <= p.n) return *reinterpret_cast<const uint2*>(bias);
  alignas(8) T values[4] = {};
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (n + i < p.n) values[i] = bias[i];
  }
  return *reinterpret_cast<const uint2*>(values);
}

// out[at .. at + 3], which are columns n .. n + 3: alpha * sum + bias. `whole`: all of them are
// below N, a multiple of 4.
template <typename T>
__device__ __forceinline__ void StoreOut(const DecodeParams& p, int64_t at, int n, float alpha,
                                         float4 sum, uint2 bias, bool whole) {
  const int left = whole ? 4 : p.n - n;
  const bool aligned = whole || p.n % 4 == 0;
  const T* values = reinterpret_cast<const T*>(&bias);
  float v[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = fmaf(alpha, v[i], ToFloat(values[i]));
  if (p.out_float32) {
    StoreQuad(static_cast<float*>(p.out) + at, v, left, aligned);
  } else {
    StoreQuad(static_cast<T*>(p.out) + at, v, left, aligned);
  }
}

}  // namespace w4a16
