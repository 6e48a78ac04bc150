#include "decode.cuh"

namespace w4a16 {

DecodeKernelPointer FindDecodeKernelF16(const Config& config, bool has_zeros, bool split_blocks) {
  return FindDecodeKernel<__half>(config, has_zeros, split_blocks);
}

}  // namespace w4a16
