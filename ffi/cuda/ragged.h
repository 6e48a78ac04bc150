// What the kernels for ragged products share between host and device. Free of CUDA headers.
#pragma once

#include "../problem.h"

namespace w4a16 {

// Where a kernel finds its expert.
struct ExpertParams {
  const int32_t* group_sizes;
  int experts;
  int tiles_n;
  int64_t qweight_words, scale_elements;  // of one expert's weight
};

inline ExpertParams ExpertParamsOf(const Problem& p, const Experts& e, int tile_n) {
  return {.group_sizes = e.group_sizes,
          .experts = static_cast<int>(e.count),
          .tiles_n = static_cast<int>(CeilDiv(p.n, tile_n)),
          .qweight_words = BlocksK(p.k) * BlocksN(p.n) * kBlockWords,
          .scale_elements = NumGroups(p) * p.n};
}

// What the persistent kernel keeps of experts in shared memory.
inline constexpr int kMostPersistentExperts = 256, kPersistentTableBytes = 8 * 256;

// The most tiles of tile_m rows that M rows of `experts` experts, and of none, can make: the grid
// has to be known before the sizes are.
constexpr int64_t MostExpertTiles(int64_t m, int64_t experts, int tile_m) {
  const int64_t begun = m < experts + 1 ? m : experts + 1;
  return begun + (m - begun) / tile_m;
}

}  // namespace w4a16
