// Runs a product on the current CUDA device: resolves the configuration, checks it, launches it.
#pragma once

#include "kernels.h"

namespace w4a16 {

// Compute capability and size of the current device.
Status CurrentDevice(Device* device);

// `config` nullptr: the one that Select chooses within the given workspace. Problem and operands
// have been checked.
Status RunCuda(const Problem& p, const Operands& o, const Config* config, cudaStream_t stream);

// The same for a ragged product; group_sizes are on the device and stay there.
Status RunRaggedCuda(const Problem& p, const Experts& e, const Operands& o, const Config* config,
                     cudaStream_t stream);

}  // namespace w4a16
