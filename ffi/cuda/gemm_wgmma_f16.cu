#include "gemm_wgmma.cuh"

namespace w4a16 {

WgmmaKernel FindWgmmaF16(const Config& config, bool has_zeros) {
  return FindWgmma<__half>(config, has_zeros);
}

}  // namespace w4a16
