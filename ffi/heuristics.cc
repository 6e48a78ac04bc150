#include "heuristics.h"

#include <limits>

namespace w4a16 {
namespace {

// Estimated cost of `config`; smaller is better, infinity means never.
double Cost(const Problem& p, const Device& device, const Config& config) {
  const double ctas = static_cast<double>(CeilDiv(p.n, config.tile_n) *
                                          CeilDiv(p.m, config.tile_m) * config.split_k);
  const double waves = static_cast<double>(CeilDiv(static_cast<int64_t>(ctas), device.num_sms));
  return waves * config.tile_n * config.tile_m / config.split_k;
}

}  // namespace

Status Select(const Problem& problem, const Device& device, int64_t workspace_limit_bytes,
              const Config** config) {
  const Config* best = nullptr;
  double best_cost = std::numeric_limits<double>::infinity();
  std::string refusals;
  for (int i = 0; i < NumConfigs(); ++i) {
    const Config& candidate = ConfigAt(i);
    if (Status s = CanImplement(problem, device, candidate); !s.ok()) {
      refusals += "\n  " + s.message();
      continue;
    }
    const int64_t workspace = WorkspaceBytes(problem, device, candidate);
    if (workspace_limit_bytes >= 0 && workspace > workspace_limit_bytes) continue;
    const double cost = Cost(problem, device, candidate);
    if (cost < best_cost) {
      best = &candidate;
      best_cost = cost;
    }
  }
  if (best == nullptr) return Status::Unsupported("no kernel serves this problem:" + refusals);
  *config = best;
  return {};
}

}  // namespace w4a16
