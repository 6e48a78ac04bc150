#include "decode.cuh"

namespace w4a16 {

const void* FindFusedDecodeKernelF16(const Config& config, bool has_zeros, int parts,
                                     w4a16_epilogue epilogue) {
  return epilogue == W4A16_SWIGLU
             ? FindDecodeKernel<__half, W4A16_SWIGLU>(config, has_zeros, parts, false)
             : FindDecodeKernel<__half, W4A16_ADD_NORM>(config, has_zeros, parts, false);
}

}  // namespace w4a16
