// Which rows of x belong to which expert, found by a warp from the device's group_sizes.
//
//   group_sizes    3   0   5   1               rows of x, sorted by expert
//   rows          [0 1 2 | 3 4 5 6 7 | 8 | 9 ... M-1]
//   expert            0        2       3   E: none's, whose result is zero
//
// Sizes are data, so nothing is believed: negative ones count as 0, and what exceeds M is cut off.
#pragma once

#include <cstdint>

#include "ragged.h"

namespace w4a16 {

// A tile of one expert's rows.
struct ExpertTile {
  int expert;      // `experts`: rows that belong to none
  int first, end;  // rows of the expert
  int tiles_m;     // tiles that they make
  int index;  // of this tile among the expert's tiles_m * tiles_n, those of one n being neighbours
};

// Inclusive sums over a warp's lanes that stop at `most` (below 2^31).
__device__ __forceinline__ uint32_t ScanUpTo(uint32_t v, uint32_t most) {
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffff, v, i);
    if (static_cast<int>(threadIdx.x % 32) >= i) v = min(v + other, most);
  }
  return v;
}

// Finds the tile `index` of all, with kTileM rows each. The whole warp calls it; false: there are
// fewer tiles.
template <int kTileM>
__device__ __forceinline__ bool FindExpertTile(const ExpertParams& e, uint32_t m, uint32_t index,
                                               ExpertTile* found) {
  constexpr uint32_t kAll = 0xffffffff;
  constexpr int kEach = 4;  // experts of a lane: as many loads in flight
  const int lane = threadIdx.x % 32;
  uint32_t rows_before = 0, tiles_before = 0;
  for (int base = 0; base <= e.experts; base += 32 * kEach) {
    uint32_t end[kEach], tiles[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int expert = base + kEach * lane + i;
      const int32_t size = expert < e.experts ? __ldg(e.group_sizes + expert) : 0;
      end[i] = expert == e.experts ? m : min(static_cast<uint32_t>(max(size, 0)), m);
    }
#pragma unroll
    for (int i = 1; i < kEach; ++i) end[i] = min(end[i] + end[i - 1], m);
    uint32_t before = __shfl_up_sync(kAll, ScanUpTo(end[kEach - 1], m), 1);
    before = min(rows_before + (lane > 0 ? before : 0), m);
    uint32_t first = before, own = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      end[i] = min(end[i] + before, m);
      own += (end[i] - first + kTileM - 1) / kTileM;
      tiles[i] = own;
      first = end[i];
    }
    // At most M + E + 1 tiles, and the grid holds them times tiles_n.
    const uint32_t scanned = ScanUpTo(own, 0x7fffffff);
    const uint32_t lane_before = tiles_before + scanned - own;
    const uint32_t hits = __ballot_sync(kAll, index < (tiles_before + scanned) * e.tiles_n);
    if (hits != 0) {
      const int source = __ffs(hits) - 1;
      int which = 0;
#pragma unroll
      for (int i = 0; i + 1 < kEach; ++i) which += index >= (lane_before + tiles[i]) * e.tiles_n;
      uint32_t row0 = before, row1 = end[0], tile0 = 0, tile1 = tiles[0];
#pragma unroll
      for (int i = 1; i < kEach; ++i) {
        if (which >= i) row0 = end[i - 1], row1 = end[i], tile0 = tiles[i - 1], tile1 = tiles[i];
      }
      found->expert = base + kEach * source + __shfl_sync(kAll, which, source);
      found->first = __shfl_sync(kAll, row0, source);
      found->end = __shfl_sync(kAll, row1, source);
      found->tiles_m = __shfl_sync(kAll, tile1 - tile0, source);
      found->index = index - __shfl_sync(kAll, lane_before + tile0, source) * e.tiles_n;
      return true;
    }
    rows_before = __shfl_sync(kAll, end[kEach - 1], 31);
    tiles_before += __shfl_sync(kAll, scanned, 31);
  }
  return false;
}

}  // namespace w4a16
