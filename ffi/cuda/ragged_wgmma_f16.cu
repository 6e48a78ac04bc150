#include "ragged_wgmma.cuh"

namespace w4a16 {

RaggedWgmmaKernel FindRaggedWgmmaF16(const Config& config, bool has_zeros, bool folds) {
  return FindRaggedWgmma<__half>(config, has_zeros, folds);
}

}  // namespace w4a16
