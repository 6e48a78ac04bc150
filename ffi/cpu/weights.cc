// Pack, Dequantize and Quantize. Compiled without contraction of multiply and add: values are
// rounded as layout.h's and quantize.h's formulas say.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../quantize.h"
#include "cpu.h"
#include "float16.h"

namespace w4a16::cpu {
namespace {

constexpr int64_t kTaskBlocks = 4;  // blocks of N in a task: whole cache lines of w and codes
constexpr int64_t kTaskCols = kTaskBlocks * kBlockN;

template <class T>
T Read(const void* array, int64_t index) {
  T value;
  std::memcpy(&value, static_cast<const char*>(array) + index * sizeof(T), sizeof(T));
  return value;
}

template <class T>
void Write(void* array, int64_t index, T value) {
  std::memcpy(static_cast<char*>(array) + index * sizeof(T), &value, sizeof(T));
}

void ReadFloats(const void* array, DType dtype, int64_t index, int64_t count, float* out) {
  if (dtype == W4A16_F32) {
    for (int64_t i = 0; i < count; ++i) out[i] = Read<float>(array, index + i);
  } else if (dtype == W4A16_F16) {
    for (int64_t i = 0; i < count; ++i) out[i] = HalfToFloat(Read<uint16_t>(array, index + i));
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = BFloat16ToFloat(Read<uint16_t>(array, index + i));
  }
}

void WriteFloats(const float* in, int64_t count, DType dtype, void* array, int64_t index) {
  if (dtype == W4A16_F32) {
    for (int64_t i = 0; i < count; ++i) Write(array, index + i, in[i]);
  } else if (dtype == W4A16_F16) {
    for (int64_t i = 0; i < count; ++i) Write(array, index + i, FloatToHalf(in[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) Write(array, index + i, FloatToBFloat16(in[i]));
  }
}

// The blocks of a row of blocks that a task covers, as a range of columns.
template <class Body>
void ForBlockColumns(int64_t task, int64_t n, Body&& body) {
  const int64_t end = std::min(n, (task + 1) * kTaskCols);
  for (int64_t col = task * kTaskCols; col < end; col += kBlockN)
    body(col, std::min<int64_t>(n - col, kBlockN));
}

}  // namespace

void Pack(const uint8_t* codes, int64_t k, int64_t n, uint32_t* qweight, Executor& executor) {
  const int64_t blocks_k = BlocksK(k), tasks_n = CeilDiv(n, kTaskCols);
  executor.ParallelFor(blocks_k * tasks_n, [&](int64_t task) {
    const int64_t row = task / tasks_n * kBlockK;
    const int rows = static_cast<int>(std::min<int64_t>(k - row, kBlockK));
    ForBlockColumns(task % tasks_n, n, [&](int64_t col, int64_t cols) {
      uint32_t block[kBlockWords] = {};
      for (int kk = 0; kk < rows; ++kk) {
        const uint8_t* from = codes + (row + kk) * n + col;
        for (int nn = 0; nn < cols; ++nn) {
          const CodePlace place = PlaceOf(nn, kk);
          block[place.word] |= static_cast<uint32_t>(from[nn] & 15) << (4 * place.nibble);
        }
      }
      std::memcpy(qweight + BlockIndex(row, col, BlocksN(n)) * kBlockWords, block, sizeof(block));
    });
  });
}

void Dequantize(const uint32_t* qweight, const void* scales, const void* zeros, DType scale_dtype,
                int64_t k, int64_t n, int64_t group_size, DType out_dtype, void* out,
                Executor& executor) {
  const int64_t blocks_k = BlocksK(k), tasks_n = CeilDiv(n, kTaskCols);
  executor.ParallelFor(blocks_k * tasks_n, [&](int64_t task) {
    const int64_t row = task / tasks_n * kBlockK;
    const int rows = static_cast<int>(std::min<int64_t>(k - row, kBlockK));
    ForBlockColumns(task % tasks_n, n, [&](int64_t col, int64_t cols) {
      const uint32_t* block = qweight + BlockIndex(row, col, BlocksN(n)) * kBlockWords;
      float scale[kBlockN] = {}, zero[kBlockN] = {}, value[kBlockN];
      int64_t group = -1;
      for (int kk = 0; kk < rows; ++kk) {
        const int64_t next = group_size >= k ? 0 : (row + kk) / group_size;
        if (next != group) {
          group = next;
          ReadFloats(scales, scale_dtype, group * n + col, cols, scale);
          std::fill_n(zero, kBlockN, kSymmetricZero);
          if (zeros != nullptr) ReadFloats(zeros, scale_dtype, group * n + col, cols, zero);
        }
        for (int nn = 0; nn < kBlockN; ++nn) {
          const CodePlace place = PlaceOf(nn, kk);
          const int code = block[place.word] >> (4 * place.nibble) & 15;
          value[nn] = (static_cast<float>(code) - zero[nn]) * scale[nn];
        }
        WriteFloats(value, cols, out_dtype, out, (row + kk) * n + col);
      }
    });
  });
}

void Quantize(const void* w, DType w_dtype, int64_t k, int64_t n, int64_t group_size,
              DType scale_dtype, uint32_t* qweight, void* scales, void* zeros, Executor& executor) {
  const int64_t blocks_n = BlocksN(n), groups = NumGroups(k, group_size);
  executor.ParallelFor(CeilDiv(n, kTaskCols), [&](int64_t task) {
    const int64_t col = task * kTaskCols;
    const int cols = static_cast<int>(std::min(n - col, kTaskCols));
    const int64_t blocks = CeilDiv(cols, kBlockN);
    for (int64_t row = 0; row < k; row += kBlockK) {
      std::memset(qweight + BlockIndex(row, col, blocks_n) * kBlockWords, 0, blocks * kBlockBytes);
    }
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = group * group_size;
      const int64_t end = groups == 1 ? k : std::min(k, begin + group_size);
      float value[kTaskCols], lo[kTaskCols] = {}, hi[kTaskCols] = {};
      for (int64_t kk = begin; kk < end; ++kk) {
        ReadFloats(w, w_dtype, kk * n + col, cols, value);
        for (int i = 0; i < cols; ++i) {
          lo[i] = MinOrNan(lo[i], value[i]);
          hi[i] = MaxOrNan(hi[i], value[i]);
        }
      }
      float scale[kTaskCols], zero[kTaskCols];
      for (int i = 0; i < cols; ++i) {
        scale[i] = zeros == nullptr ? MaxOrNan(hi[i], -lo[i]) * kSymmetricStep
                                    : (hi[i] - lo[i]) * kAsymmetricStep;
      }
      WriteFloats(scale, cols, scale_dtype, scales, group * n + col);
      ReadFloats(scales, scale_dtype, group * n + col, cols, scale);
      for (int i = 0; i < cols; ++i)
        zero[i] = zeros == nullptr ? kSymmetricZero : ZeroPoint(lo[i], scale[i]);
      if (zeros != nullptr) WriteFloats(zero, cols, scale_dtype, zeros, group * n + col);
      for (int64_t kk = begin; kk < end; ++kk) {
        ReadFloats(w, w_dtype, kk * n + col, cols, value);
        uint32_t* words = qweight + BlockIndex(kk, col, blocks_n) * kBlockWords;
        for (int i = 0; i < cols; ++i) {
          const CodePlace place = PlaceOf(i % kBlockN, kk % kBlockK);
          words[i / kBlockN * kBlockWords + place.word] |=
              static_cast<uint32_t>(CodeOf(value[i], scale[i], zero[i])) << (4 * place.nibble);
        }
      }
    }
  });
}

}  // namespace w4a16::cpu
