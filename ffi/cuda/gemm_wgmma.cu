#include <algorithm>

#include "cuda_status.h"
#include "gemm_wgmma.cuh"
#include "tensor_map.h"

namespace w4a16 {
namespace {

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

  CUtensorMap x_map;
  if (Status s = EncodeTensorMap(o.x, p.x_dtype, p.m, p.k, config.tile_m, &x_map); !s.ok())
    return s;

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
