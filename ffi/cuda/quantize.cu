// w[K, N] -> packed words, scales, zeros, by the rule of quantize.h.
//
// QuantizeKernel: a CTA owns kRows rows of K and 64 columns, held in registers between the two
// looks at them (thread: 8 neighbouring columns, 8 neighbouring rows, which lie in one group):
//
//   registers -> min, max per thread -> shared -> scale, zero per (group, column) -> shared
//             -> codes as bytes in shared memory -> packed words (PackColumns)
//
// That needs groups that divide kRows. For others ScaleKernel finds scales and zeros first, and
// QuantizeKernel reads them (kGiven), at the price of reading w twice.
#include <type_traits>

#include "../quantize.h"
#include "convert.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace w4a16 {
namespace {

constexpr int kColumns = 64;                  // of a CTA of QuantizeKernel
constexpr int kColumnThreads = kColumns / 8;  // side by side
constexpr int kRowsPerThread = 8;
constexpr int kCodeStride = kColumns + 32;  // bytes; spreads the rows of PackColumns over the banks

constexpr int kScaleThreads = 256;  // of a CTA of ScaleKernel
constexpr int kScaleColumns = 32;
constexpr int kScaleRowThreads = kScaleThreads / (kScaleColumns / 8);

// max and min that keep a NaN, as MaxOrNan and MinOrNan.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
__device__ __forceinline__ float MaxNan(float a, float b) {
  float d;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
__device__ __forceinline__ float MinNan(float a, float b) {
  float d;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
#else
__device__ __forceinline__ float MaxNan(float a, float b) { return a > b || isnan(a) ? a : b; }
__device__ __forceinline__ float MinNan(float a, float b) { return a < b || isnan(a) ? a : b; }
#endif
__device__ __forceinline__ __half2 MaxNan(__half2 a, __half2 b) { return __hmax2_nan(a, b); }
__device__ __forceinline__ __half2 MinNan(__half2 a, __half2 b) { return __hmin2_nan(a, b); }
__device__ __forceinline__ __nv_bfloat162 MaxNan(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __hmax2_nan(a, b);
}
__device__ __forceinline__ __nv_bfloat162 MinNan(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __hmin2_nan(a, b);
}

struct Range {
  float lo, hi;  // both include 0

  __device__ __forceinline__ void Add(const Range& other) {
    lo = MinNan(lo, other.lo), hi = MaxNan(hi, other.hi);
  }
};

// Ranges of 8 columns, kept in the weights' own type, which loses nothing.
template <typename W>
class ColumnRanges {
 public:
  __device__ __forceinline__ void Add(const Vector8<W>& v) {
    const Lanes* lanes = reinterpret_cast<const Lanes*>(v.v);
#pragma unroll
    for (int i = 0; i < kLanes; ++i)
      lo_[i] = MinNan(lo_[i], lanes[i]), hi_[i] = MaxNan(hi_[i], lanes[i]);
  }
  __device__ __forceinline__ Range operator[](int i) const {
    return {ToFloat(reinterpret_cast<const W*>(lo_)[i]),
            ToFloat(reinterpret_cast<const W*>(hi_)[i])};
  }

 private:
  using Lanes =
      std::conditional_t<std::is_same_v<W, float>, float,
                         std::conditional_t<std::is_same_v<W, __half>, __half2, __nv_bfloat162>>;
  static constexpr int kLanes = 8 * sizeof(W) / sizeof(Lanes);
  Lanes lo_[kLanes] = {}, hi_[kLanes] = {};
};

struct ScaleAndZero {
  float scale, zero;
};

template <typename S>
__device__ __forceinline__ ScaleAndZero ScaleOf(const Range& range, bool symmetric) {
  const float scale = symmetric ? MaxNan(range.hi, -range.lo) * kSymmetricStep
                                : (range.hi - range.lo) * kAsymmetricStep;
  const float stored = ToFloat(FromFloat<S>(scale));
  return {stored, symmetric ? kSymmetricZero : ZeroPoint(range.lo, stored)};
}

// CodeOf for 4 neighbouring columns, a byte each, in fewer instructions where it applies.
template <typename S>
class Encoder {
 public:
  __device__ __forceinline__ explicit Encoder(const ScaleAndZero* columns) {
    // Neither the inverse nor a residual may leave float's normal range, the stored scale must be
    // within a 128th of the exact one (normal in its own type) and have few bits. A NaN fails the
    // comparisons.
    applies_ = sizeof(S) == 2;
    bias_ = 0u - 0x40404040u;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      scale_[c] = columns[c].scale;
      inverse_[c] = __fdividef(1.0f, columns[c].scale);
      bias_ += static_cast<uint32_t>(columns[c].zero) << (8 * c);
      applies_ &= columns[c].scale >= 0x1p-14f && columns[c].scale <= 0x1p60f;
    }
  }

  __device__ __forceinline__ bool applies() const { return applies_; }

  // w / scale, correctly rounded: the estimate is off by a few units in the last place, and one
  // correction by the residual, which fma leaves exact, suffices for a scale of 11 bits. Adding
  // 1.5 * 2^23 + 64 then rounds it to an integer, half to even, whose low byte is 64 + rint(w /
  // scale). With the zero points that makes 0 .. 16, since |w| is at most 7.5 scales, or the range
  // 15 scales; 16 becomes 15.
  __device__ __forceinline__ uint32_t Codes(const float (&w)[4]) const {
    uint32_t bits[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float estimate = __fmul_rn(w[c], inverse_[c]);
      const float residual = __fmaf_rn(-estimate, scale_[c], w[c]);
      const float quotient = __fmaf_rn(residual, inverse_[c], estimate);
      bits[c] = __float_as_uint(__fadd_rn(quotient, 12582912.0f + 64.0f));
    }
    const uint32_t low = __byte_perm(bits[0], bits[1], 0x0040);
    const uint32_t high = __byte_perm(bits[2], bits[3], 0x0040);
    const uint32_t codes = __byte_perm(low, high, 0x5410) + bias_;
    return codes - ((codes >> 4) & 0x01010101);
  }

 private:
  float scale_[4], inverse_[4];
  uint32_t bias_;
  bool applies_;
};

template <typename W, typename S>
__global__ void __launch_bounds__(kScaleThreads)
    ScaleKernel(const W* __restrict__ w, int k, int n, int group_size, int ctas_n,
                S* __restrict__ scales, S* __restrict__ zeros) {
  __shared__ Range ranges[kScaleThreads / 32][kScaleColumns];
  const int cta = blockIdx.x;
  const int group = cta / ctas_n;
  const int column = threadIdx.x % 4 * 8;
  const int n0 = cta % ctas_n * kScaleColumns;
  const int row_end = min(k, (group + 1) * group_size);
  ColumnRanges<W> own;
  if (n0 + column < n) {
    const W* src = w + n0 + column;
#pragma unroll 8
    for (int row = group * group_size + threadIdx.x / 4; row < row_end; row += kScaleRowThreads)
      own.Add(Vector8<W>::Load(src + static_cast<int64_t>(row) * n, n - n0 - column, n % 8 == 0));
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    Range range = own[i];
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2)
      range.Add(Range{__shfl_xor_sync(~0u, range.lo, distance),
                      __shfl_xor_sync(~0u, range.hi, distance)});
    if (threadIdx.x % 32 < 4) ranges[threadIdx.x / 32][column + i] = range;
  }
  __syncthreads();
  const int to = n0 + static_cast<int>(threadIdx.x);
  if (threadIdx.x >= kScaleColumns || to >= n) return;
  Range total = {};
  for (int i = 0; i < kScaleThreads / 32; ++i) total.Add(ranges[i][threadIdx.x]);
  const ScaleAndZero result = ScaleOf<S>(total, zeros == nullptr);
  const int64_t at = static_cast<int64_t>(group) * n + to;
  scales[at] = FromFloat<S>(result.scale);
  if (zeros != nullptr) zeros[at] = FromFloat<S>(result.zero);
}

// Several CTAs on an SM overlap one's loads with another's arithmetic; the weights they hold in
// registers bound their number.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kCtasOf16Bits = 4;  // a fifth would spill there
#else
constexpr int kCtasOf16Bits = 5;
#endif
constexpr int CtasPerSm(int value_bytes, int rows) {
  return (value_bytes == 4 ? 4 : kCtasOf16Bits) * 128 / rows;
}
constexpr int ThreadsForRows(int rows) { return rows / kRowsPerThread * kColumnThreads; }

template <typename W, typename S, int kRows, bool kGiven>
__global__ void __launch_bounds__(ThreadsForRows(kRows), CtasPerSm(sizeof(W), kRows))
    QuantizeKernel(const W* __restrict__ w, int k, int n, int group_size, int blocks_n, int ctas_n,
                   uint4* __restrict__ qweight, S* scales, S* zeros) {
  constexpr int kThreads = kRows / kRowsPerThread * kColumnThreads;
  constexpr int kRowThreads = kRows / kRowsPerThread;
  constexpr int kChunks = kRows / 32;  // of rows, each in one group
  union Shared {
    Range ranges[kRowThreads][kColumns];
    uint8_t codes[kRows][kCodeStride];
  };
  __shared__ alignas(16) Shared shared;
  __shared__ ScaleAndZero table[kChunks][kColumns];

  const int cta = blockIdx.x;
  const int k0 = cta / ctas_n * kRows, n0 = cta % ctas_n * kColumns;
  const int column = threadIdx.x % kColumnThreads * 8;
  const int row = threadIdx.x / kColumnThreads * kRowsPerThread;
  const int columns = n - n0 - column;  // from this thread's first on
  const bool aligned = n % 8 == 0;
  const bool symmetric = zeros == nullptr;

  Vector8<W> values[kRowsPerThread];
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const int from = k0 + row + i;
    values[i] = Vector8<W>::Load(w + static_cast<int64_t>(from) * n + n0 + column,
                                 from < k ? columns : 0, aligned);
  }

