// The kernel of Dot, written once over an instruction set's vectors V (dot_<isa>.cc define one).
//
// A row of a block's words is 16 words = 64 bytes: all codes of columns p and p + 8 (0 <= p < 8).
// Word 4 t + s holds, in nibble r + 2 j, column p + 8 r at the k of place [j][4 t + s] of the
// arranged x. So no code moves: a vector of words, shifted right by 4 again and again, is decoded
// to weights, multiplied by x and added up lane by lane, and the lanes of a column are summed once
// per chunk of K. A weight is decoded once for all rows of x in a tile.
//
// Codes of steps s = 0, 1 and s = 2, 3 lie in the lower and upper half of the block's 64 k, which
// belong to two groups where the group size is an odd multiple of 32.
//
// A sum's order of additions depends on nothing but K: not on M, N, the tile or the thread.
//
// Everything here is in an unnamed namespace: see dot_strip.h.
#pragma once

#include "dot_strip.h"

namespace w4a16::cpu {
namespace {

inline constexpr int kPairs = 8;         // pairs of columns in a block
inline constexpr int kPairWords = 16;    // words of a pair
inline constexpr int kChunkBlocks = 8;   // blocks of K in a chunk: x of a tile stays in L1
inline constexpr int kChunkGroups = 16;  // most groups in a chunk

// How the lanes of a block find their group.
enum class Span {
  kOneGroup,
  kTwoGroups,  // the halves of the block differ
  kTail,       // K ends inside the block; the halves may differ too
};

// Blocks of a chunk that share their groups.
struct Run {
  int begin, end;
  int lower, upper;  // groups of the halves, counted from the chunk's first
  Span span;
};

struct Chunk {
  int64_t first_group;
  int groups;
  int runs;
  Run run[kChunkBlocks];
};

// Scales and zero points of a block's columns, by the chunk's groups.
struct Columns {
  alignas(64) float scale[kChunkGroups][kBlockN];
  alignas(64) float zero[kChunkGroups][kBlockN];
};

inline Chunk MakeChunk(const DotStrip& d, int64_t first_block, int blocks) {
  Chunk chunk = {};
  const int64_t group_size = d.group_size < d.k ? d.group_size : d.k;
  chunk.first_group = first_block * kBlockK / group_size;
  for (int b = 0; b < blocks; ++b) {
    const int64_t k = (first_block + b) * kBlockK;
    const int64_t last = (k + kBlockK < d.k ? k + kBlockK : d.k) - 1;
    const int lower = static_cast<int>(k / group_size - chunk.first_group);
    const int upper = static_cast<int>(last / group_size - chunk.first_group);
    const Span span = k + kBlockK > d.k ? Span::kTail
                      : lower == upper  ? Span::kOneGroup
                                        : Span::kTwoGroups;
    Run& run = chunk.run[chunk.runs > 0 ? chunk.runs - 1 : 0];
    if (chunk.runs > 0 && run.lower == lower && run.upper == upper && run.span == span) {
      run.end = b + 1;
    } else {
      chunk.run[chunk.runs++] = {b, b + 1, lower, upper, span};
    }
    chunk.groups = upper + 1;
  }
  return chunk;
}

// `count` numbers of `src` from `offset`; reads no further.
template <class V>
inline void ToFloat(const void* src, w4a16_dtype dtype, int64_t offset, int count, float* dst) {
  const int size = dtype == W4A16_F32 ? 4 : 2;
  const char* from = static_cast<const char*>(src) + offset * size;
  int i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth) V::Store(dst + i, V::Load(from + i * size, dtype));
  const int left = count - i;
  if (left <= 0) return;
  char rest[V::kWidth * sizeof(float)] = {};
  float values[V::kWidth];
  __builtin_memcpy(rest, from + i * size, left * size);
  V::Store(values, V::Load(rest, dtype));
  __builtin_memcpy(dst + i, values, left * sizeof(float));
}

template <class V>
void Arrange(const void* x, w4a16_dtype dtype, int64_t k, int rows, float* out) {
  const int64_t blocks_k = (k + kBlockK - 1) / kBlockK;
  for (int64_t b = 0; b < blocks_k; ++b) {
    const int count = static_cast<int>(k - b * kBlockK < kBlockK ? k - b * kBlockK : kBlockK);
    for (int m = 0; m < rows; ++m) {
      alignas(64) float values[kBlockK] = {};
      ToFloat<V>(x, dtype, m * k + b * kBlockK, count, values);
      for (int j = 0; j < 4; ++j) {
        for (int t = 0; t < 4; ++t) {
          for (int s = 0; s < 4; ++s) *out++ = values[16 * s + 2 * t + 8 * (j % 2) + j / 2];
        }
      }
    }
  }
}

template <class V>
void LoadColumns(const DotStrip& d, const Chunk& chunk, int col, Columns* columns) {
  const int count = d.cols - col < kBlockN ? d.cols - col : kBlockN;
  for (int g = 0; g < chunk.groups; ++g) {
    const int64_t offset = (chunk.first_group + g) * d.stride + col;
    for (int i = count; i < kBlockN; ++i) columns->scale[g][i] = columns->zero[g][i] = 0;
    ToFloat<V>(d.scales, d.x_dtype, offset, count, columns->scale[g]);
    if (d.zeros != nullptr) {
      ToFloat<V>(d.zeros, d.x_dtype, offset, count, columns->zero[g]);
    } else {
      for (int i = 0; i < count; ++i) columns->zero[g][i] = kSymmetricZero;
    }
  }
}

// All ones where the arranged place of K's last block is inside K.
struct TailMask {
  alignas(64) uint32_t lane[4][kPairWords];
};

inline TailMask MakeTailMask(int64_t k) {
  TailMask mask;
  const int count = static_cast<int>(k % kBlockK);
  for (int j = 0; j < 4; ++j) {
    for (int i = 0; i < kPairWords; ++i) {
      mask.lane[j][i] = 16 * (i % 4) + 2 * (i / 4) + 8 * (j % 2) + j / 2 < count ? ~0u : 0;
    }
  }
  return mask;
}

// The sums of a tile of kM rows and kP pairs of columns: one vector each, summed four at a time.
template <class V, int kM>
struct Tile {
  static constexpr int kFit = V::kAccumulators / (2 * kM);
  static constexpr int kP = kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  static constexpr int kSize = (2 * kP * kM + 3) / 4 * 4;
  static constexpr int At(int m, int r, int p) { return (m * 2 + r) * kP + p; }
};

// acc += the blocks of one run, for the pairs of columns from `pair0`, where `words` stands.
template <class V, int kM, Span kSpan>
inline __attribute__((always_inline)) void AddRun(const Run& run, const Columns& columns, int pair0,
                                                  const uint32_t* words, int64_t stride,
                                                  const float* x, const TailMask& tail,
                                                  typename V::Float (&acc)[Tile<V, kM>::kSize]) {
  constexpr int kP = Tile<V, kM>::kP;
  typename V::Column column[2][kP];
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kP; ++p) {
      const int n = pair0 + p + 8 * r;
      column[r][p] = V::MakeColumn(columns.scale[run.lower][n], columns.zero[run.lower][n],
                                   columns.scale[run.upper][n], columns.zero[run.upper][n]);
    }
  }
  for (int b = run.begin; b < run.end; ++b) {
    const uint32_t* block = words + b * stride;
    const float* xb = x + b * (kM * kBlockK);
    // The next block in N: too short a stretch of each row of blocks is read for the hardware to
    // foresee it.
#pragma GCC unroll 4
    for (int p = 0; p < kP; ++p) __builtin_prefetch(block + kBlockWords + p * kPairWords);
#pragma GCC unroll 4
    for (int i = 0; i < kPairWords; i += V::kWidth) {
      typename V::Int w[kP];
#pragma GCC unroll 4
      for (int p = 0; p < kP; ++p) w[p] = V::LoadWords(block + p * kPairWords + i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        typename V::Float weight[2][kP];
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
#pragma GCC unroll 4
          for (int p = 0; p < kP; ++p) {
            weight[r][p] = V::template Decode<kSpan != Span::kOneGroup>(w[p], column[r][p]);
            if (kSpan == Span::kTail) weight[r][p] = V::And(weight[r][p], &tail.lane[j][i]);
            w[p] = V::NextNibble(w[p]);
          }
        }
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
          const typename V::Float xm = V::LoadFloats(xb + m * kBlockK + j * kPairWords + i);
#pragma GCC unroll 2
          for (int r = 0; r < 2; ++r) {
#pragma GCC unroll 4
            for (int p = 0; p < kP; ++p) {
              typename V::Float& sum = acc[Tile<V, kM>::At(m, r, p)];
              sum = V::MulAdd(weight[r][p], xm, sum);
            }
          }
        }
      }
    }
  }
}

