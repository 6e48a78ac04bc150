#include <algorithm>

#include "cuda_status.h"
#include "gemm_wgmma.cuh"

namespace w4a16 {
namespace {

// The driver's encoder, looked up at run time so that the library does not link to libcuda.
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

Status FindEncodeTiled(EncodeTiled* encode) {
  void* symbol = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol,
                                                             12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return ToStatus(error, "cudaGetDriverEntryPointByVersion");
  if (found != cudaDriverEntryPointSuccess)
    return Status::Unsupported("the driver has no cuTensorMapEncodeTiled");
  *encode = reinterpret_cast<EncodeTiled>(symbol);
  return {};
}

// x as tiles of 64 values of K by `tile_m` tokens; what lies outside x reads as zero.
Status EncodeX(EncodeTiled encode, const Problem& p, const void* x, int tile_m, CUtensorMap* map) {
  const cuuint64_t extents[] = {static_cast<cuuint64_t>(p.k), static_cast<cuuint64_t>(p.m)};
  const cuuint64_t strides_bytes[] = {static_cast<cuuint64_t>(p.k) * 2};
  const cuuint32_t box[] = {kBlockK, static_cast<cuuint32_t>(tile_m)};
  const cuuint32_t steps[] = {1, 1};
  const CUtensorMapDataType type =
      p.x_dtype == W4A16_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(x), extents, strides_bytes, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  return Status::Internal("cuTensorMapEncodeTiled: error " + std::to_string(result));
}

// Sums are scaled where the line has it compiled in, groups are made of whole blocks, and results
// need not be the same for every tile, to the bit.
bool FoldsScales(const Config& config, const Problem& p) {
  return config.tile_m <= kMostFoldedTokens && !p.batch_invariant &&
         (NumGroups(p) == 1 || p.group_size % kBlockK == 0);
}

}  // namespace

Status RunWgmma(const Problem& p, const Operands& o, const Config& config, cudaStream_t stream) {
  const bool folds = FoldsScales(config, p);
  const WgmmaKernel kernel = p.x_dtype == W4A16_F16 ? FindWgmmaF16(config, p.has_zeros, folds)
                                                    : FindWgmmaBf16(config, p.has_zeros, folds);
  if (kernel.kernel == nullptr)
    return Status::Internal(std::string(config.name) + ": not compiled");

  const int64_t tiles_n = CeilDiv(p.n, config.tile_n), tiles_m = CeilDiv(p.m, config.tile_m);
  if (tiles_n * tiles_m * config.split_k > INT_MAX)
    return Status::Unsupported(std::string(config.name) + ": too many tiles for one grid");

  EncodeTiled encode = nullptr;
  if (Status s = FindEncodeTiled(&encode); !s.ok()) return s;
  CUtensorMap x_map;
  if (Status s = EncodeX(encode, p, o.x, config.tile_m, &x_map); !s.ok()) return s;

  const WgmmaParams params = {
      .qweight = o.qweight,
      .scales = o.scales,
      .zeros = o.zeros,
      .bias = o.bias,
      .out = o.out,
      .m = static_cast<int>(p.m),
      .n = static_cast<int>(p.n),
      .k = static_cast<int>(p.k),
      .group_size = static_cast<int>(std::min(p.group_size, CeilDiv(p.k, 32) * 32)),
      .groups = static_cast<int>(NumGroups(p)),
      .tiles_m = static_cast<int>(tiles_m),
      .tiles_n = static_cast<int>(tiles_n),
      .alpha = o.alpha,
      .out_is_f32 = p.out_dtype == W4A16_F32,
  };

  // An attribute of the function on the current device, so it is set before every launch.
  if (Status s =
          ToStatus(cudaFuncSetAttribute(kernel.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        kernel.shared_bytes),
                   config.name);
      !s.ok())
    return s;

  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(config.split_k), 1, 1};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(static_cast<unsigned>(tiles_n * tiles_m * config.split_k));
  launch.blockDim = dim3(kernel.threads);
  launch.dynamicSmemBytes = kernel.shared_bytes;
  launch.stream = stream;
  launch.attrs = &cluster;
  launch.numAttrs = config.split_k > 1 ? 1 : 0;
  return ToStatus(cudaLaunchKernelEx(&launch, kernel.kernel, x_map, params), config.name);
}

}  // namespace w4a16
