// How the persistent kernel (gemm_persistent.cuh) shares a problem out: the one description, for
// the launcher and for heuristics.cc.
#pragma once

#include <algorithm>
#include <cstdint>

#include "config.h"

namespace w4a16 {

// A cluster takes a unit at a time: cluster_n tiles along N of the same tokens. Whole units come
// first, in as many waves as fill the GPU. What is left is cut along M into halves where that makes
// the last wave shorter.
struct PersistentSchedule {
  int64_t clusters;  // that run at once
  int64_t whole_units;
  int64_t units;   // whole ones and halves
  int tail_shift;  // 1: halves
  double waves;    // in whole units
};

// Only the largest tiles are cut.
constexpr int MaxTailShift(int tile_m) { return tile_m == 256 ? 1 : 0; }

inline PersistentSchedule SchedulePersistent(const Problem& p, const Config& config, int num_sms) {
  const int64_t units =
      CeilDiv(CeilDiv(p.n, config.tile_n), config.cluster_n) * CeilDiv(p.m, config.tile_m);
  const int64_t clusters = std::max(num_sms / config.cluster_n, 1);
  const int64_t rest = units % clusters, whole = units - rest;
  const double full = static_cast<double>(whole / clusters);
  // A block of 128 tokens takes 0.56 of the time of one of 256 (measured).
  const double halves = full + 0.56 * static_cast<double>(CeilDiv(2 * rest, clusters));
  if (MaxTailShift(config.tile_m) == 0 || rest == 0 || halves >= full + 1)
    return {clusters, whole, units, 0, full + (rest > 0)};
  return {clusters, whole, whole + 2 * rest, 1, halves};
}

}  // namespace w4a16
