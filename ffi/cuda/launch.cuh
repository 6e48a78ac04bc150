// Kernel launches that report their own errors alone: unlike <<<>>> with cudaGetLastError, which
// also finds what an earlier call left behind.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>
#include <string>

#include "cuda_status.h"

namespace w4a16 {

// Lets `kernel` have `bytes` of dynamic shared memory on the current device; devices differ, so
// this comes before every launch. It also gives the calling thread the device's context if it has
// none yet, without which no tensor map can be encoded.
template <typename Kernel>
Status AllowSharedMemory(const char* name, Kernel* kernel, int bytes) {
  return ToStatus(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                  name);
}

// Launches `ctas` CTAs in clusters of `cluster`, each with `shared_bytes` of dynamic shared memory.
template <typename... Params, typename... Args>
Status LaunchClusters(const char* name, void (*kernel)(Params...), int64_t ctas, int cluster,
                      int threads, int shared_bytes, cudaStream_t stream, const Args&... args) {
  if (ctas > INT_MAX)
    return Status::Unsupported(std::string(name) + ": needs " + std::to_string(ctas) +
                               " CTAs, more than a grid holds");
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return ToStatus(cudaLaunchKernelEx(&config, kernel, Params(args)...), name);
}

template <typename... Params, typename... Args>
Status Launch(const char* name, void (*kernel)(Params...), int64_t ctas, int threads,
              cudaStream_t stream, const Args&... args) {
  return LaunchClusters(name, kernel, ctas, 1, threads, 0, stream, args...);
}

}  // namespace w4a16