// sums[m][n] += one chunk of K, for a tile of kM rows and one block of columns. Never inlined: the
// compiler then runs out of registers (GCC 12 made M = 1 half as fast).
template <class V, int kM>
__attribute__((noinline)) void AddChunk(const Chunk& chunk, const Columns& columns,
                                        const uint32_t* words, int64_t stride, const float* x,
                                        const TailMask& tail, float* sums) {
  using T = Tile<V, kM>;
  for (int pair0 = 0; pair0 < kPairs; pair0 += T::kP) {
    typename V::Float acc[T::kSize];
#pragma GCC unroll 16
    for (int i = 0; i < T::kSize; ++i) acc[i] = V::Zero();
    const uint32_t* pair_words = words + pair0 * kPairWords;
    for (int i = 0; i < chunk.runs; ++i) {
      const Run& run = chunk.run[i];
      if (run.span == Span::kOneGroup) {
        AddRun<V, kM, Span::kOneGroup>(run, columns, pair0, pair_words, stride, x, tail, acc);
      } else if (run.span == Span::kTwoGroups) {
        AddRun<V, kM, Span::kTwoGroups>(run, columns, pair0, pair_words, stride, x, tail, acc);
      } else {
        AddRun<V, kM, Span::kTail>(run, columns, pair0, pair_words, stride, x, tail, acc);
      }
    }
    float total[T::kSize];
#pragma GCC unroll 4
    for (int i = 0; i < T::kSize; i += 4)
      V::Sum4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3], total + i);
    for (int m = 0; m < kM; ++m) {
      for (int r = 0; r < 2; ++r) {
        for (int p = 0; p < T::kP; ++p)
          sums[m * kStripCols + pair0 + p + 8 * r] += total[T::At(m, r, p)];
      }
    }
  }
}

