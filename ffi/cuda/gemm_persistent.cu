#include <algorithm>
#include <climits>

#include "launch.cuh"
#include "ragged_persistent.cuh"
#include "tensor_map.h"

namespace w4a16 {

namespace {

constexpr int64_t kMostKeptBytes = 24 << 20;  // about half of Hopper's L2

}  // namespace

Status RunPersistent(const Problem& p, const Operands& o, const Config& config, int num_sms,
                     cudaStream_t stream) {
  const PersistentKernel kernel = p.x_dtype == W4A16_F16 ? FindPersistentF16(config, p.has_zeros)
                                                         : FindPersistentBf16(config, p.has_zeros);
  if (kernel.kernel == nullptr)
    return Status::Internal(std::string(config.name) + ": not compiled");

  const int cluster = config.cluster_n;
  const PersistentSchedule schedule = SchedulePersistent(p, config, num_sms);
  if (schedule.units + schedule.clusters > INT_MAX)
    return Status::Unsupported(std::string(config.name) + ": too many tiles");

  if (Status s = AllowSharedMemory(config.name, kernel.kernel, kernel.shared_bytes); !s.ok())
    return s;
  PersistentMaps maps = {};
  // Of fewer tokens than a tile has, boxes bring those alone (FirstToken), rounded up to 8; not in
  // a cluster, whose CTAs bring equal shares.
  const auto box_rows = [&](int tokens) {
    return cluster > 1 ? tokens / cluster
                       : static_cast<int>(std::min<int64_t>(tokens, CeilDiv(p.m, 8) * 8));
  };
  const int x_rows = box_rows(config.tile_m);
  const int x_part_rows = box_rows(schedule.tail_tokens);
  if (Status s = EncodeTensorMap(o.x, p.x_dtype, p.m, p.k, x_rows, &maps.x); !s.ok()) return s;
  if (Status s = EncodeTensorMap(o.x, p.x_dtype, p.m, p.k, x_part_rows, &maps.x_part); !s.ok())
    return s;
  if (p.out_dtype != W4A16_F32) {
    if (Status s = EncodeTensorMap(o.out, p.out_dtype, p.m, p.n, kStoreTokens, &maps.out); !s.ok())
      return s;
  }

  const int64_t tiles_m = CeilDiv(p.m, config.tile_m);
  const bool one_group = NumGroups(p) == 1;
  const PersistentParams params = {
      .qweight = o.qweight,
      .scales = o.scales,
      .zeros = o.zeros,
      .bias = o.bias,
      .out = o.out,
      .m = static_cast<int>(p.m),
      .n = static_cast<int>(p.n),
      .k = static_cast<int>(p.k),
      .x_rows = x_rows,
      .x_part_rows = x_part_rows,
      .blocks_per_group = one_group ? INT_MAX : static_cast<int>(p.group_size / kBlockK),
      .panels = Panels(tiles_m, std::max(schedule.whole_columns, int64_t{1})),
      .tail_m = Divisor(static_cast<uint32_t>(CeilDiv(p.m, schedule.tail_tokens))),
      .whole_columns = static_cast<int>(schedule.whole_columns),
      .whole_units = static_cast<int>(schedule.whole_units),
      .units = static_cast<int>(schedule.units),
      .tail_tokens = schedule.tail_tokens,
      .tail_rows = schedule.tail_rows,
      // x is read by every column of tiles of a panel, which is worth a place in L2 where it fits;
      // codes are read once for every token tile.
      .x_policy = std::min<int64_t>(p.m, Panels::kWidth * config.tile_m) * p.k * 2 <= kMostKeptBytes
                      ? kEvictLast
                      : kEvictNormal,
      .weight_policy = WeightPolicy(tiles_m),
      .alpha = o.alpha,
      .out_is_f32 = p.out_dtype == W4A16_F32,
  };

  return LaunchClusters(config.name, kernel.kernel,
                        std::min(schedule.units, schedule.clusters) * cluster, cluster,
                        kernel.threads, kernel.shared_bytes, stream, maps, params);
}

Status RunRaggedPersistent(const Problem& p, const Experts& e, const Operands& o,
                           const Config& config, int num_sms, cudaStream_t stream) {
  const auto find = p.x_dtype == W4A16_F16 ? FindRaggedPersistentF16 : FindRaggedPersistentBf16;
  const RaggedPersistentKernel kernel = find(config, p.has_zeros);
  if (kernel.kernel == nullptr)
    return Status::Internal(std::string(config.name) + ": not compiled");
  const ExpertParams experts = ExpertParamsOf(p, e, config.tile_n);
  const int64_t tiles = MostExpertTiles(p.m, e.count, config.tile_m) * experts.tiles_n;
  if (tiles + num_sms > INT_MAX)
    return Status::Unsupported(std::string(config.name) + ": too many tiles");

  if (Status s = AllowSharedMemory(config.name, kernel.kernel, kernel.shared_bytes); !s.ok())
    return s;
  PersistentMaps maps = {};
  const int x_rows = static_cast<int>(std::min<int64_t>(config.tile_m, CeilDiv(p.m, 8) * 8));
  if (Status s = EncodeTensorMap(o.x, p.x_dtype, p.m, p.k, x_rows, &maps.x); !s.ok()) return s;
  maps.x_part = maps.out = maps.x;
  if (p.out_dtype != W4A16_F32) {
    if (Status s = EncodeTensorMap(o.out, p.out_dtype, p.m, p.n, kStoreTokens, &maps.out); !s.ok())
      return s;
  }
  const PersistentParams params = {
      .qweight = o.qweight,
      .scales = o.scales,
      .zeros = o.zeros,
      .bias = nullptr,
      .out = o.out,
      .m = static_cast<int>(p.m),
      .n = static_cast<int>(p.n),
      .k = static_cast<int>(p.k),
      .x_rows = x_rows,
      .x_part_rows = x_rows,
      .blocks_per_group = NumGroups(p) == 1 ? INT_MAX : static_cast<int>(p.group_size / kBlockK),
      .panels = Panels(1, 1),
      .tail_m = Divisor(1),
      .x_policy = kEvictLast,
      .weight_policy = kEvictNormal,
      .alpha = o.alpha,
      .out_is_f32 = p.out_dtype == W4A16_F32,
  };
  return LaunchClusters(config.name, kernel.kernel, std::min<int64_t>(tiles, num_sms), 1,
                        kernel.threads, kernel.shared_bytes, stream, maps, params, experts);
}

}  // namespace w4a16
