// How the persistent kernel (gemm_persistent.cuh) shares a problem out: the one description, for
// the launcher and for heuristics.cc.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>

#include "config.h"

namespace w4a16 {

// A cluster takes a unit at a time: cluster_n tiles along N of the same tokens. Whole units come
// first, in as many waves as fill the GPU. The columns of tiles that are left are cut into smaller
// units where that makes the last waves shorter: along M into parts of fewer tokens (28672 x 4096
// at M = 512: four waves take 193 us, three and parts of 128 170, of 104 167), or, for tiles of
// more than three blocks of 64 rows, along N into units of fewer blocks.
struct PersistentSchedule {
  int64_t clusters;  // that run at once
  int64_t whole_columns, whole_units;
  int64_t units;               // whole ones and those of the last waves
  int tail_tokens, tail_rows;  // of the last waves' units; rows in blocks of 64
  double waves;                // in whole units
};

// Tokens of the parts into which tiles of 256 may be cut.
inline constexpr int kTailTokens[] = {104, 128, 192};
inline constexpr size_t kNumTailTokens = std::size(kTailTokens);

// Only the largest tiles are cut along M.
constexpr bool CutsTokens(int tile_n, int tile_m) { return tile_n == 128 && tile_m == 256; }

// Whether each CTA of a cluster can bring an equal share of them, a multiple of eight.
W4A16_HD constexpr bool ClusterShares(int tokens, int cluster) {
  return tokens % (8 * cluster) == 0;
}

// What a part takes of the time of a whole tile of 256 tokens. Measured, five sizes (H200): 104
// 0.46 to 0.53, 128 0.52 to 0.58, 192 0.77.
constexpr double PartOfWave(int tokens) { return 0.12 + 0.88 / 256 * tokens; }

// Consumer warpgroups, to which a tile's blocks of 64 rows are dealt in turn. Five blocks to three
// are faster than to two, by 9%; four to four are no faster than to two (measured).
constexpr int WarpgroupsOf(int tile_n) {
  const int row_blocks = tile_n / 64;
  return row_blocks == 4 ? 2 : row_blocks == 5 ? 3 : row_blocks;
}

inline PersistentSchedule SchedulePersistent(const Problem& p, const Config& config, int num_sms) {
  const int64_t tiles_m = CeilDiv(p.m, config.tile_m);
  const int64_t all_columns = CeilDiv(CeilDiv(p.n, config.tile_n), config.cluster_n);
  const int64_t units = all_columns * tiles_m;
  const int64_t clusters = std::max(num_sms / config.cluster_n, 1);
  const int row_blocks = config.tile_n / 64;
  PersistentSchedule best = {clusters,
                             all_columns,
                             units,
                             units,
                             config.tile_m,
                             row_blocks,
                             static_cast<double>(CeilDiv(units, clusters))};
  if (units % clusters == 0) return best;

  const int64_t full = units / clusters, columns = full * clusters / tiles_m;
  const int64_t whole = columns * tiles_m;
  const auto consider = [&](int64_t parts, int tokens, int rows, double part_of_wave) {
    const double waves =
        static_cast<double>(full) +
        static_cast<double>(CeilDiv(whole + parts - full * clusters, clusters)) * part_of_wave;
    if (waves < best.waves) best = {clusters, columns, whole, whole + parts, tokens, rows, waves};
  };
  if (CutsTokens(config.tile_n, config.tile_m)) {
    for (const int tokens : kTailTokens) {
      if (!ClusterShares(tokens, config.cluster_n)) continue;
      consider((all_columns - columns) * CeilDiv(p.m, tokens), tokens, row_blocks,
               PartOfWave(tokens));
    }
  }
  if (row_blocks > 3 && config.cluster_n == 1) {
    const int64_t left = CeilDiv(p.n, 64) - columns * row_blocks;
    for (int rows = WarpgroupsOf(config.tile_n); rows < row_blocks; ++rows)
      consider(CeilDiv(left, rows) * tiles_m, config.tile_m, rows,
               static_cast<double>(rows) / row_blocks);
  }
  return best;
}

}  // namespace w4a16
