// What Dot hands to the kernel of one instruction set. The files dot_avx*.cc are compiled with
// that set's flags, so they must define no function of external linkage that another file might
// define too (an inline function, a template of the standard library): the linker would keep one
// copy, and that one may need an instruction the machine lacks. They include this header,
// dot_kernel.h and the intrinsics only.
#pragma once

#include <stdint.h>

#include "../layout.h"
#include "../w4a16.h"

namespace w4a16::cpu {

inline constexpr int kStripRows = 32;    // most rows of x in a strip
inline constexpr int kStripBlocks = 16;  // most blocks of N in a strip
inline constexpr int kStripCols = kStripBlocks * kBlockN;

// One task: out[rows, cols] over all of K. Array pointers stand at the strip's first element.
struct DotStrip {
  int64_t k;
  int64_t stride;  // elements between rows of scales, zeros and out
  int64_t group_size;
  int64_t blocks_n;  // blocks between rows of blocks
  int rows;
  int cols;
  w4a16_dtype x_dtype;
  w4a16_dtype out_dtype;
  const float* x;  // arranged
  const uint32_t* qweight;
  const void* scales;
  const void* zeros;  // or null
  const void* bias;   // or null
  void* out;
  float alpha;
};

struct DotKernel {
  // Rows of x are dealt to ceil(rows / tile_rows) tiles of nearly equal height.
  int tile_rows;
  // Converts `rows` rows of x, a tile, to float, in the order in which the codes lie:
  // out[ceil(K/64)][rows][4][16], where out[..][j][4 * t + s] is k = 16 s + 2 t + 8 (j % 2) + j / 2
  // of the block: word 4 t + s of a pair of rows holds that code in its nibbles 2 j and 2 j + 1.
  void (*arrange)(const void* x, w4a16_dtype dtype, int64_t k, int rows, float* out);
  void (*dot)(const DotStrip& strip);
};

extern const DotKernel kDotPortable;
#if defined(__x86_64__)
extern const DotKernel kDotAvx2;
extern const DotKernel kDotAvx512;
#endif

// First row of tile `index`.
static constexpr int TileBegin(int index, int tiles, int rows) { return index * rows / tiles; }

}  // namespace w4a16::cpu
