#include "gemm_persistent.cuh"

namespace w4a16 {

PersistentKernel FindPersistentBf16(const Config& config, bool has_zeros) {
  return FindPersistent<__nv_bfloat16>(config, has_zeros);
}

}  // namespace w4a16
