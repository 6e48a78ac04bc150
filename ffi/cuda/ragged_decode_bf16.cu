#include "ragged_decode.cuh"

namespace w4a16 {

RaggedDecodePointer FindRaggedDecodeBf16(const Config& config, bool has_zeros, int parts) {
  return FindRaggedDecode<__nv_bfloat16>(config, has_zeros, parts);
}

}  // namespace w4a16
