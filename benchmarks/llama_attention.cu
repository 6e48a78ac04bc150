// A decoding step's attention as one kernel: the norm's factor, rotary embedding, cache update, softmax.
//
// A cluster of CTAs computes up to 8 query heads of one KV head of one sequence. At batch 1 it waits for memory
// most of the time, so what needs no other value is asked for at once: the position, the norm's sums of
// squares, the new rows, and each warp's first 16 cached positions, filled so far or not. Tiles of 16 positions
// go round the warps of all CTAs, each with a softmax of its own:
//
//   scores [position, head] = K [position, dim] Q^T [dim, head]              mma.m16n8k16
//   out    [dim, head]     += V^T [dim, position] weights [position, head]
//
// The order of dims is free in the first and that of rows in the second: so a lane that reads 16 bytes of a row
// of K, Q or V has operands of several products in its registers, and no cached value passes through shared
// memory. The new position's key and value replace in registers what the cache has there. At last each CTA sums
// its warps' parts and sends them, as one-way stores that a barrier counts, to the CTAs that finish the
// outputs.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int kHeads = 8;          // of a cluster
constexpr int kTile = 16;          // positions
constexpr int kWarps = 4;          // of a CTA
constexpr float kLowest = -1e30f;  // of scores; finite, for differences of it

struct Args {
  const int* position;
  const __nv_bfloat162* qkv;     // [program, query heads + 2, dim]
  const float* squares;          // [sequence, num_squares]
  const float2 *cos, *sin;       // [length, dim / 2]
  __nv_bfloat16 *keys, *values;  // [program, length, dim]
  __nv_bfloat16* out;            // [program, query heads, dim]
  int heads, num_squares, length;
  float hidden, epsilon;
};

__device__ uint32_t SharedAddress(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ uint32_t AddressInCta(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// Stores in the shared memory of a CTA of the cluster, and tells its barrier of the bytes.
__device__ void Send(uint32_t address, float4 v, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          address),
      "r"(__float_as_uint(v.x)), "r"(__float_as_uint(v.y)), "r"(__float_as_uint(v.z)),
      "r"(__float_as_uint(v.w)), "r"(barrier)
      : "memory");
}

__device__ void Send(uint32_t address, float2 v, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(address),
      "r"(__float_as_uint(v.x)), "r"(__float_as_uint(v.y)), "r"(barrier)
      : "memory");
}

// The barrier completes once `bytes` have come; for one thread.
__device__ void Expect(uint32_t barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.init.shared.b64 [%0], 1;\n"
      "fence.mbarrier_init.release.cluster;\n"
      "mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier),
      "r"(bytes)
      : "memory");
}

__device__ void Wait(uint32_t barrier) {
  uint32_t done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(barrier)
                 : "memory");
  } while (!done);
}

// d += a b, where a is 16 x 16 and b 16 x 8.
__device__ void Multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// An 8 x 8 matrix's transpose, of which a lane gives (row lane / 4, columns 2 (lane % 4) and the next).
__device__ uint32_t Transpose(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;"
      : "=r"(out)
      : "r"(reinterpret_cast<const uint32_t&>(pair)));
  return out;
}

