#include "ragged_decode.cuh"

namespace w4a16 {

RaggedDecodePointer FindRaggedDecodeF16(const Config& config, bool has_zeros, int parts) {
  return FindRaggedDecode<__half>(config, has_zeros, parts);
}

}  // namespace w4a16