  if constexpr (!kGiven) {
    ColumnRanges<W> own;
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) own.Add(values[i]);
#pragma unroll
    for (int j = 0; j < 8; ++j) shared.ranges[threadIdx.x / kColumnThreads][column + j] = own[j];
    __syncthreads();
  }
  const int rows_per_group = min(group_size, kRows);
  for (int idx = threadIdx.x; idx < kChunks * kColumns; idx += kThreads) {
    const int chunk = idx / kColumns, c = idx % kColumns;
    const int first = k0 + 32 * chunk;
    const int64_t at = static_cast<int64_t>(first / group_size) * n + n0 + c;
    const bool exists = first < k && n0 + c < n;
    if constexpr (kGiven) {
      table[chunk][c] = exists ? ScaleAndZero{ToFloat(scales[at]),
                                              symmetric ? kSymmetricZero : ToFloat(zeros[at])}
                               : ScaleAndZero{};
    } else if (32 * chunk % rows_per_group == 0) {
      Range total = {};
      for (int i = 32 * chunk; i < 32 * chunk + rows_per_group; i += kRowsPerThread)
        total.Add(shared.ranges[i / kRowsPerThread][c]);
      const ScaleAndZero result = ScaleOf<S>(total, symmetric);
      for (int i = 0; i < rows_per_group / 32; ++i) table[chunk + i][c] = result;
      if (exists) {
        scales[at] = FromFloat<S>(result.scale);
        if (!symmetric) zeros[at] = FromFloat<S>(result.zero);
      }
    }
  }
  __syncthreads();