__device__ float Exp2(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

__device__ float4 Add(float4 sum, float weight, float4 v) {
  return {sum.x + weight * v.x, sum.y + weight * v.y, sum.z + weight * v.z, sum.w + weight * v.w};
}

// Of a grid [sequence, KV head, group of query heads x CTAs].
template <int kDim, int kCtas>
__global__ void __launch_bounds__(32 * kWarps) Attend(const __grid_constant__ Args args) {
  constexpr int kThreads = 32 * kWarps;
  constexpr int kDepth = kCtas < 8 ? 2 : 1;  // tiles of a warp asked for at a time
  constexpr int kQuads = kHeads * kDim / 4;  // of outputs
  constexpr int kShare = kQuads / kCtas;     // that a CTA finishes
  constexpr int kWords = kDim / 4;           // pairs of dims in half a row
  constexpr int kRows = kHeads + 2;          // queries, key, value
  constexpr int kRounds = (kRows * kWords + kThreads - 1) / kThreads;
  constexpr int kKey = kHeads, kValue = kHeads + 1;
  // Strides that spread over the banks what lanes read and write at once.
  __shared__ alignas(16) __nv_bfloat16 rows[kRows][kDim + 32];
  __shared__ alignas(16) float sums[kWarps][kHeads][kDim + 8];
  __shared__ float tops[kWarps][kHeads], totals[kWarps][kHeads];
  __shared__ float squares_of_warps[kWarps];
  // From each CTA, for the quads that this one finishes: sums; the largest score and the sum of weights.
  __shared__ alignas(16) float4 sums_of_ctas[kQuads];
  __shared__ alignas(16) float2 tops_of_ctas[kQuads];
  __shared__ alignas(8) uint64_t arrived;

  const int rank = blockIdx.x % kCtas, first = blockIdx.x / kCtas * kHeads;
  const int program = blockIdx.z * gridDim.y + blockIdx.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t barrier = SharedAddress(&arrived);
  if (threadIdx.x == 0) Expect(barrier, kQuads * (sizeof(float4) + sizeof(float2)));
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");

  const int position = *args.position;
  const float* squares = args.squares + int64_t{blockIdx.z} * args.num_squares;
  float some_squares[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = threadIdx.x + i * kThreads;
    some_squares[i] = at < args.num_squares ? squares[at] : 0;
  }
  const int word = threadIdx.x % kWords;
  __nv_bfloat162 halves[kRounds][2];
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int row = (threadIdx.x + i * kThreads) / kWords;
    if (row >= kRows) continue;
    const int source = row < kHeads ? min(first + row, args.heads - 1) : args.heads + row - kHeads;
    const auto* from = args.qkv + (int64_t{program} * (args.heads + 2) + source) * (kDim / 2) + word;
    halves[i][0] = from[0];
    halves[i][1] = from[kWords];
  }

  using Keys = uint4[kDim / 32][2];
  using Values = uint4[kDim / 64][4];
  Keys k[kDepth];
  Values v[kDepth];
  const int64_t cache = int64_t{program} * args.length * kDim;
  const uint4* keys = reinterpret_cast<const uint4*>(args.keys + cache);
  const uint4* values = reinterpret_cast<const uint4*>(args.values + cache);
  auto at = [&](int i) { return int64_t{min(i, args.length - 1)} * (kDim / 8); };
  auto load_keys = [&](Keys& k, int tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < kDim / 32; ++c) k[c][r] = keys[at(tile * kTile + g + 8 * r) + 4 * c + t];
    }
  };
  auto value_row = [&](int r) { return 2 * t + r % 2 + 8 * (r / 2); };  // in a tile
  auto load_values = [&](Values& v, int tile) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < kDim / 64; ++c) v[c][r] = values[at(tile * kTile + value_row(r)) + 8 * c + g];
    }
  };
  int tile = warp * kCtas + rank;
  if (tile * kTile < args.length) {
    load_keys(k[0], tile);
    load_values(v[0], tile);
  }
  // Rotation waits for the position and then for these: a line a thread, so that memory is asked but once.
  const int line = ((program * gridDim.x + blockIdx.x) * kThreads + threadIdx.x) * 16;  // in float2
  if (line < args.length * kWords) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(args.cos + line));
    asm volatile("prefetch.global.L2 [%0];" ::"l"(args.sin + line));
  }
  const float2 cosine = args.cos[int64_t{position} * kWords + word];
  const float2 sine = args.sin[int64_t{position} * kWords + word];
  const int tiles = position / kTile + 1, stride = kWarps * kCtas;
#pragma unroll
  for (int d = 1; d < kDepth; ++d) {
    if (tile + d * stride >= tiles) break;
    load_keys(k[d], tile + d * stride);
    load_values(v[d], tile + d * stride);
  }
  float square = some_squares[0] + some_squares[1] + some_squares[2] + some_squares[3];
