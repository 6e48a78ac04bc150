// cudaError_t -> Status.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "status.h"

namespace w4a16 {

// Also clears the runtime's last error, where it is one that clears: left there, it would be
// reported by whatever asks next, for a call that went well.
inline Status ToStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  if (error == cudaErrorNoKernelImageForDevice)
    return Status::Unsupported(std::string(what) + ": this build has no code for the device");
  return Status::Internal(std::string(what) + ": " + cudaGetErrorName(error) + ": " +
                          cudaGetErrorString(error));
}

}  // namespace w4a16
