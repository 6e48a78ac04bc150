// What decode.cu (host) and ragged_decode.cuh (kernel) share.
#pragma once

#include "decode.h"
#include "ragged.h"

namespace w4a16 {

struct RaggedDecodeParams {
  DecodeParams decode;
  ExpertParams experts;
};

using RaggedDecodePointer = void (*)(RaggedDecodeParams);

RaggedDecodePointer FindRaggedDecodeF16(const Config& config, bool has_zeros, int parts);
RaggedDecodePointer FindRaggedDecodeBf16(const Config& config, bool has_zeros, int parts);

}  // namespace w4a16
