// w[K, N] -> packed words, scales, zeros, by the rule of quantize.h.
//
// QuantizeKernel: a CTA owns kRows rows of K and 128 columns, held in registers between the two
// looks at them (thread: 8 neighbouring columns, kRows / 16 neighbouring rows, which lie in one
// group):
//
//   registers -> min, max per thread -> shared -> scale, zero per (group, column) -> shared
//             -> codes as bytes in shared memory -> packed words (PackColumns)
//
// That needs groups that divide kRows. For others ScaleKernel finds scales and zeros first, and
// QuantizeKernel reads them (kGiven), at the price of reading w twice.
#include "../quantize.h"
#include "convert.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace w4a16 {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 128;                 // of a CTA of QuantizeKernel
constexpr int kColumnThreads = kColumns / 8;  // side by side
constexpr int kRowThreads = kThreads / kColumnThreads;
constexpr int kCodeStride = kColumns + 32;  // bytes; spreads the rows of PackColumns over the banks

constexpr int kScaleColumns = 32;  // of a CTA of ScaleKernel
constexpr int kScaleRowThreads = kThreads / (kScaleColumns / 8);

// max and min that keep a NaN, as MaxOrNan and MinOrNan.
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

struct Range {
  float lo, hi;  // both include 0

  __device__ __forceinline__ void Add(float v) { lo = MinNan(lo, v), hi = MaxNan(hi, v); }
  __device__ __forceinline__ void Add(const Range& other) {
    lo = MinNan(lo, other.lo), hi = MaxNan(hi, other.hi);
  }
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

// The codes of one column under one scale.
template <typename S>
class Encoder {
 public:
  __device__ __forceinline__ Encoder(float scale, float zero)
      : scale_(scale), zero_(zero), inverse_(1.0f / scale) {
    // Where neither the inverse nor a residual can leave float's normal range. A float32 scale
    // has too many bits for the single correction below.
    fast_ = sizeof(S) == 2 && scale >= 0x1p-60f && scale <= 0x1p60f;
  }

  __device__ __forceinline__ bool fast() const { return fast_; }
  __device__ __forceinline__ int Slow(float w) const { return CodeOf(w, scale_, zero_); }

  // w / scale, correctly rounded: one step of correction by the residual, which fma leaves exact.
  // Adding 1.5 * 2^23 then rounds to an integer, half to even, in the low bits.
  __device__ __forceinline__ int Fast(float w) const {
    const float estimate = __fmul_rn(w, inverse_);
    const float residual = __fmaf_rn(-estimate, scale_, w);
    const float quotient = __fmaf_rn(residual, inverse_, estimate);
    const int rounded = __float_as_int(__fadd_rn(quotient, 12582912.0f)) - 0x4b400000;
    return min(max(rounded + static_cast<int>(zero_), 0), 15);
  }

 private:
  float scale_, zero_, inverse_;
  bool fast_;
};

template <typename W, typename S>
__global__ void __launch_bounds__(kThreads)
    ScaleKernel(const W* __restrict__ w, int64_t k, int64_t n, int64_t group_size, int64_t ctas_n,
                S* __restrict__ scales, S* __restrict__ zeros) {
  __shared__ Range ranges[kThreads / 32][kScaleColumns];
  const int64_t group = blockIdx.x / ctas_n;
  const int column = threadIdx.x % 4 * 8;
  const int64_t n0 = blockIdx.x % ctas_n * kScaleColumns;
  const int64_t row_end = min(k, (group + 1) * group_size);
  Range range[8] = {};
  if (n0 + column < n) {
    const W* src = w + n0 + column;
#pragma unroll 8
    for (int64_t row = group * group_size + threadIdx.x / 4; row < row_end;
         row += kScaleRowThreads) {
      const auto values = Vector8<W>::Load(src + row * n, n - n0 - column, n % 8 == 0);
#pragma unroll
      for (int i = 0; i < 8; ++i) range[i].Add(ToFloat(values.v[i]));
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2)
      range[i].Add(Range{__shfl_xor_sync(~0u, range[i].lo, distance),
                    __shfl_xor_sync(~0u, range[i].hi, distance)});
    if (threadIdx.x % 32 < 4) ranges[threadIdx.x / 32][column + i] = range[i];
  }
  __syncthreads();
  const int64_t to = n0 + threadIdx.x;
  if (threadIdx.x >= kScaleColumns || to >= n) return;
  Range total = {};
  for (int i = 0; i < kThreads / 32; ++i) total.Add(ranges[i][threadIdx.x]);
  const ScaleAndZero result = ScaleOf<S>(total, zeros == nullptr);
  scales[group * n + to] = FromFloat<S>(result.scale);
  if (zeros != nullptr) zeros[group * n + to] = FromFloat<S>(result.zero);
}

template <typename W, typename S, int kRows, bool kGiven>
__global__ void __launch_bounds__(kThreads)
    QuantizeKernel(const W* __restrict__ w, int64_t k, int64_t n, int64_t group_size,
                   int64_t blocks_n, int64_t ctas_n, uint4* __restrict__ qweight, S* scales,
                   S* zeros) {
  constexpr int kRowsPerThread = kRows / kRowThreads;
  constexpr int kMaxGroups = kRows / 32;
  union Shared {
    Range ranges[kRowThreads][kColumns];
    uint8_t codes[kRows][kCodeStride];
  };
  __shared__ alignas(16) Shared shared;
  __shared__ ScaleAndZero table[kGiven ? 1 : kMaxGroups][kGiven ? 1 : kColumns];

  const int64_t k0 = blockIdx.x / ctas_n * kRows, n0 = blockIdx.x % ctas_n * kColumns;
  const int column = threadIdx.x % kColumnThreads * 8;
  const int row = threadIdx.x / kColumnThreads * kRowsPerThread;
  const int64_t columns = n - n0 - column;  // from this thread's first on
  const bool aligned = n % 8 == 0;
  const bool symmetric = zeros == nullptr;

  Vector8<W> values[kRowsPerThread];
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const int64_t from = k0 + row + i;
    values[i] = Vector8<W>::Load(w + from * n + n0 + column, from < k ? columns : 0, aligned);
  }

