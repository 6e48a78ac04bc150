// How the persistent kernel (gemm_persistent.cuh) shares a problem out: the one description, for
// the launcher, WorkspaceBytes and heuristics.cc.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>

#include "config.h"

namespace w4a16 {

// A cluster takes a unit at a time: cluster_n tiles along N of the same tokens. Whole units come
// first, in as many waves as fill the GPU. What is left would leave clusters idle, so it is either
// cut along M into halves, or shared out evenly along K ("streamed"): each cluster takes a run of
// blocks of 64 codes, out of one tile or two, and passes the float32 sums of a tile that it does
// not begin to the cluster that does.
struct PersistentSchedule {
  int64_t clusters;  // that run at once
  int64_t whole_units;
  int64_t units;            // whole ones and halves
  int64_t streamed_blocks;  // blocks of K in streamed units
  int tail_shift;           // 1: halves
  double waves;             // in whole units
};

// Only the largest tiles are cut.
constexpr int MaxTailShift(int tile_m) { return tile_m == 256 ? 1 : 0; }

inline PersistentSchedule SchedulePersistent(const Problem& p, const Config& config, int num_sms) {
  const int64_t units =
      CeilDiv(CeilDiv(p.n, config.tile_n), config.cluster_n) * CeilDiv(p.m, config.tile_m);
  const int64_t clusters = std::max(num_sms / config.cluster_n, 1);
  const int64_t rest = units % clusters, whole = units - rest, blocks = BlocksK(p.k);
  const double full = static_cast<double>(whole / clusters);
  PersistentSchedule best = {clusters, whole, units, 0, 0, full + (rest > 0)};
  if (rest == 0) return best;
  if (MaxTailShift(config.tile_m) > 0) {
    // A block of 128 tokens takes 0.56 of the time of one of 256 (measured).
    const double halves = full + 0.56 * static_cast<double>(CeilDiv(2 * rest, clusters));
    if (halves < best.waves) best = {clusters, whole, whole + 2 * rest, 0, 1, halves};
  }
  // A batch-invariant result has no runs, whose ends depend on M.
  if (p.batch_invariant || rest * blocks < clusters || rest * blocks > INT_MAX) return best;
  // Sending and adding up sums takes the time of ten blocks, and of three for every run in a unit
  // (measured).
  const double runs = static_cast<double>(clusters) / static_cast<double>(rest);
  const double streamed = full + 1 / runs + (10 + 3 * runs) / static_cast<double>(blocks);
  constexpr double kMargin = 0.1;  // CTAs at different places along K share less of L2
  if (streamed + kMargin < best.waves) best = {clusters, whole, whole, rest * blocks, 0, streamed};
  return best;
}

// The workspace of a streamed schedule: a tile of float32 sums for each CTA, then a flag for each
// warpgroup of each CTA.
inline int64_t PersistentSumsBytes(const PersistentSchedule& schedule, const Config& config) {
  return schedule.clusters * config.cluster_n * config.tile_n * config.tile_m * 4;
}
inline int64_t PersistentWorkspaceBytes(const Problem& p, const Config& config, int num_sms) {
  const PersistentSchedule schedule = SchedulePersistent(p, config, num_sms);
  if (schedule.streamed_blocks == 0) return 0;
  return PersistentSumsBytes(schedule, config) +
         schedule.clusters * config.cluster_n * (config.tile_n / 64) * 8;
}

}  // namespace w4a16
