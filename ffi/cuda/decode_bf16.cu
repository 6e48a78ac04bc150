#include "decode.cuh"

namespace w4a16 {

DecodeKernelPointer FindDecodeKernelBf16(const Config& config, bool has_zeros, bool split_blocks) {
  return FindDecodeKernel<__nv_bfloat16>(config, has_zeros, split_blocks);
}

}  // namespace w4a16