#pragma unroll
  for (int j = 0; j < 8; j += 4) {
    ScaleAndZero scale[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) scale[c] = table[row / 32][column + j + c];
    const Encoder<S> encoder(scale);
    // Padding gets code 0.
    const int left = columns - j;
    const uint32_t mask = left >= 4 ? ~0u : left <= 0 ? 0 : (1u << (8 * left)) - 1;
    if (encoder.applies()) {
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) {
        float quad[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) quad[c] = ToFloat(values[i].v[j + c]);
        const uint32_t codes = encoder.Codes(quad);
        *reinterpret_cast<uint32_t*>(&shared.codes[row + i][column + j]) =
            k0 + row + i < k ? codes & mask : 0;
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < 4 * kRowsPerThread; ++i) {
        const int r = row + i / 4, c = column + j + i % 4;
        int code = 0;
        if (k0 + r < k && n0 + c < n)
          code = CodeOf(ToFloat(w[static_cast<int64_t>(k0 + r) * n + n0 + c]),
                        table[row / 32][c].scale, table[row / 32][c].zero);
        shared.codes[r][c] = static_cast<uint8_t>(code);
      }
    }
  }
  __syncthreads();

  constexpr int kBlocksN = kColumns / kBlockN;
  for (int idx = threadIdx.x; idx < kRows / kBlockK * kBlocksN * 8; idx += kThreads) {
    const int t = idx % 4, quad = idx / 4 % 2, nb = idx / 8 % kBlocksN, kb = idx / 8 / kBlocksN;
    const int block_k = k0 / kBlockK + kb, block_n = n0 / kBlockN + nb;
    if (block_n >= blocks_n || block_k * kBlockK >= k) continue;
    const uint8_t* codes = &shared.codes[kb * kBlockK][nb * kBlockN + 4 * quad];
    uint4 packed[4];
    PackColumns(
        t,
        [&](int n8, int r) {
          return *reinterpret_cast<const uint32_t*>(codes + r * kCodeStride + 8 * n8);
        },
        packed);
    uint4* out =
        qweight + (static_cast<int64_t>(block_k) * blocks_n + block_n) * (kBlockBytes / 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[4 * (4 * quad + i) + t] = packed[i];
  }
}

}  // namespace

