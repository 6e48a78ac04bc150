#include "ragged_wgmma.cuh"

namespace w4a16 {

RaggedWgmmaKernel FindRaggedWgmmaBf16(const Config& config, bool has_zeros, bool folds) {
  return FindRaggedWgmma<__nv_bfloat16>(config, has_zeros, folds);
}

}  // namespace w4a16
