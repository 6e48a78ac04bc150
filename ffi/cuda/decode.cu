#include <algorithm>
#include <bit>
#include <climits>
#include <set>
#include <utility>

#include "cuda_status.h"
#include "kernels.h"
#include "ragged_decode.h"
#include "tensor_map.h"

namespace w4a16 {

namespace {

// `tensor_copies`: whether the kernel can take x by them.
DecodeParams DecodeParamsOf(const Problem& p, const Operands& o, const Config& config,
                            bool tensor_copies) {
  const DecodeSharedMemory shared = SharedMemoryOfDecode(p, config);
  const int group_size = static_cast<int>(p.group_size < p.k ? p.group_size : INT_MAX);
  // For 0 <= k < 2^31 (of a column of one group, any size beyond K serves): shift =
  // ceil(log2(group_size)) makes the rounded-up reciprocal exact.
  int shift = 0;
  while (shift < 31 && (1u << shift) < static_cast<unsigned>(group_size)) ++shift;
  return {
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
      .tiles_m = static_cast<int>(CeilDiv(p.m, config.tile_m)),
      .log2_split_k = std::countr_zero(static_cast<unsigned>(config.split_k)),
      .group_multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + group_size - 1) /
                                                static_cast<uint64_t>(group_size)),
      .group_shift = shift - 1,
      .scale_step_bytes = int64_t{config.warps} * config.blocks * kBlockK / group_size * p.n * 2,
      .x_rows = static_cast<int>(std::min<int64_t>(p.m, config.tile_m)),
      .head_bytes = HeadBytes(p, config),
      .stage_bytes = shared.stage_bytes,
      .warp_bytes = shared.warp_bytes,
      .x_tensor = tensor_copies && p.k % 8 == 0 && p.k > 0 && (p.m > kFewRows || config.tile_m > 8),
      .x_aligned = p.k % 8 == 0,
      .n_aligned = p.n % 8 == 0,
      .out_float32 = p.out_dtype == W4A16_F32,
      .alpha = o.alpha,
      .num_squares = o.squares == nullptr ? 0 : static_cast<int>(o.num_squares),
      .epsilon = o.epsilon,
      .inverse_k = 1.0f / static_cast<float>(p.k),
      .residual = o.residual,
      .norm_scale = o.norm_scale,
      .scaled = o.scaled,
      .squares = o.squares,
  };
}

// Lets the kernel have all the shared memory that a CTA can have, whatever this call needs of it.
// The device remembers it (until cudaDeviceReset), so a thread asks once: the two attributes cost
// 0.7 us, a launch into a graph 0.5.
Status RaiseSharedMemoryLimit(const Config& config, const void* function) {
  if (function == nullptr) return Status::Internal(std::string(config.name) + ": not compiled");
  int device = 0, most = 0;
  if (Status s = ToStatus(cudaGetDevice(&device), config.name); !s.ok()) return s;
  thread_local std::set<std::pair<int, const void*>> raised;
  if (raised.contains({device, function})) return {};
  cudaError_t error =
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) raised.insert({device, function});
  return ToStatus(error, config.name);
}

Status LaunchDecode(const Config& config, const void* function, void** args, int64_t ctas,
                    int cluster, int shared_bytes, cudaStream_t stream) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(static_cast<unsigned>(ctas));
  launch.blockDim = dim3(32 * config.warps);
  launch.dynamicSmemBytes = shared_bytes;
  launch.stream = stream;
  launch.attrs = &attribute;
  launch.numAttrs = cluster > 1 ? 1 : 0;
  return ToStatus(cudaLaunchKernelExC(&launch, function, args), config.name);
}

}  // namespace

Status RunDecode(const Problem& p, const Operands& o, const Config& config, const Device& device,
                 cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return {};
  const bool f16 = p.x_dtype == W4A16_F16;
  const int parts = StageParts(p, config);
  const void* function;
  if (p.epilogue == W4A16_NO_EPILOGUE) {
    const auto find = f16 ? FindDecodeKernelF16 : FindDecodeKernelBf16;
    function = find(config, p.has_zeros, parts, IsGeneral(p));
  } else {
    const auto find = f16 ? FindFusedDecodeKernelF16 : FindFusedDecodeKernelBf16;
    function = find(config, p.has_zeros, parts, p.epilogue);
  }
  DecodeParams params = DecodeParamsOf(p, o, config, device.compute_capability == 90);
  const int64_t ctas = CeilDiv(p.m, config.tile_m) * CeilDiv(p.n, config.tile_n) * config.split_k;
  if (ctas > INT_MAX)
    return Status::Unsupported(std::string(config.name) + ": the product needs " +
                               std::to_string(ctas) + " CTAs, more than a grid holds");
  const int shared_bytes = SharedMemoryOfDecode(p, config).total_bytes;
  if (Status s = RaiseSharedMemoryLimit(config, function); !s.ok()) return s;
  CUtensorMap x = {};
  if (params.x_tensor) {  // the encoder needs a context, which is there by now
    if (Status s = EncodeTensorMap(o.x, p.x_dtype, p.m, p.k, params.x_rows, &x); !s.ok()) return s;
  }
  void* args[] = {&params, &x};
  return LaunchDecode(config, function, args, ctas, config.split_k, shared_bytes, stream);
}

Status RunRaggedDecode(const Problem& p, const Experts& e, const Operands& o, const Config& config,
                       int num_sms, cudaStream_t stream) {
  const auto find = p.x_dtype == W4A16_F16 ? FindRaggedDecodeF16 : FindRaggedDecodeBf16;
  const auto kernel = find(config, p.has_zeros, StageParts(p, config));
  const RaggedDecodeSharedMemory shared = SharedMemoryOfRaggedDecode(p, e.count, config);
  RaggedDecodeParams params = {.decode = DecodeParamsOf(p, o, config, false),
                               .experts = ExpertParamsOf(p, e, config.tile_n),
                               .table_bytes = shared.table_bytes,
                               .partial_bytes = shared.partial_bytes};
  params.decode.stage_bytes = shared.stage_bytes;
  const int64_t tiles = MostExpertTiles(p.m, e.count, config.tile_m) * params.experts.tiles_n;
  // The kernel may choose narrower tiles, at most twice as many.
  if (2 * tiles + INT_MAX / 4 > INT_MAX)
    return Status::Unsupported(std::string(config.name) + ": too many tiles");
  const int total_bytes = static_cast<int>(shared.total_bytes);
  const void* function = reinterpret_cast<const void*>(kernel);
  if (Status s = RaiseSharedMemoryLimit(config, function); !s.ok()) return s;
  int ctas_per_sm = 0;
  if (Status s = ToStatus(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                              &ctas_per_sm, function, 32 * config.warps, total_bytes),
                          config.name);
      !s.ok())
    return s;
  const int64_t ctas = std::min<int64_t>(tiles, int64_t{num_sms} * std::max(ctas_per_sm, 1));
  void* args[] = {&params};
  return LaunchDecode(config, function, args, ctas, 1, total_bytes, stream);
}

}  // namespace w4a16
