// The order in which the tiles of a product are taken, where they begin, and how long L2 keeps what
// they read: all for gemm_wgmma.cuh and gemm_persistent.cuh.
#pragma once

#include <cstdint>

#include "../layout.h"

namespace w4a16 {

// Division of 0 <= a < 2^31 by a fixed 1 <= d < 2^31 as a multiplication.
struct Divisor {
  uint32_t d, multiplier, shift;

  explicit Divisor(uint32_t divisor) : d(divisor), multiplier(0), shift(0) {
    while ((uint64_t{1} << shift) < d) ++shift;
    if (d > 1) multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + d - 1) / d);
  }
#if defined(__CUDACC__)
  __device__ uint32_t Quotient(uint32_t a) const {
    return d == 1 ? a : __umulhi(a, multiplier) >> (shift - 1);
  }
#endif
};

// Tiles of `tiles_m` token tiles by `tiles_n` tiles of rows of weights, in panels of kWidth token
// tiles, so that those in flight share both operands in L2.
struct Panels {
  static constexpr int kWidth = 8;

  Divisor per_panel, last_width;  // tiles in a full panel; token tiles in the last panel
  int full_panels;

  Panels(int64_t tiles_m, int64_t tiles_n)
      : per_panel(static_cast<uint32_t>(kWidth * tiles_n)),
        last_width(static_cast<uint32_t>(tiles_m % kWidth > 0 ? tiles_m % kWidth : 1)),
        full_panels(static_cast<int>(tiles_m / kWidth)) {}

#if defined(__CUDACC__)
  __device__ void Find(int tile, int* tile_m, int* tile_n) const {
    const int panel = per_panel.Quotient(tile), inside = tile - panel * per_panel.d;
    const bool full = panel < full_panels;
    *tile_n = full ? inside / kWidth : last_width.Quotient(inside);
    *tile_m = panel * kWidth + inside - *tile_n * (full ? kWidth : last_width.d);
  }
#endif
};

#if defined(__CUDACC__)
// Where a tile of `tokens` that would begin at `token` does: where it would reach beyond m tokens
// and there are enough, so much earlier, and two tiles make the same bits of the tokens that both
// have. Tensor copies take some 10 cycles for a row that is not there and 2 for one that is: at
// 4096 x 4096 and M = 72, tiles of 64 x 64 took 20.0 us, and take 9.3 at M = 128.
__device__ inline int FirstToken(int token, int tokens, int m) {
  return max(min(token, m - tokens), 0);
}
#endif

// L2 policies, as createpolicy makes them.
inline constexpr uint64_t kEvictNormal = 0x1000000000000000, kEvictFirst = 0x12f0000000000000,
                          kEvictLast = 0x14f0000000000000;

// Weights are read once, unless several token tiles share them.
W4A16_HD constexpr uint64_t WeightPolicy(int64_t tiles_m) {
  return tiles_m == 1 ? kEvictFirst : kEvictNormal;
}

}  // namespace w4a16
