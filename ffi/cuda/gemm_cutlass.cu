#include <string_view>

#include "gemm_cutlass.h"
#include "kernels.h"

namespace w4a16 {
namespace {

using Launcher = Status (*)(const Problem&, const Operands&, const char*, int, cudaStream_t);

struct Instance {
  std::string_view name;
  Launcher f16;
  Launcher bf16;
};

constexpr Instance kInstances[] = {
#define W4A16_DECODE(...)
#define W4A16_WGMMA(...)
#define W4A16_PERSISTENT(...)
#define W4A16_CUTLASS(N, M, CN, CM, SCHEDULE, SCHEDULER, ...)                              \
  {"cutlass_" #N "x" #M "_c" #CN "x" #CM "_" #SCHEDULE "_" #SCHEDULER,                     \
   LaunchCutlass<W4A16_F16, N, M, CN, CM, Schedule::k##SCHEDULE, Scheduler::k##SCHEDULER>, \
   LaunchCutlass<W4A16_BF16, N, M, CN, CM, Schedule::k##SCHEDULE, Scheduler::k##SCHEDULER>},
#include "configs.inc"
#undef W4A16_DECODE
#undef W4A16_WGMMA
#undef W4A16_PERSISTENT
#undef W4A16_CUTLASS
};

}  // namespace

Status RunCutlass(const Problem& p, const Operands& o, const Config& config, int num_sms,
                  cudaStream_t stream) {
  for (const Instance& instance : kInstances) {
    if (instance.name != config.name) continue;
    const Launcher launch = p.x_dtype == W4A16_F16 ? instance.f16 : instance.bf16;
    return launch(p, o, config.name, num_sms, stream);
  }
  return Status::Internal(std::string(config.name) + ": not compiled");
}

}  // namespace w4a16