  ScaleAndZero scale[8];
  if constexpr (kGiven) {
    const int64_t from = min(k0 + row, k - 1) / group_size * n + n0 + column;
    const auto s = Vector8<S>::Load(scales + from, columns, aligned);
    Vector8<S> z;
    if (!symmetric) z = Vector8<S>::Load(zeros + from, columns, aligned);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      scale[i] = {ToFloat(s.v[i]), symmetric ? kSymmetricZero : ToFloat(z.v[i])};
  } else {
    Range range[8] = {};
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) range[j].Add(ToFloat(values[i].v[j]));
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) shared.ranges[threadIdx.x / kColumnThreads][column + j] = range[j];
    __syncthreads();
    const int rows_per_group = min(static_cast<int>(group_size), kRows);
    const int threads_per_group = rows_per_group / kRowsPerThread;
    for (int idx = threadIdx.x; idx < kRows / rows_per_group * kColumns; idx += kThreads) {
      const int group = idx / kColumns, c = idx % kColumns;
      Range total = {};
      for (int i = 0; i < threads_per_group; ++i)
        total.Add(shared.ranges[group * threads_per_group + i][c]);
      const ScaleAndZero result = ScaleOf<S>(total, symmetric);
      table[group][c] = result;
      const int64_t first = k0 + group * rows_per_group;
      if (first < k && n0 + c < n) {
        const int64_t to = first / rows_per_group * n + n0 + c;
        scales[to] = FromFloat<S>(result.scale);
        if (!symmetric) zeros[to] = FromFloat<S>(result.zero);
      }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 8; ++j) scale[j] = table[row / rows_per_group][column + j];
  }

#pragma unroll
  for (int j = 0; j < 8; j += 4) {
    const Encoder<S> encoders[4] = {{scale[j].scale, scale[j].zero},
                                    {scale[j + 1].scale, scale[j + 1].zero},
                                    {scale[j + 2].scale, scale[j + 2].zero},
                                    {scale[j + 3].scale, scale[j + 3].zero}};
    const bool fast =
        encoders[0].fast() && encoders[1].fast() && encoders[2].fast() && encoders[3].fast();
    // Padding gets code 0.
    const int64_t left = columns - j;
    const uint32_t mask = left >= 4 ? ~0u : left <= 0 ? 0 : (1u << (8 * left)) - 1;
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      uint32_t codes = 0;
      if (fast) {
#pragma unroll
        for (int c = 0; c < 4; ++c)
          codes |= encoders[c].Fast(ToFloat(values[i].v[j + c])) << (8 * c);
      } else {
        for (int c = 0; c < 4; ++c)
          codes |= encoders[c].Slow(ToFloat(values[i].v[j + c])) << (8 * c);
      }
      *reinterpret_cast<uint32_t*>(&shared.codes[row + i][column + j]) =
          k0 + row + i < k ? codes & mask : 0;
    }
  }
  __syncthreads();

  constexpr int kBlocksN = kColumns / kBlockN;
  for (int idx = threadIdx.x; idx < kRows / kBlockK * kBlocksN * 8; idx += kThreads) {
    const int t = idx % 4, quad = idx / 4 % 2, nb = idx / 8 % kBlocksN, kb = idx / 8 / kBlocksN;
    const int64_t block_k = k0 / kBlockK + kb, block_n = n0 / kBlockN + nb;
    if (block_n >= blocks_n || block_k * kBlockK >= k) continue;
    const uint8_t* codes = &shared.codes[kb * kBlockK][nb * kBlockN + 4 * quad];
    uint4 packed[4];
    PackColumns(
        t,
        [&](int n8, int r) {
          return *reinterpret_cast<const uint32_t*>(codes + r * kCodeStride + 8 * n8);
        },
        packed);
    uint4* out = qweight + (block_k * blocks_n + block_n) * (kBlockBytes / 16);
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
        return Launch("quantize", kernel, CeilDiv(k, rows) * ctas_n, kThreads, stream, values, k, n,
                      group, BlocksN(n), ctas_n, reinterpret_cast<uint4*>(qweight), s, z);
      };
      if (group == 32 || group == 64 || group == 128)
        return quantize(QuantizeKernel<W, S, 128, false>, 128);
      if (group == 256) return quantize(QuantizeKernel<W, S, 256, false>, 256);
      const int64_t strips = CeilDiv(n, kScaleColumns);
      if (Status status = Launch("quantize_scales", ScaleKernel<W, S>, CeilDiv(k, group) * strips,
                                 kThreads, stream, values, k, n, group, strips, s, z);
          !status.ok())
        return status;
      return quantize(QuantizeKernel<W, S, 128, true>, 128);
    });
  });
}

}  // namespace w4a16
