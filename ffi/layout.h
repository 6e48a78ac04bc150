// The packed layout of 4-bit weights: the one definition in C++ (its Python twin is _layout.py).
//
// A weight of K x N codes (0..15) is stored as uint32[ceil(K/64)][ceil(N/16)][128]: blocks of
// 64 (K) x 16 (N) codes = 512 bytes, each block lane-major. Lane l of a warp owns 4 consecutive
// words (16 bytes), one word for each k16 step of the block, and a word holds the 8 codes that the
// lane needs for its A fragment of mma.m16n8k16 (A = 16 rows of N x 16 of K):
//
//            word of (lane l, step s)                 where a code comes from
//   bits  31..28  27..24  ...  7..4   3..0      n = l / 4 + 8 * r
//   nibble  7       6     ...   1      0        k = 16 * s + 2 * (l % 4) + lo + 8 * hi
//                                               nibble = r + 2 * hi + 4 * lo
//
// Nibbles i and i + 4 are neighbours in k, so one mask (w & 0x000f000f) gives both halves of a
// 16-bit pair. Four blocks adjacent in N are one warpgroup's m64k16 register operand of wgmma.
// N and K that do not fill a block are padded when packing; padding may hold any code.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define W4A16_HD __host__ __device__
#else
#define W4A16_HD
#endif

namespace w4a16 {

inline constexpr int kBlockN = 16;       // rows of N in a block
inline constexpr int kBlockK = 64;       // codes of K in a block
inline constexpr int kBlockWords = 128;  // 32-bit words in a block
inline constexpr int kBlockBytes = 512;
inline constexpr int kSymmetricZero = 8;  // the zero point where no zeros are given

// Where a code lies inside its block.
struct CodePlace {
  int word;    // 0..127
  int nibble;  // 0..7: bits 4 * nibble .. 4 * nibble + 3 of the word
};

// A code's coordinates inside its block.
struct CodeCoord {
  int n;  // 0..15
  int k;  // 0..63
};

W4A16_HD constexpr CodePlace PlaceOf(int n, int k) {
  const int lane = 4 * (n % 8) + (k % 8) / 2;
  return {4 * lane + k / 16, n / 8 + 2 * ((k / 8) % 2) + 4 * (k % 2)};
}

W4A16_HD constexpr CodeCoord CoordOf(int word, int nibble) {
  const int lane = word / 4, step = word % 4;
  return {lane / 4 + 8 * (nibble & 1),
          16 * step + 2 * (lane % 4) + (nibble >> 2) + 8 * ((nibble >> 1) & 1)};
}

W4A16_HD constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

W4A16_HD constexpr int64_t BlocksK(int64_t k) { return CeilDiv(k, kBlockK); }
W4A16_HD constexpr int64_t BlocksN(int64_t n) { return CeilDiv(n, kBlockN); }

// Index of the block that holds (k, n) in the array of blocks of a weight with `blocks_n` in N.
W4A16_HD constexpr int64_t BlockIndex(int64_t k, int64_t n, int64_t blocks_n) {
  return (k / kBlockK) * blocks_n + n / kBlockN;
}

}  // namespace w4a16
