#include "tensor_map.h"

#include "cuda_status.h"

namespace w4a16 {
namespace {

// The driver's encoder, looked up at run time so that the library does not link to libcuda.
struct Encoder {
  decltype(&cuTensorMapEncodeTiled) encode;
  Status status;
};

Encoder FindEncoder() {
  void* symbol = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  constexpr const char* kName = "cuTensorMapEncodeTiled";
#if CUDART_VERSION < 12050
  const cudaError_t error = cudaGetDriverEntryPoint(kName, &symbol, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(kName, &symbol, 12000, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return {nullptr, ToStatus(error, "cudaGetDriverEntryPoint")};
  if (found != cudaDriverEntryPointSuccess)
    return {nullptr, Status::Unsupported("the driver has no cuTensorMapEncodeTiled")};
  return {reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(symbol), {}};
}

// A tensor of `rank` <= 3 dimensions, innermost first; steps_bytes lie between neighbours in all
// dimensions but the innermost.
Status Encode(const void* data, CUtensorMapDataType type, int rank, const cuuint64_t* extents,
              const cuuint64_t* steps_bytes, const cuuint32_t* box, CUtensorMapSwizzle swizzle,
              CUtensorMap* map) {
  static const Encoder encoder = FindEncoder();
  if (!encoder.status.ok()) return encoder.status;
  const cuuint32_t every[] = {1, 1, 1};
  const CUresult result =
      encoder.encode(map, type, rank, const_cast<void*>(data), extents, steps_bytes, box, every,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  return Status::Internal("cuTensorMapEncodeTiled: error " + std::to_string(result));
}

CUtensorMapDataType TypeOf(DType type) {
  return type == W4A16_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

}  // namespace

Status EncodeTensorMap(const void* data, DType type, int64_t rows, int64_t columns, int box_rows,
                       CUtensorMap* map) {
  const cuuint64_t extents[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t steps_bytes[] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)};
  return Encode(data, TypeOf(type), 2, extents, steps_bytes, box, CU_TENSOR_MAP_SWIZZLE_128B, map);
}

Status EncodeTensorMapInBlocks(const void* data, DType type, int64_t rows, int64_t columns,
                               int box_rows, int box_blocks, CUtensorMap* map) {
  const cuuint64_t extents[] = {64, static_cast<cuuint64_t>(rows),
                                static_cast<cuuint64_t>(columns / 64)};
  const cuuint64_t steps_bytes[] = {static_cast<cuuint64_t>(columns) * 2, 128};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows),
                            static_cast<cuuint32_t>(box_blocks)};
  return Encode(data, TypeOf(type), 3, extents, steps_bytes, box, CU_TENSOR_MAP_SWIZZLE_128B, map);
}

Status EncodeTensorMapOfScales(const void* data, DType type, int64_t groups, int64_t n,
                               int box_groups, int box_n, CUtensorMap* map) {
  const cuuint64_t extents[] = {static_cast<cuuint64_t>(n), static_cast<cuuint64_t>(groups)};
  const cuuint64_t steps_bytes[] = {static_cast<cuuint64_t>(n) * 2};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_n), static_cast<cuuint32_t>(box_groups)};
  return Encode(data, TypeOf(type), 2, extents, steps_bytes, box, CU_TENSOR_MAP_SWIZZLE_NONE, map);
}

Status EncodeTensorMapOfCodes(const uint32_t* qweight, int64_t n, int64_t k, int box_blocks_n,
                              int box_blocks_k, CUtensorMap* map) {
  const cuuint64_t extents[] = {kBlockWords, static_cast<cuuint64_t>(BlocksN(n)),
                                static_cast<cuuint64_t>(BlocksK(k))};
  const cuuint64_t steps_bytes[] = {kBlockBytes, static_cast<cuuint64_t>(BlocksN(n)) * kBlockBytes};
  const cuuint32_t box[] = {kBlockWords, static_cast<cuuint32_t>(box_blocks_n),
                            static_cast<cuuint32_t>(box_blocks_k)};
  return Encode(qweight, CU_TENSOR_MAP_DATA_TYPE_UINT32, 3, extents, steps_bytes, box,
                CU_TENSOR_MAP_SWIZZLE_NONE, map);
}

}  // namespace w4a16
