#include "gemm_persistent.cuh"

namespace w4a16 {

PersistentKernel FindPersistentF16(const Config& config, bool has_zeros) {
  return FindPersistent<__half>(config, has_zeros);
}

}  // namespace w4a16
