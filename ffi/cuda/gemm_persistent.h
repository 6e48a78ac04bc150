// How the persistent kernel (gemm_persistent.cuh) shares a problem out: the one description, for
// the launcher and for heuristics.cc.
#pragma once

#include <algorithm>
#include <cstdint>

#include "config.h"

namespace w4a16 {

// A cluster takes a unit at a time: cluster_n tiles along N of the same tokens. Whole units come
// first, in as many waves as fill the GPU. The rest are cut along M into 2^tail_shift parts each,
// so that the last wave is short.
struct PersistentSchedule {
  int64_t clusters;  // that run at once
  int64_t whole_units;
  int64_t units;  // whole ones and parts
  int tail_shift;
  double waves;  // in whole units
};

// What a part costs: dequantising costs as much as multiplying by this many tokens (measured: a
// step of 64 codes took 108 ns and 2.57 ns a token).
inline constexpr double kTokensOfDequantizing = 42;

// Parts have at least 64 tokens.
constexpr int MaxTailShift(int tile_m) { return tile_m % 256 == 0 ? 2 : tile_m % 128 == 0 ? 1 : 0; }

inline PersistentSchedule SchedulePersistent(const Problem& p, const Config& config, int num_sms) {
  const int64_t units =
      CeilDiv(CeilDiv(p.n, config.tile_n), config.cluster_n) * CeilDiv(p.m, config.tile_m);
  const int64_t clusters = std::max(num_sms / config.cluster_n, 1);
  const int64_t rest = units % clusters;
  PersistentSchedule best = {clusters, units - rest, units, 0, 1e30};
  for (int shift = 0; shift <= MaxTailShift(config.tile_m); ++shift) {
    const double weight = ((config.tile_m >> shift) + kTokensOfDequantizing) /
                          (config.tile_m + kTokensOfDequantizing);
    const double waves = static_cast<double>(units / clusters) +
                         static_cast<double>(CeilDiv(rest << shift, clusters)) * weight;
    if (waves < best.waves) {
      best.units = best.whole_units + (rest << shift);
      best.tail_shift = shift;
      best.waves = waves;
    }
  }
  return best;
}

}  // namespace w4a16
