#include <algorithm>
#include <atomic>
#include <random>

#include "cuda_status.h"
#include "gemm_persistent.cuh"
#include "tensor_map.h"

namespace w4a16 {
namespace {

// A number that no other call uses, so that no workspace holds it by chance.
unsigned long long NewToken() {
  static const unsigned long long seed = [] {
    std::random_device device;
    return static_cast<unsigned long long>(device()) << 32 | device();
  }();
  static std::atomic<unsigned long long> calls = 0;
  return seed + ++calls * 0x9e3779b97f4a7c15;
}

}  // namespace

Status RunPersistent(const Problem& p, const Operands& o, const Config& config, int num_sms,
                     cudaStream_t stream) {
  const PersistentKernel kernel = p.x_dtype == W4A16_F16 ? FindPersistentF16(config, p.has_zeros)
                                                         : FindPersistentBf16(config, p.has_zeros);
  if (kernel.kernel == nullptr)
    return Status::Internal(std::string(config.name) + ": not compiled");

  const int cluster = config.cluster_n;
  const PersistentSchedule schedule = SchedulePersistent(p, config, num_sms);
  if ((CeilDiv(schedule.whole_units, schedule.clusters) + 1) * BlocksK(p.k) > INT_MAX ||
      schedule.whole_units + schedule.clusters > INT_MAX)
    return Status::Unsupported(std::string(config.name) + ": too many tiles");

  const bool streams = schedule.streamed_blocks > 0;
  const int64_t clusters =
      streams ? schedule.clusters : std::min(schedule.whole_units, schedule.clusters);
  PersistentMaps maps = {};
  if (Status s = EncodeTensorMap(o.x, p.x_dtype, p.m, p.k, config.tile_m / cluster, &maps.x);
      !s.ok())
    return s;
  if (p.out_dtype != W4A16_F32) {
    if (Status s = EncodeTensorMap(o.out, p.out_dtype, p.m, p.n, kStoreTokens, &maps.out); !s.ok())
      return s;
  }

  const int64_t tiles_m = CeilDiv(p.m, config.tile_m);
  const int64_t units_n = CeilDiv(CeilDiv(p.n, config.tile_n), cluster);
  const bool one_group = NumGroups(p) == 1;
  const PersistentParams params = {
      .qweight = o.qweight,
      .scales = o.scales,
      .zeros = o.zeros,
      .bias = o.bias,
      .out = o.out,
      .m = static_cast<int>(p.m),
      .n = static_cast<int>(p.n),
      .blocks_k = static_cast<int>(BlocksK(p.k)),
      .blocks_per_group = one_group ? INT_MAX : static_cast<int>(p.group_size / kBlockK),
      .per_panel = Divisor(static_cast<uint32_t>(kPanelM * units_n)),
      .last_width = Divisor(static_cast<uint32_t>(std::max(tiles_m % kPanelM, int64_t{1}))),
      .full_panels = static_cast<int>(tiles_m / kPanelM),
      .whole_units = static_cast<int>(schedule.whole_units),
      .streamed_share = static_cast<int>(schedule.streamed_blocks / schedule.clusters),
      .streamed_extra = static_cast<int>(schedule.streamed_blocks % schedule.clusters),
      .sums = static_cast<float*>(o.workspace),
      .flags = reinterpret_cast<unsigned long long*>(static_cast<char*>(o.workspace) +
                                                     PersistentSumsBytes(schedule, config)),
      .token = streams ? NewToken() : 0,
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

  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(static_cast<unsigned>(clusters) * cluster);
  launch.blockDim = dim3(kernel.threads);
  launch.dynamicSmemBytes = kernel.shared_bytes;
  launch.stream = stream;
  launch.attrs = &attribute;
  launch.numAttrs = cluster > 1 ? 1 : 0;
  return ToStatus(cudaLaunchKernelEx(&launch, kernel.kernel, maps, params), config.name);
}

}  // namespace w4a16
