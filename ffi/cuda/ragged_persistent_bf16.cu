#include "ragged_persistent.cuh"

namespace w4a16 {

RaggedPersistentKernel FindRaggedPersistentBf16(const Config& config, bool has_zeros) {
  return FindRaggedPersistent<__nv_bfloat16>(config, has_zeros);
}

}  // namespace w4a16
