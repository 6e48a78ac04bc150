// Kernel launches that report their own errors alone: unlike <<<>>> with cudaGetLastError, which
// also finds what an earlier call left behind.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>
#include <string>
#include <utility>

#include "cuda_status.h"

namespace w4a16 {

template <typename... Params, typename... Args>
Status Launch(const char* name, void (*kernel)(Params...), int64_t ctas, int threads,
              cudaStream_t stream, Args&&... args) {
  if (ctas > INT_MAX)
    return Status::Unsupported(std::string(name) + ": needs " + std::to_string(ctas) +
                               " CTAs, more than a grid holds");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(threads);
  config.stream = stream;
  return ToStatus(cudaLaunchKernelEx(&config, kernel, Params(std::forward<Args>(args))...), name);
}

}  // namespace w4a16
