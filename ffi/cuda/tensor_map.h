// Tensor maps: what the copy engine needs to know of a matrix in global memory.
#pragma once

#include <cuda.h>

#include "problem.h"

namespace w4a16 {

// A row-major matrix of 16-bit floats, rows x columns, in boxes of box_rows x 64 columns, which lie
// in shared memory as rows of 128 bytes in the 128-byte swizzle. What lies outside reads as zero
// and is not written. columns % 8 == 0, box_rows <= 256, `data` aligned to 16 bytes.
Status EncodeTensorMap(const void* data, DType type, int64_t rows, int64_t columns, int box_rows,
                       CUtensorMap* map);

// The same in boxes of box_blocks such boxes, neighbours along the columns, one after the other;
// coordinates are (column, row, block). columns % 64 == 0.
Status EncodeTensorMapInBlocks(const void* data, DType type, int64_t rows, int64_t columns,
                               int box_rows, int box_blocks, CUtensorMap* map);

// Scales or zeros, groups x n, in boxes of box_groups x box_n, row by row. What lies outside reads
// as zero. n % 8 == 0, box_n <= 256.
Status EncodeTensorMapOfScales(const void* data, DType type, int64_t groups, int64_t n,
                               int box_groups, int box_n, CUtensorMap* map);

// Packed weights (layout.h) in boxes of box_blocks_n x box_blocks_k blocks; coordinates are (word,
// block along N, block along K). What lies outside reads as zero.
Status EncodeTensorMapOfCodes(const uint32_t* qweight, int64_t n, int64_t k, int box_blocks_n,
                              int box_blocks_k, CUtensorMap* map);

}  // namespace w4a16
