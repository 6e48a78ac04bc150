// What decode.cu (host) and ragged_decode.cuh (kernel) share. Free of CUDA headers, because
// config.cc asks it for the shared memory of a config.
#pragma once

#include "decode.h"
#include "ragged.h"

namespace w4a16 {

struct RaggedDecodeParams {
  DecodeParams decode;
  ExpertParams experts;
  int table_bytes, partial_bytes;  // of shared memory
};

using RaggedDecodePointer = void (*)(RaggedDecodeParams);

// Shared memory of a CTA: table of experts | warps x partial tile | warps x ring of stages.
struct RaggedDecodeSharedMemory {
  int table_bytes, partial_bytes, stage_bytes;
  int64_t total_bytes;
};

constexpr RaggedDecodeSharedMemory SharedMemoryOfRaggedDecode(const Problem& p, int64_t experts,
                                                              const Config& c) {
  const int stage = Align128(StageOperandBytes(p, c));
  const int partial = Align128(c.tile_m * PartialStride(c.tile_n) * 4);
  const int table = Align128(static_cast<int>(experts) * 8);
  return {table, partial, stage, table + int64_t{c.warps} * (partial + c.stages * stage)};
}

RaggedDecodePointer FindRaggedDecodeF16(const Config& config, bool has_zeros, int parts);
RaggedDecodePointer FindRaggedDecodeBf16(const Config& config, bool has_zeros, int parts);

}  // namespace w4a16
