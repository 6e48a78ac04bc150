// The contract between RunCutlass and the instantiations of gemm_cutlass.cuh, free of CUTLASS
// headers.
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"
#include "../schedule.h"

namespace w4a16 {

// Defined in gemm_cutlass.cuh and instantiated by one translation unit per (line of configs.inc,
// type).
template <DType kDType, int kTileN, int kTileM, int kClusterN, int kClusterM, Schedule kSchedule,
          Scheduler kScheduler>
Status LaunchCutlass(const Problem& p, const Operands& o, const char* name, int num_sms,
                     cudaStream_t stream);

}  // namespace w4a16
