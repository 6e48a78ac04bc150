#include "gemm_wgmma.cuh"

namespace w4a16 {

WgmmaKernel FindWgmmaF16(const Config& config, bool has_zeros, bool folds) {
  return FindWgmma<__half>(config, has_zeros, folds);
}

}  // namespace w4a16
