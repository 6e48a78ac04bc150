#include "gemm_wgmma.cuh"

namespace w4a16 {

WgmmaKernel FindWgmmaBf16(const Config& config, bool has_zeros) {
  return FindWgmma<__nv_bfloat16>(config, has_zeros);
}

}  // namespace w4a16
