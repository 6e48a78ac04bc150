#include "tensor_map.h"

#include "cuda_status.h"

namespace w4a16 {

Status EncodeTensorMap(const void* data, DType type, int64_t rows, int64_t columns, int box_rows,
                       CUtensorMap* map) {
  // The driver's encoder, looked up at run time so that the library does not link to libcuda.
  void* symbol = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol,
                                                             12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return ToStatus(error, "cudaGetDriverEntryPointByVersion");
  if (found != cudaDriverEntryPointSuccess)
    return Status::Unsupported("the driver has no cuTensorMapEncodeTiled");
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(symbol);

  const cuuint64_t extents[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides_bytes[] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUtensorMapDataType tensor_type =
      type == W4A16_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(map, tensor_type, 2, const_cast<void*>(data), extents, strides_bytes, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  return Status::Internal("cuTensorMapEncodeTiled: error " + std::to_string(result));
}

}  // namespace w4a16