// out = alpha * sum + bias, rounded once.
template <class V>
void WriteRow(const DotStrip& d, const float* sums, int row) {
  const int size = d.out_dtype == W4A16_F32 ? 4 : 2;
  char* out = static_cast<char*>(d.out) + row * d.stride * size;
  for (int col = 0; col < d.cols; col += V::kWidth) {
    const int count = d.cols - col < V::kWidth ? d.cols - col : V::kWidth;
    typename V::Float value = V::Mul(V::LoadFloats(sums + col), V::Broadcast(d.alpha));
    if (d.bias != nullptr) {
      alignas(64) float bias[V::kWidth] = {};
      ToFloat<V>(d.bias, d.x_dtype, col, count, bias);
      value = V::Add(value, V::LoadFloats(bias));
    }
    if (count == V::kWidth) {
      V::StoreAs(out + col * size, value, d.out_dtype);
    } else {
      char rest[V::kWidth * sizeof(float)];
      V::StoreAs(rest, value, d.out_dtype);
      __builtin_memcpy(out + col * size, rest, count * size);
    }
  }
}

// AddChunk for a tile of `rows` rows, 1 <= rows <= kM.
template <class V, int kM, class... Args>
inline void AddChunkOfRows(int rows, const Args&... args) {
  if (rows == kM) {
    AddChunk<V, kM>(args...);
  } else if constexpr (kM > 1) {
    AddChunkOfRows<V, kM - 1>(rows, args...);
  }
}

template <class V>
void DotOfStrip(const DotStrip& d) {
  alignas(64) float sums[kStripRows][kStripCols];
  __builtin_memset(sums, 0, d.rows * sizeof(sums[0]));
  const TailMask tail = MakeTailMask(d.k);
  const int64_t blocks_k = (d.k + kBlockK - 1) / kBlockK;
  const int64_t stride = d.blocks_n * kBlockWords;
  const int tiles = (d.rows + V::kTileRows - 1) / V::kTileRows;
  for (int64_t first = 0; first < blocks_k; first += kChunkBlocks) {
    const int64_t left = blocks_k - first;
    const Chunk chunk = MakeChunk(d, first, left < kChunkBlocks ? left : kChunkBlocks);
    for (int tile = 0; tile < tiles; ++tile) {
      const int row = TileBegin(tile, tiles, d.rows);
      const int rows = TileBegin(tile + 1, tiles, d.rows) - row;
      const float* x = d.x + (row * blocks_k + rows * first) * kBlockK;
      for (int col = 0; col < d.cols; col += kBlockN) {
        Columns columns;
        LoadColumns<V>(d, chunk, col, &columns);
        const uint32_t* words = d.qweight + first * stride + col / kBlockN * kBlockWords;
        AddChunkOfRows<V, V::kTileRows>(rows, chunk, columns, words, stride, x, tail,
                                        &sums[row][col]);
      }
    }
  }
  for (int row = 0; row < d.rows; ++row) WriteRow<V>(d, sums[row], row);
}

template <class V>
inline constexpr DotKernel kDotKernel = {V::kTileRows, Arrange<V>, DotOfStrip<V>};

}  // namespace
}  // namespace w4a16::cpu
