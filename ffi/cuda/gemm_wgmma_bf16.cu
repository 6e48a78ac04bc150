#include "gemm_wgmma.cuh"

namespace w4a16 {

WgmmaKernel FindWgmmaBf16(const Config& config, bool has_zeros, bool folds) {
  return FindWgmma<__nv_bfloat16>(config, has_zeros, folds);
}

}  // namespace w4a16
