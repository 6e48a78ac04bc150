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

// Inclusive sums over a warp's lanes that stop at `most` (below 2^31).
__device__ __forceinline__ uint32_t ScanUpTo(uint32_t v, uint32_t most) {
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffff, v, i);
    if (static_cast<int>(threadIdx.x % 32) >= i) v = min(v + other, most);
  }
  return v;
}

// Walks over the experts, kWidth at a time, with a whole warp. The entry after the last expert's
// stands for the rows of none.
template <int kTileM>
class ExpertScan {
 public:
  static constexpr int kEach = 4;  // experts of a lane: as many loads in flight
  static constexpr int kWidth = 32 * kEach;

  // Of the lane's experts base + kEach * lane + i: where their rows end, and how many tiles of
  // kTileM rows all experts up to them have. Before the first of them lie rows_before,
  // tiles_before.
  int base = -kWidth;
  uint32_t rows_before, tiles_before;
  uint32_t rows_end[kEach], tiles_end[kEach];

  __device__ __forceinline__ void Next(const ExpertParams& e, uint32_t m) {
    const int lane = threadIdx.x % 32;
    base += kWidth;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int expert = base + kEach * lane + i;
      const int32_t size = expert < e.experts ? __ldg(e.group_sizes + expert) : 0;
      rows_end[i] = expert == e.experts ? m : min(static_cast<uint32_t>(max(size, 0)), m);
    }
#pragma unroll
    for (int i = 1; i < kEach; ++i) rows_end[i] = min(rows_end[i] + rows_end[i - 1], m);
    const uint32_t before = __shfl_up_sync(kAll, ScanUpTo(rows_end[kEach - 1], m), 1);
    rows_before = min(all_rows_ + (lane > 0 ? before : 0), m);
    uint32_t first = rows_before, own = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      rows_end[i] = min(rows_end[i] + rows_before, m);
      own += (rows_end[i] - first + kTileM - 1) / kTileM;
      tiles_end[i] = own;
      first = rows_end[i];
    }
    tiles_before = all_tiles_ + ScanUpTo(own, 0x7fffffff) - own;
#pragma unroll
    for (int i = 0; i < kEach; ++i) tiles_end[i] += tiles_before;
    all_rows_ = __shfl_sync(kAll, rows_end[kEach - 1], 31);
    all_tiles_ = __shfl_sync(kAll, tiles_end[kEach - 1], 31);
  }

 private:
  static constexpr uint32_t kAll = 0xffffffff;
  uint32_t all_rows_ = 0, all_tiles_ = 0;
};

// A tile of one expert's rows.
struct ExpertTile {
  int expert;      // `experts`: rows that belong to none
  int first, end;  // rows of the expert
  int tiles_m;     // tiles that they make
  int index;  // of this tile among the expert's tiles_m * tiles_n, those of one n being neighbours
};

// Finds the tile `index` of all, with kTileM rows each. The whole warp calls it; false: there are
// fewer tiles. All tiles, times tiles_n, are below 2^31.
template <int kTileM>
__device__ __forceinline__ bool FindExpertTile(const ExpertParams& e, uint32_t m, uint32_t index,
                                               ExpertTile* found) {
  constexpr uint32_t kAll = 0xffffffff;
  ExpertScan<kTileM> scan;
  do {
    scan.Next(e, m);
    const uint32_t hits = __ballot_sync(kAll, index < scan.tiles_end[scan.kEach - 1] * e.tiles_n);
    if (hits == 0) continue;
    const int source = __ffs(hits) - 1;
    int which = 0;
    uint32_t row0 = scan.rows_before, row1 = scan.rows_end[0];
    uint32_t tile0 = scan.tiles_before, tile1 = scan.tiles_end[0];
#pragma unroll
    for (int i = 1; i < scan.kEach; ++i) {
      if (index < scan.tiles_end[i - 1] * e.tiles_n) continue;
      which = i;
      row0 = scan.rows_end[i - 1], row1 = scan.rows_end[i];
      tile0 = scan.tiles_end[i - 1], tile1 = scan.tiles_end[i];
    }
    found->expert = scan.base + scan.kEach * source + __shfl_sync(kAll, which, source);
    found->first = __shfl_sync(kAll, row0, source);
    found->end = __shfl_sync(kAll, row1, source);
    found->tiles_m = __shfl_sync(kAll, tile1 - tile0, source);
    found->index = index - __shfl_sync(kAll, tile0, source) * e.tiles_n;
    return true;
  } while (scan.base + scan.kWidth <= e.experts);
  return false;
}

// The ends of an expert's tiles (of kTileM rows, before they are counted along N) and rows.
struct ExpertEnd {
  uint32_t tiles, rows;
};

template <int kTileM>
__device__ __forceinline__ void MakeExpertTable(const ExpertParams& e, uint32_t m,
                                                ExpertEnd* table) {
  ExpertScan<kTileM> scan;
  for (int base = 0; base < e.experts; base += scan.kWidth) {
    scan.Next(e, m);
#pragma unroll
    for (int i = 0; i < scan.kEach; ++i) {
      const int expert = base + scan.kEach * (threadIdx.x % 32) + i;
      if (expert < e.experts) table[expert] = {scan.tiles_end[i], scan.rows_end[i]};
    }
  }
}

// Zeroes rows `first` to m of `out`, which are no expert's, with all threads of the grid.
__device__ __forceinline__ void ClearRows(void* out, uint32_t first, int m, int64_t row_bytes) {
  const int64_t end = m * row_bytes / 2;
  int64_t i = first * row_bytes / 2 + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i < end; i += static_cast<int64_t>(gridDim.x) * blockDim.x)
    static_cast<uint16_t*>(out)[i] = 0;
}

}  // namespace w4a16
