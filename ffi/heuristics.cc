#include "heuristics.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/gemm_persistent.h"

namespace w4a16 {
namespace {

int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// What groups of 32 make of a step's cost, which was fitted in groups of 128: decode applies a
// scale to a quarter as many products, wgmma finds factors of weights four times as often and does
// not scale sums, which in float16 takes longer. Over benchmarks/results/h200_groups.json the
// choice then takes 0.4% longer than the best line instead of 0.8; in bfloat16, groups of 32 and M
// = 16, 0.2% instead of 4.1.
double GroupFactor(const Problem& p, const Config& config) {
  if (p.group_size >= p.k || p.group_size % kBlockK == 0) return 1.0;
  if (config.family == Family::kDecode) return config.tile_m == 16 ? 1.25 : 1.0;
  return config.family == Family::kWgmma && p.x_dtype == W4A16_F16 ? 1.15 : 1.0;
}

// Predicted time of `config` in microseconds: start + max(load, fill) * steps * step + waves *
// tile. A step is one block of 64 codes of K; waves is the most CTAs that any SM runs, one after
// another or at once, and load is the same, but where decode has fewer CTAs than there are SMs the
// share that has one: they have the memory to themselves. What is below `fill` does not keep SMs,
// or the memory, busy. Where `resident` CTAs run at once, those left over from whole rounds take as
// long as a round: the SMs that are done first get them all (64x128 at N = K = 8192, H200: 52 us
// for two waves, 152 for four). A persistent kernel's last wave may be a fraction
// (gemm_persistent.h). Stream-K shares the tiles out evenly, and pays for the sums it cuts. Costs
// fitted where there are many steps may have next to nothing of what a product takes beside them,
// which counts where there are few: 2.2 us at least, if steps are left 85% of their cost (47
// products of K = 512 to 1536, H200: by the costs of before the choice took 2.4% longer than the
// best line, and 6.5 without this). The costs lie beside each line of configs.inc, with where they
// were measured; benchmarks/fit_costs.py has the twin of this.
double PredictedUs(const Problem& p, const Device& device, const Config& config) {
  constexpr double kLeastUs = 2.2, kLeastLoop = 0.85;
  const int64_t tiles = RoundUp(CeilDiv(p.n, config.tile_n), config.cluster_n) *
                        RoundUp(CeilDiv(p.m, config.tile_m), config.cluster_m);
  const int64_t steps = CeilDiv(BlocksK(p.k), config.split_k);
  const int64_t all_sms = device.num_sms > 0 ? device.num_sms : 1;
  // Few clusters of four fit where an SM runs one CTA at a time: 30 on an H200, 33 at most.
  const int64_t sms = config.family == Family::kDecode && config.split_k == 4
                          ? std::max<int64_t>(all_sms * 10 / 11, 1)
                          : all_sms;
  constexpr int64_t kMinStreamKSteps = 8;  // CUTLASS cuts nothing shorter
  if (config.scheduler == Scheduler::kStreamK && tiles % sms != 0 && steps > kMinStreamKSteps) {
    // The parts of a tile are added one after the other. Below half a tile each, that takes longer
    // than the shorter parts save: 34 us, as for half tiles, where 12 tiles have 132 SMs (H200).
    const double share = std::max(0.5, static_cast<double>(tiles) / static_cast<double>(sms));
    return config.start_us + share * static_cast<double>(steps) * config.step_ns * 1e-3 +
           (share + 1) * config.tile_us;
  }
  const int64_t ctas = tiles * config.split_k;
  int64_t most = CeilDiv(ctas, sms);  // of an SM
  if (most > config.resident) most = RoundUp(most, config.resident);
  const double waves = config.family == Family::kPersistent
                           ? SchedulePersistent(p, config, device.num_sms).waves
                           : static_cast<double>(most);
  const double load = config.family == Family::kDecode && ctas < sms
                          ? static_cast<double>(ctas) / static_cast<double>(sms)
                          : waves;
  const double loop = std::max<double>(load, config.fill) * static_cast<double>(steps) *
                      config.step_ns * GroupFactor(p, config) * 1e-3;
  return std::max(config.start_us + loop + waves * config.tile_us, kLeastUs + kLeastLoop * loop);
}

}  // namespace

Status Select(const Problem& problem, const Device& device, int64_t workspace_limit_bytes,
              const Config** config) {
  const Config* best = nullptr;
  double best_us = std::numeric_limits<double>::infinity();
  std::string refusals;
  for (int i = 0; i < NumConfigs(); ++i) {
    const Config& candidate = ConfigAt(i);
    if (Status s = CanImplement(problem, device, candidate); !s.ok()) {
      refusals += "\n  " + s.message();
      continue;
    }
    if (workspace_limit_bytes >= 0 &&
        WorkspaceBytes(problem, device, candidate) > workspace_limit_bytes)
      continue;
    const double us = PredictedUs(problem, device, candidate);
    if (us < best_us) {
      best = &candidate;
      best_us = us;
    }
  }
  if (best == nullptr) return Status::Unsupported("no kernel serves this problem:" + refusals);
  *config = best;
  return {};
}

namespace {

// Tiles of tile_m rows that m rows make which fall to experts at random: of each expert one for
// every multiple of tile_m that its rows exceed. They are a Poisson variable, near enough normal.
double ExpectedTiles(int64_t m, int64_t experts, int tile_m) {
  if (m == 0 || experts == 0) return 0;
  const double mean = static_cast<double>(m) / static_cast<double>(experts);
  const double spread = std::sqrt(2 * mean);
  // As many are exceeded for certain; of the others, those that are not too improbable.
  const double certain = std::max(0.0, std::floor((mean - 4 * spread) / tile_m));
  double tiles = certain > 0 ? certain : 1 - std::exp(-mean);
  for (double rows = std::max(certain, 1.0) * tile_m; rows < mean + 4 * spread; rows += tile_m)
    tiles += 0.5 * std::erfc((rows + 0.5 - mean) / spread);
  return tiles * static_cast<double>(experts);
}

}  // namespace

Status SelectRagged(const Problem& problem, int64_t experts, const Device& device,
                    const Config** config) {
  const Config* best = nullptr;
  double best_us = std::numeric_limits<double>::infinity();
  std::string refusals;
  for (int i = 0; i < NumConfigs(); ++i) {
    const Config& candidate = ConfigAt(i);
    if (!candidate.ragged) continue;
    if (Status s = CanImplementRagged(problem, experts, device, candidate); !s.ok()) {
      refusals += "\n  " + s.message();
      continue;
    }
    const double tiles = ExpectedTiles(problem.m, experts, candidate.tile_m) *
                         static_cast<double>(CeilDiv(problem.n, candidate.tile_n));
    const double tile_us =
        static_cast<double>(BlocksK(problem.k)) * candidate.step_ns * 1e-3 + candidate.tile_us;
    const double us = candidate.start_us + tiles / std::max(device.num_sms, 1) * tile_us;
    if (us < best_us) {
      best = &candidate;
      best_us = us;
    }
  }
  if (best == nullptr)
    return Status::Unsupported("no kernel serves this ragged product:" + refusals);
  *config = best;
  return {};
}

}  // namespace w4a16
