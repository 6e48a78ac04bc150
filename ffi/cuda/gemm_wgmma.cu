#include <algorithm>
#include <bit>

#include "gemm_wgmma.h"
#include "launch.cuh"
#include "ragged_wgmma.cuh"
#include "tensor_map.h"

namespace w4a16 {
namespace {

// Rows of a box of scales, as many as a stage of `blocks` blocks meets; 0 where bulk copies bring
// them: groups are neither whole parts of stages nor whole stages, or a box would reach from one of
// the weights into the next.
int ScaleBoxRows(const Problem& p, const Config& config, int blocks, int64_t weights) {
  const int64_t stage_k = blocks * kBlockK;
  if (!HasScaleBoxes(RowsOfCta(config.tile_n, config.split_k))) return 0;
  if (NumGroups(p) == 1 || p.group_size % stage_k == 0) return 1;
  if (stage_k % p.group_size != 0 || (weights > 1 && p.k % stage_k != 0)) return 0;
  return static_cast<int>(stage_k / p.group_size);
}

// For a kernel whose stages hold `blocks` blocks, and weights one after the other.
WgmmaParams ParamsOf(const Problem& p, const Operands& o, const Config& config, int blocks,
                     int64_t weights) {
  const int group_size = static_cast<int>(std::min(p.group_size, CeilDiv(p.k, 32) * 32));
  const int64_t tiles_m = CeilDiv(p.m, config.tile_m);
  // Tokens beyond M need not be there: whatever is, their sums are not stored.
  const int x_rows = static_cast<int>(std::min<int64_t>(config.tile_m, CeilDiv(p.m, 8) * 8));
  return {
      .k = static_cast<int>(p.k),
      .panels = Panels(tiles_m, CeilDiv(p.n, config.tile_n)),
      .run_shift = NumGroups(p) == 1 ? 2 : std::min(std::countr_zero(group_size / 32u), 2),
      .group_size = group_size,
      .of_group = Divisor(static_cast<uint32_t>(group_size)),
      .weight_policy = WeightPolicy(tiles_m),
      .groups = static_cast<int>(NumGroups(p)),
      .n = static_cast<int>(p.n),
      .x_rows = x_rows,
      .x_in_blocks = p.k % kBlockK == 0 && x_rows == config.tile_m,
      .scales_in_boxes = ScaleBoxRows(p, config, blocks, weights) > 0,
      .out_is_f32 = p.out_dtype == W4A16_F32,
      .scales = o.scales,
      .zeros = o.zeros,
      .m = static_cast<int>(p.m),
      .alpha = o.alpha,
      .bias = o.bias,
      .out = o.out,
  };
}

Status EncodeMaps(const Problem& p, const Operands& o, const Config& config,
                  const WgmmaParams& params, int blocks, int64_t weights, WgmmaMaps* maps) {
  if (Status s =
          params.x_in_blocks
              ? EncodeTensorMapInBlocks(o.x, p.x_dtype, p.m, p.k, params.x_rows, blocks, &maps->x)
              : EncodeTensorMap(o.x, p.x_dtype, p.m, p.k, params.x_rows, &maps->x);
      !s.ok())
    return s;
  if (weights == 0) {  // of no experts: a tensor of no codes has no map, and none is copied
    maps->codes = maps->x;
    return {};
  }
  const int rows = RowsOfCta(config.tile_n, config.split_k);
  const auto encode_codes = [&](int box_rows, int box_blocks, CUtensorMap* map) {
    return EncodeTensorMapOfCodes(o.qweight, p.n, weights * BlocksK(p.k) * kBlockK,
                                  box_rows / kBlockN, box_blocks, map);
  };
  if (Status s = encode_codes(rows, blocks, &maps->codes); !s.ok()) return s;
  if (DealsRows(config.tile_n, config.split_k)) {
    if (Status s = encode_codes(rows - 64, 1, &maps->own_codes); !s.ok()) return s;
  }
  const int box_rows = ScaleBoxRows(p, config, blocks, weights);
  if (box_rows == 0) return {};
  const auto encode = [&](const void* data, CUtensorMap* map) {
    return EncodeTensorMapOfScales(data, p.x_dtype, weights * NumGroups(p), p.n, box_rows, rows,
                                   map);
  };
  if (Status s = encode(o.scales, &maps->scales); !s.ok()) return s;
  return p.has_zeros ? encode(o.zeros, &maps->zeros) : Status{};
}

Status NotCompiled(const Config& config) {
  return Status::Internal(std::string(config.name) + ": not compiled");
}

}  // namespace

Status RunWgmma(const Problem& p, const Operands& o, const Config& config, cudaStream_t stream) {
  const auto find = p.x_dtype == W4A16_F16 ? FindWgmmaF16 : FindWgmmaBf16;
  const WgmmaKernel kernel = find(config, p.has_zeros, FoldsScales(config, p));
  if (kernel.kernel == nullptr) return NotCompiled(config);
  if (Status s = AllowSharedMemory(config.name, kernel.kernel, kernel.shared_bytes); !s.ok())
    return s;
  const WgmmaParams params = ParamsOf(p, o, config, kernel.blocks, 1);
  WgmmaMaps maps;
  if (Status s = EncodeMaps(p, o, config, params, kernel.blocks, 1, &maps); !s.ok()) return s;
  const int64_t tiles = CeilDiv(p.n, config.tile_n) * CeilDiv(p.m, config.tile_m);
  return LaunchClusters(config.name, kernel.kernel, tiles * config.split_k, config.split_k,
                        kernel.threads, kernel.shared_bytes, stream, maps, params);
}

Status RunRaggedWgmma(const Problem& p, const Experts& e, const Operands& o, const Config& config,
                      cudaStream_t stream) {
  const auto find = p.x_dtype == W4A16_F16 ? FindRaggedWgmmaF16 : FindRaggedWgmmaBf16;
  const RaggedWgmmaKernel kernel = find(config, p.has_zeros, FoldsScales(config, p));
  if (kernel.kernel == nullptr) return NotCompiled(config);
  if (Status s = AllowSharedMemory(config.name, kernel.kernel, kernel.shared_bytes); !s.ok())
    return s;
  const WgmmaParams params = ParamsOf(p, o, config, kernel.blocks, e.count);
  const ExpertParams experts = ExpertParamsOf(p, e, config.tile_n);
  WgmmaMaps maps;
  if (Status s = EncodeMaps(p, o, config, params, kernel.blocks, e.count, &maps); !s.ok()) return s;
  const int64_t tiles = MostExpertTiles(p.m, e.count, config.tile_m) * experts.tiles_n;
  return LaunchClusters(config.name, kernel.kernel, tiles * config.split_k, config.split_k,
                        kernel.threads, kernel.shared_bytes, stream, maps, params, experts);
}

}  // namespace w4a16
