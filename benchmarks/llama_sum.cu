// x + the devices' parts, summed, and the norm that follows: one kernel on each of several GPUs of a process.
//
// A device stores its part in the memory of the others, each 8 bytes with the number of the call beside them,
// and reads theirs from its own memory until the number is there: one way over NVLink, no barrier, no fence.
// Calls come in the same order on all devices. Every place counts the calls that it had a part in, so that no
// thread waits for another. Slots of even and odd calls alternate: a device that has what another sent in call
// n knows that the other has read what call n - 1 sent.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int kMaxDevices = 8;
constexpr int kThreads = 128;  // of a CTA: each has one pair of values and all one row
constexpr int64_t kCapacity = 16 * 8192 / 2;  // pairs of values that a device sends in one call

struct Link {
  uint4* slots[kMaxDevices];  // in the memory of each device: [even or odd, sender, kCapacity]
  uint32_t* calls;            // [kCapacity], made so far
  int rank, size;
};

Link g_links[kMaxDevices];  // by CUDA ordinal

__device__ void Send(uint4* slot, float2 v, uint32_t call) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %2};" ::"l"(slot), "r"(__float_as_uint(v.x)),
               "r"(call), "r"(__float_as_uint(v.y))
               : "memory");
}

__device__ float2 Receive(const uint4* slot, uint32_t call) {
  uint32_t x, y, first, second;
  do {
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x), "=r"(first), "=r"(y), "=r"(second)
                 : "l"(slot)
                 : "memory");
  } while (first != call || second != call);
  return {__uint_as_float(x), __uint_as_float(y)};
}

__global__ void __launch_bounds__(kThreads)
    AddNorm(const __grid_constant__ Link link, const float2* part, const __nv_bfloat162* x, const __nv_bfloat162* scale,
            __nv_bfloat162* out, __nv_bfloat162* scaled, float* squares) {
  __shared__ float of_warps[kThreads / 32];
  const int column = blockIdx.x * kThreads + threadIdx.x;  // in pairs
  const int64_t i = int64_t{blockIdx.y} * gridDim.x * kThreads + column;
  const float2 mine = part[i];
  const uint32_t call = link.calls[i] + 1;
  const int64_t parity = (call & 1) * link.size;
  for (int d = 0; d < link.size; ++d) {
    if (d != link.rank) Send(link.slots[d] + (parity + link.rank) * kCapacity + i, mine, call);
  }
  link.calls[i] = call;
  const float2 residual = __bfloat1622float2(x[i]);
  const float2 factor = __bfloat1622float2(scale[column]);
  float2 sum{0, 0};  // in one order on all devices
  for (int d = 0; d < link.size; ++d) {
    float2 v = mine;
    if (d != link.rank) v = Receive(link.slots[link.rank] + (parity + d) * kCapacity + i, call);
    sum.x += v.x;
    sum.y += v.y;
  }
  const __nv_bfloat162 rounded = __floats2bfloat162_rn(residual.x + sum.x, residual.y + sum.y);
  out[i] = rounded;
  const float2 wide = __bfloat1622float2(rounded);
  scaled[i] = __floats2bfloat162_rn(wide.x * factor.x, wide.y * factor.y);

  float square = wide.x * wide.x + wide.y * wide.y;
  for (int lanes = 16; lanes > 0; lanes /= 2) square += __shfl_xor_sync(~0u, square, lanes);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = square;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0;
  for (float of_warp : of_warps) total += of_warp;
  squares[int64_t{blockIdx.y} * gridDim.x + blockIdx.x] = total;
}

using BF16 = ffi::Buffer<ffi::BF16>;
using F32 = ffi::Buffer<ffi::F32>;

ffi::Error Run(cudaStream_t stream, F32 part, BF16 x, BF16 scale, ffi::Result<BF16> out,
               ffi::Result<BF16> scaled, ffi::Result<F32> squares) {
  int device;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices || g_links[device].size == 0) {
    return ffi::Error::Internal("llama_add_norm: the device is linked to no other");
  }
  const int64_t hidden = scale.element_count(), count = x.element_count();
  constexpr int kColumns = 2 * kThreads;
  if (hidden % kColumns || hidden == 0 || count % hidden || count / 2 > kCapacity ||
      part.element_count() != count || out->element_count() != count || scaled->element_count() != count ||
      squares->element_count() != count / kColumns) {
    return ffi::Error::InvalidArgument("llama_add_norm: sizes");
  }
  if (count == 0) return ffi::Error::Success();
  auto pairs = [](auto* p) { return reinterpret_cast<__nv_bfloat162*>(p); };
  AddNorm<<<dim3(hidden / kColumns, count / hidden), kThreads, 0, stream>>>(
      g_links[device], reinterpret_cast<const float2*>(part.typed_data()), pairs(x.typed_data()),
      pairs(scale.typed_data()), pairs(out->typed_data()), pairs(scaled->typed_data()),
      squares->typed_data());
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(error));
}

// Links the CUDA devices `ordinals`; a null result is success.
cudaError_t Connect(const int* ordinals, int size) {
  Link link{};
  link.size = size;
  for (int rank = 0; rank < size; ++rank) {
    if (cudaError_t e = cudaSetDevice(ordinals[rank])) return e;
    for (int peer = 0; peer < size; ++peer) {
      if (peer == rank) continue;
      const cudaError_t e = cudaDeviceEnablePeerAccess(ordinals[peer], 0);
      if (e != cudaSuccess && e != cudaErrorPeerAccessAlreadyEnabled) return e;
    }
    cudaGetLastError();
    const size_t bytes = 2 * size * kCapacity * sizeof(uint4);
    if (cudaError_t e = cudaMalloc(&link.slots[rank], bytes)) return e;
    if (cudaError_t e = cudaMemset(link.slots[rank], 0, bytes)) return e;
    uint32_t*& calls = g_links[ordinals[rank]].calls;
    if (cudaError_t e = cudaMalloc(&calls, kCapacity * sizeof *calls)) return e;
    if (cudaError_t e = cudaMemset(calls, 0, kCapacity * sizeof *calls)) return e;
    if (cudaError_t e = cudaDeviceSynchronize()) return e;
  }
  for (int rank = 0; rank < size; ++rank) {
    Link& own = g_links[ordinals[rank]];
    link.calls = own.calls;
    link.rank = rank;
    own = link;
  }
  return cudaSuccess;
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(LlamaAddNorm, Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<F32>()
                                  .Arg<BF16>()
                                  .Arg<BF16>()
                                  .Ret<BF16>()
                                  .Ret<BF16>()
                                  .Ret<F32>(),
                              {ffi::Traits::kCmdBufferCompatible});

extern "C" const char* LlamaConnect(const int* ordinals, int size) {
  for (int rank = 0; rank < size; ++rank) {
    if (size > kMaxDevices || ordinals[rank] >= kMaxDevices) return "at most 8 devices";
  }
  int before = 0;
  cudaGetDevice(&before);
  const cudaError_t error = Connect(ordinals, size);
  cudaSetDevice(before);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
