#include "ragged_persistent.cuh"

namespace w4a16 {

RaggedPersistentKernel FindRaggedPersistentF16(const Config& config, bool has_zeros) {
  return FindRaggedPersistent<__half>(config, has_zeros);
}

}  // namespace w4a16