Status QuantizeCuda(const void* w, DType w_dtype, int64_t k, int64_t n, int64_t group_size,
                    DType scale_dtype, uint32_t* qweight, void* scales, void* zeros,
                    cudaStream_t stream) {
  if (k == 0 || n == 0) return {};
  // A column's only group may be widened, because rows past K count as zeros.
  const int64_t group = group_size < k ? group_size : k <= 128 ? 128 : k <= 256 ? 256 : k;
  return DispatchType(w_dtype, [&]<typename W>() {
    return DispatchType(scale_dtype, [&]<typename S>() -> Status {
      const W* values = static_cast<const W*>(w);
      S *const s = static_cast<S*>(scales), *const z = static_cast<S*>(zeros);
      const int64_t ctas_n = CeilDiv(n, kColumns);
      const auto quantize = [&](auto kernel, int rows) {
        return Launch("quantize", kernel, CeilDiv(k, rows) * ctas_n, ThreadsForRows(rows), stream,
                      values, k, n, group, BlocksN(n), ctas_n, reinterpret_cast<uint4*>(qweight), s,
                      z);
      };
      if (group == 32 || group == 64 || group == 128)
        return quantize(QuantizeKernel<W, S, 128, false>, 128);
      if (group == 256) return quantize(QuantizeKernel<W, S, 256, false>, 256);
      const int64_t strips = CeilDiv(n, kScaleColumns);
      if (Status status = Launch("quantize_scales", ScaleKernel<W, S>, CeilDiv(k, group) * strips,
                                 kScaleThreads, stream, values, k, n, group, strips, s, z);
          !status.ok())
        return status;
      return quantize(QuantizeKernel<W, S, 128, true>, 128);
    });
  });
}

}  // namespace w4a16
