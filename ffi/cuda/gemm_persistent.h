// How the persistent kernel (gemm_persistent.cuh) shares a problem out: the one description, for
// the launcher and for heuristics.cc.
#pragma once

#include <algorithm>
#include <cstdint>

#include "config.h"

namespace w4a16 {

// A cluster takes a unit at a time: cluster_n tiles along N of the same tokens. Whole units come
// first, in as many waves as fill the GPU. What is left is cut into smaller units where that makes
// the last wave shorter: along M into halves, or, for tiles of more than three blocks of 64 rows,
// along N into units of fewer blocks.
struct PersistentSchedule {
  int64_t clusters;  // that run at once
  int64_t whole_units;
  int64_t units;          // whole ones and those of the last wave
  int tail_shift;         // 1: halves
  int tail_rows;          // blocks of 64 rows of a unit of the last wave; 0: none are cut along N
  int64_t whole_columns;  // columns of whole tiles along N, if tail_rows > 0
  double waves;           // in whole units
};

// Only the largest tiles are cut along M.
constexpr int MaxTailShift(int tile_n, int tile_m) {
  return tile_n == 128 && tile_m == 256 ? 1 : 0;
}

// Consumer warpgroups, to which a tile's blocks of 64 rows are dealt in turn. Five blocks to three
// are faster than to two, by 9%; four to four are no faster than to two (measured).
constexpr int WarpgroupsOf(int tile_n) {
  const int row_blocks = tile_n / 64;
  return row_blocks == 4 ? 2 : row_blocks == 5 ? 3 : row_blocks;
}

inline PersistentSchedule SchedulePersistent(const Problem& p, const Config& config, int num_sms) {
  const int64_t tiles_m = CeilDiv(p.m, config.tile_m);
  const int64_t units = CeilDiv(CeilDiv(p.n, config.tile_n), config.cluster_n) * tiles_m;
  const int64_t clusters = std::max(num_sms / config.cluster_n, 1);
  const int64_t rest = units % clusters, whole = units - rest;
  const double full = static_cast<double>(whole / clusters);
  PersistentSchedule best = {clusters, whole, units, 0, 0, 0, full + (rest > 0)};
  if (rest == 0) return best;
  if (MaxTailShift(config.tile_n, config.tile_m) > 0) {
    // A block of 128 tokens takes 0.56 of the time of one of 256 (measured).
    const double halves = full + 0.56 * static_cast<double>(CeilDiv(2 * rest, clusters));
    if (halves < best.waves) best = {clusters, whole, whole + 2 * rest, 1, 0, 0, halves};
  }
  const int row_blocks = config.tile_n / 64;
  const int64_t columns = whole / tiles_m;
  const int fewest = WarpgroupsOf(config.tile_n);
  for (int rows = fewest; row_blocks > 3 && config.cluster_n == 1 && rows < row_blocks; ++rows) {
    const int64_t left = CeilDiv(p.n, 64) - columns * row_blocks;
    const int64_t cut = columns * tiles_m + CeilDiv(left, rows) * tiles_m;
    const double waves = full + static_cast<double>(rows) / row_blocks;
    if (cut <= whole + clusters && waves < best.waves)
      best = {clusters, columns * tiles_m, cut, 0, rows, columns, waves};
  }
  return best;
}

}  // namespace w4a16
