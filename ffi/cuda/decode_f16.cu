#include "decode.cuh"

namespace w4a16 {

const void* FindDecodeKernelF16(const Config& config, bool has_zeros, int parts, bool general) {
  return FindDecodeKernel<__half, W4A16_NO_EPILOGUE>(config, has_zeros, parts, general);
}

}  // namespace w4a16