#pragma unroll 1
  for (int i = threadIdx.x + 4 * kThreads; i < args.num_squares; i += kThreads) square += squares[i];
  for (int lanes = 16; lanes > 0; lanes /= 2) square += __shfl_xor_sync(~0u, square, lanes);
  if (lane == 0) squares_of_warps[warp] = square;
  __syncthreads();
  float total_of_squares = 0;
  for (float of_warp : squares_of_warps) total_of_squares += of_warp;
  const float factor = rsqrtf(total_of_squares / args.hidden + args.epsilon);
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int row = (threadIdx.x + i * kThreads) / kWords;
    if (row >= kRows) continue;
    float2 a = __bfloat1622float2(halves[i][0]), b = __bfloat1622float2(halves[i][1]);
    a = {a.x * factor, a.y * factor};
    b = {b.x * factor, b.y * factor};
    if (row != kValue) {
      const float2 unturned = a;
      a = {a.x * cosine.x - b.x * sine.x, a.y * cosine.y - b.y * sine.y};
      b = {b.x * cosine.x + unturned.x * sine.x, b.y * cosine.y + unturned.y * sine.y};
    }
    const __nv_bfloat162 low = __floats2bfloat162_rn(a.x, a.y), high = __floats2bfloat162_rn(b.x, b.y);
    auto write = [&](__nv_bfloat16* to) {
      reinterpret_cast<__nv_bfloat162*>(to)[word] = low;
      reinterpret_cast<__nv_bfloat162*>(to)[word + kWords] = high;
    };
    write(rows[row]);
    if (row >= kHeads && rank == 0 && first == 0) {
      write((row == kKey ? args.keys : args.values) + cache + int64_t{position} * kDim);
    }
  }
  __syncthreads();
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");  // all CTAs' barriers stand

  auto of_row = [&](int row, int chunk) { return reinterpret_cast<const uint4*>(rows[row])[chunk]; };
  const float scale = 1.4426950408889634f * rsqrtf(kDim);  // for powers of 2
  float out[kDim / 16][4] = {};  // rows of product i: dims 64 (i / 4) + 8 g + 2 (i % 4), and the next
  float top[2] = {kLowest, kLowest}, total[2] = {};  // of heads 2 t and the next
  auto attend = [&](Keys& k, Values& v, int tile) {
    const int next = tile + kDepth * stride;
    const int end = position - tile * kTile;  // the new position, if it is in this tile
    if (end < kTile) {
#pragma unroll
      for (int c = 0; c < kDim / 32; ++c) {
        if (g == end) k[c][0] = of_row(kKey, 4 * c + t);
        if (g + 8 == end) k[c][1] = of_row(kKey, 4 * c + t);
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < kDim / 64; ++c) {
          if (value_row(r) == end) v[c][r] = of_row(kValue, 8 * c + g);
          if (value_row(r) > end) v[c][r] = {};  // whose weights are 0, but it may be infinite
        }
      }
    }
    float part[4][4] = {};  // four sums, so that products follow without waiting
#pragma unroll
    for (int c = 0; c < kDim / 32; ++c) {
      const uint4 q = of_row(g, 4 * c + t);
      const uint4 low = k[c][0], high = k[c][1];
      Multiply(part[c % 2 * 2], low.x, high.x, low.y, high.y, q.x, q.y);
      Multiply(part[c % 2 * 2 + 1], low.z, high.z, low.w, high.w, q.z, q.w);
    }
    if (next < tiles) load_keys(k, next);
    float score[4];  // positions g, g + 8; of each, heads 2 t, 2 t + 1
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      score[i] = (part[0][i] + part[1][i] + part[2][i] + part[3][i]) * scale;
      if (g + 8 * (i / 2) > end) score[i] = -INFINITY;
    }
    float keep[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float higher = fmaxf(score[h], score[h + 2]);
      for (int lanes = 16; lanes > 2; lanes /= 2) higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, lanes));
      higher = fmaxf(higher, top[h]);
      keep[h] = Exp2(top[h] - higher);
      top[h] = higher;
      score[h] = Exp2(score[h] - higher);
      score[h + 2] = Exp2(score[h + 2] - higher);
      total[h] = total[h] * keep[h] + score[h] + score[h + 2];
    }
    const uint32_t weights[2] = {Transpose(score[0], score[1]), Transpose(score[2], score[3])};
