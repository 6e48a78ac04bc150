#include <algorithm>
#include <bit>
#include <climits>

#include "cuda_status.h"
#include "decode.h"
#include "kernels.h"

namespace w4a16 {

Status RunDecode(const Problem& p, const Operands& o, const Config& config, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return {};
  const auto find = p.x_dtype == W4A16_F16 ? FindDecodeKernelF16 : FindDecodeKernelBf16;
  DecodeKernelPointer kernel = find(config, p.has_zeros, StageParts(p, config.blocks));
  if (kernel == nullptr) return Status::Internal(std::string(config.name) + ": not compiled");

  const DecodeSharedMemory shared = SharedMemoryOfDecode(p, config);
  const int64_t tiles_m = CeilDiv(p.m, config.tile_m);
  const int64_t ctas = tiles_m * CeilDiv(p.n, config.tile_n) * config.split_k;
  if (ctas > INT_MAX)
    return Status::Unsupported(std::string(config.name) + ": the product needs " +
                               std::to_string(ctas) + " CTAs, more than a grid holds");
  const int group_size = static_cast<int>(p.group_size < p.k ? p.group_size : INT_MAX);
  // For 0 <= k < 2^31 (of a column of one group, any size beyond K serves): shift =
  // ceil(log2(group_size)) makes the rounded-up reciprocal exact.
  int shift = 0;
  while (shift < 31 && (1u << shift) < static_cast<unsigned>(group_size)) ++shift;
  const DecodeParams params = {
      .x = o.x,
      .qweight = o.qweight,
      .scales = o.scales,
      .zeros = o.zeros,
      .bias = o.bias,
      .out = o.out,
      .m = static_cast<int>(p.m),
      .n = static_cast<int>(p.n),
      .k = static_cast<int>(p.k),
      .blocks_n = static_cast<int>(BlocksN(p.n)),
      .units = static_cast<int>(CeilDiv(BlocksK(p.k), config.blocks)),
      .tiles_m = static_cast<int>(tiles_m),
      .log2_split_k = std::countr_zero(static_cast<unsigned>(config.split_k)),
      .group_multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + group_size - 1) /
                                                static_cast<uint64_t>(group_size)),
      .group_shift = shift - 1,
      .x_rows = static_cast<int>(std::min<int64_t>(p.m, config.tile_m)),
      .received_bytes = ReceivedBytes(config.tile_n, config.tile_m, config.split_k),
      .stage_bytes = shared.stage_bytes,
      .team_bytes = shared.team_bytes,
      .x_aligned = p.k % 8 == 0,
      .n_aligned = p.n % 8 == 0,
      .out_float32 = p.out_dtype == W4A16_F32,
      .alpha = o.alpha,
  };

  // Attributes belong to the current device, so they are set at every call.
  const void* function = reinterpret_cast<const void*>(kernel);
  if (Status s =
          ToStatus(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        shared.total_bytes),
                   config.name);
      !s.ok())
    return s;
  if (Status s =
          ToStatus(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared),
                   config.name);
      !s.ok())
    return s;

  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(config.split_k), 1, 1};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(static_cast<unsigned>(ctas));
  launch.blockDim = dim3(32 * config.warps);
  launch.dynamicSmemBytes = shared.total_bytes;
  launch.stream = stream;
  launch.attrs = &cluster;
  launch.numAttrs = config.split_k > 1 ? 1 : 0;
  void* args[] = {const_cast<DecodeParams*>(&params)};
  return ToStatus(cudaLaunchKernelExC(&launch, function, args), config.name);
}

}  // namespace w4a16
