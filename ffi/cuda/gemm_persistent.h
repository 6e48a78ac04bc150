// How the persistent kernel (gemm_persistent.cuh) shares a problem out: the one description, for
// the launcher, WorkspaceBytes and heuristics.cc.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>

#include "config.h"

namespace w4a16 {

// A cluster takes a unit at a time: cluster_n tiles along N of the same tokens. Whole units come
// first. Where the last wave would leave many clusters idle, its units are streamed instead: their
// blocks of 64 codes along K are shared out evenly, a run for each cluster, out of one unit or two;
// the float32 sums of a unit that a run does not begin go to the cluster whose run does.
struct PersistentSchedule {
  int64_t clusters;  // that run at once
  int64_t whole_units;
  int64_t streamed_blocks;  // of K, in streamed units
  double waves;             // in whole units
};

inline PersistentSchedule SchedulePersistent(const Problem& p, const Config& config, int num_sms) {
  const int64_t units =
      CeilDiv(CeilDiv(p.n, config.tile_n), config.cluster_n) * CeilDiv(p.m, config.tile_m);
  const int64_t clusters = std::max(num_sms / config.cluster_n, 1);
  const int64_t rest = units % clusters, blocks = rest * BlocksK(p.k);
  const double full = static_cast<double>(units / clusters);
  const PersistentSchedule whole = {clusters, units, 0, full + (rest > 0)};
  // A batch-invariant result has no ends of runs that depend on M.
  if (blocks < clusters || blocks > INT_MAX || p.batch_invariant) return whole;
  // Sending the sums of a run takes about two blocks' time, and so does adding them up.
  const double runs_a_unit = static_cast<double>(clusters) / static_cast<double>(rest);
  const double waves =
      full + 1 / runs_a_unit + (2 + 2 * runs_a_unit) / static_cast<double>(BlocksK(p.k));
  return waves < whole.waves ? PersistentSchedule{clusters, units - rest, blocks, waves} : whole;
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