#pragma unroll
    for (int c = 0; c < kDim / 64; ++c) {
      auto multiply = [&](float (&d)[4], uint32_t v0, uint32_t v1, uint32_t v8, uint32_t v9) {
#pragma unroll
        for (int i = 0; i < 4; ++i) d[i] *= keep[i % 2];
        auto lows = [](uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); };
        auto highs = [](uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); };
        Multiply(d, lows(v0, v1), highs(v0, v1), lows(v8, v9), highs(v8, v9), weights[0], weights[1]);
      };
      multiply(out[4 * c], v[c][0].x, v[c][1].x, v[c][2].x, v[c][3].x);
      multiply(out[4 * c + 1], v[c][0].y, v[c][1].y, v[c][2].y, v[c][3].y);
      multiply(out[4 * c + 2], v[c][0].z, v[c][1].z, v[c][2].z, v[c][3].z);
      multiply(out[4 * c + 3], v[c][0].w, v[c][1].w, v[c][2].w, v[c][3].w);
    }
    if (next < tiles) load_values(v, next);
  };
  for (; tile < tiles; tile += kDepth * stride) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (tile + d * stride < tiles) attend(k[d], v[d], tile + d * stride);
    }
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    for (int lanes = 16; lanes > 2; lanes /= 2) total[h] += __shfl_xor_sync(~0u, total[h], lanes);
    if (g == 0) {
      tops[warp][2 * t + h] = top[h];
      totals[warp][2 * t + h] = total[h];
    }
#pragma unroll
    for (int i = 0; i < kDim / 16; i += 2) {
      auto* to = reinterpret_cast<float4*>(&sums[warp][2 * t + h][i / 4 * 64 + 8 * g + i % 4 * 2]);
      *to = {out[i][h], out[i][h + 2], out[i + 1][h], out[i + 1][h + 2]};
    }
  }
  __syncthreads();

  // A quad of outputs: over the warps, then, in the CTA that it falls to, over CTAs.
#pragma unroll
  for (int i = 0; i < kQuads; i += kThreads) {
    const int quad = i + threadIdx.x;
    if (quad >= kQuads) break;
    const int head = quad / kWords, dim = quad % kWords * 4;
    float largest = kLowest, weights = 0;
    float4 sum{0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, tops[w][head]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = Exp2(tops[w][head] - largest);
      weights += weight * totals[w][head];
      sum = Add(sum, weight, *reinterpret_cast<const float4*>(&sums[w][head][dim]));
    }
    const int owner = quad / kShare, slot = rank * kShare + quad % kShare;
    const uint32_t there = AddressInCta(barrier, owner);
    Send(AddressInCta(SharedAddress(&sums_of_ctas[slot]), owner), sum, there);
    Send(AddressInCta(SharedAddress(&tops_of_ctas[slot]), owner), float2{largest, weights}, there);
  }
  for (int mine = threadIdx.x; mine < kShare; mine += kThreads) {
    Wait(barrier);
    float largest = kLowest, weights = 0;
    float4 sum{0, 0, 0, 0};
#pragma unroll
    for (int c = 0; c < kCtas; ++c) largest = fmaxf(largest, tops_of_ctas[c * kShare + mine].x);
#pragma unroll
    for (int c = 0; c < kCtas; ++c) {
      const float2 top = tops_of_ctas[c * kShare + mine];
      const float weight = Exp2(top.x - largest);
      weights += weight * top.y;
      sum = Add(sum, weight, sums_of_ctas[c * kShare + mine]);
    }
    const int quad = rank * kShare + mine, head = first + quad / kWords;
    if (head >= args.heads) continue;
    const int64_t to = (int64_t{program} * args.heads + head) * kDim + quad % kWords * 4;
    auto* pairs = reinterpret_cast<__nv_bfloat162*>(args.out + to);
    const float r = __fdividef(1, weights);
    pairs[0] = __floats2bfloat162_rn(sum.x * r, sum.y * r);
    pairs[1] = __floats2bfloat162_rn(sum.z * r, sum.w * r);
  }
}

template <int kDim, int kCtas>
cudaError_t LaunchClusters(const Args& args, dim3 grid, cudaStream_t stream) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCtas, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.x * kCtas, grid.y, grid.z);
  config.blockDim = 32 * kWarps;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, Attend<kDim, kCtas>, args);
}

// As many CTAs in a cluster as leave all on the GPU at once: one a multiprocessor, else two.
template <int kDim>
cudaError_t Launch(const Args& args, dim3 grid, cudaStream_t stream) {
  int device, multiprocessors;
  if (cudaError_t e = cudaGetDevice(&device)) return e;
  if (cudaError_t e = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device))
    return e;
  const int64_t clusters = int64_t{grid.x} * grid.y * grid.z;
  if (clusters * 8 <= multiprocessors) return LaunchClusters<kDim, 8>(args, grid, stream);
  if (clusters <= multiprocessors) return LaunchClusters<kDim, 2>(args, grid, stream);
  return LaunchClusters<kDim, 1>(args, grid, stream);
}

using S32 = ffi::Buffer<ffi::S32>;
using F32 = ffi::Buffer<ffi::F32>;
using BF16 = ffi::Buffer<ffi::BF16>;

ffi::Error Run(cudaStream_t stream, S32 position, BF16 qkv, F32 squares, F32 cos, F32 sin, BF16 keys,
               BF16 values, ffi::Result<BF16> out, ffi::Result<BF16> new_keys, ffi::Result<BF16> new_values,
               float hidden, float epsilon) {
  const auto rows = qkv.dimensions(), cache = keys.dimensions(), norm = squares.dimensions();
  if (rows.size() != 3 || cache.size() != 3 || norm.size() != 2) {
    return ffi::Error::InvalidArgument("llama_attention: ranks");
  }
  const int64_t programs = rows[0], heads = rows[1] - 2, dim = rows[2], length = cache[1];
  const int64_t table = length * dim / 2;
  if ((dim != 64 && dim != 128) || heads < 1 || length < 1 || norm[0] > 65535 ||
      (programs && (norm[0] < 1 || programs % norm[0])) || cache[0] != programs || cache[2] != dim ||
      values.element_count() != keys.element_count() || position.element_count() != 1 ||
      cos.element_count() != table || sin.element_count() != table ||
      out->element_count() != programs * heads * dim) {
    return ffi::Error::InvalidArgument("llama_attention: sizes");
  }
  if (keys.typed_data() != new_keys->typed_data() || values.typed_data() != new_values->typed_data()) {
    return ffi::Error::InvalidArgument("llama_attention: expected the cache's buffers as results");
  }
  if (programs == 0) return ffi::Error::Success();
  auto bf16 = [](auto* p) { return reinterpret_cast<__nv_bfloat16*>(p); };
  const Args args{position.typed_data(),
                  reinterpret_cast<const __nv_bfloat162*>(qkv.typed_data()),
                  squares.typed_data(),
                  reinterpret_cast<const float2*>(cos.typed_data()),
                  reinterpret_cast<const float2*>(sin.typed_data()),
                  bf16(new_keys->typed_data()),
                  bf16(new_values->typed_data()),
                  bf16(out->typed_data()),
                  static_cast<int>(heads),
                  static_cast<int>(norm[1]),
                  static_cast<int>(length),
                  hidden,
                  epsilon};
  const dim3 grid((heads + kHeads - 1) / kHeads, programs / norm[0], norm[0]);
  const cudaError_t error = (dim == 64 ? Launch<64> : Launch<128>)(args, grid, stream);
  return error == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(error));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(LlamaAttention, Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<S32>()
                                  .Arg<BF16>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<BF16>()
                                  .Arg<BF16>()
                                  .Ret<BF16>()
                                  .Ret<BF16>()
                                  .Ret<BF16>()
                                  .Attr<float>("hidden")
                                  .Attr<float>("epsilon"),
                              {ffi::Traits::kCmdBufferCompatible});
