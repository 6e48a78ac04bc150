#include "dot.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "dot_strip.h"

namespace w4a16::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, kAlignment); }
};

const DotKernel& KernelOf(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return kDotAvx512;
  if (isa == Isa::kAvx2) return kDotAvx2;
#endif
  (void)isa;
  return kDotPortable;
}

Isa BestIsa() {
  for (Isa isa : {Isa::kAvx512, Isa::kAvx2}) {
    if (IsaAvailable(isa)) return isa;
  }
  return Isa::kPortable;
}

const std::byte* At(const void* p, int64_t index, DType dtype) {
  return p == nullptr ? nullptr : static_cast<const std::byte*>(p) + index * DTypeBytes(dtype);
}

}  // namespace

const char* IsaName(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "portable";
}

bool IsaAvailable(Isa isa) {
  if (isa == Isa::kPortable) return true;
#if defined(__x86_64__)
  if (isa == Isa::kAvx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

void DotWith(Isa isa, const Problem& p, const Operands& o, Executor& executor) {
  if (p.m == 0 || p.n == 0) return;
  const DotKernel& kernel = KernelOf(isa);
  const int64_t blocks_k = BlocksK(p.k), blocks_n = BlocksN(p.n);
  const int64_t most_rows = std::min<int64_t>(p.m, kStripRows);
  const std::unique_ptr<float[], AlignedDelete> x(
      new (kAlignment) float[std::max<int64_t>(most_rows * blocks_k * kBlockK, 1)]);

  // Several strips for each thread, so that threads end together.
  const int64_t strip_blocks = std::clamp<int64_t>(
      CeilDiv(blocks_n, int64_t{4} * std::max(executor.num_threads(), 1)), 1, kStripBlocks);
  for (int64_t row = 0; row < p.m; row += kStripRows) {
    const int rows = static_cast<int>(std::min<int64_t>(p.m - row, kStripRows));
    const int tiles = static_cast<int>(CeilDiv(rows, kernel.tile_rows));
    const auto arrange = [&](int64_t tile) {
      const int begin = TileBegin(static_cast<int>(tile), tiles, rows);
      const int end = TileBegin(static_cast<int>(tile) + 1, tiles, rows);
      kernel.arrange(At(o.x, (row + begin) * p.k, p.x_dtype), p.x_dtype, p.k, end - begin,
                     x.get() + begin * blocks_k * kBlockK);
    };
    if (tiles == 1) {
      arrange(0);
    } else {
      executor.ParallelFor(tiles, arrange);
    }
    executor.ParallelFor(CeilDiv(blocks_n, strip_blocks), [&](int64_t strip) {
      const int64_t block = strip * strip_blocks, col = block * kBlockN;
      kernel.dot({
          .k = p.k,
          .stride = p.n,
          .group_size = p.group_size,
          .blocks_n = blocks_n,
          .rows = rows,
          .cols = static_cast<int>(std::min(p.n - col, strip_blocks * kBlockN)),
          .x_dtype = p.x_dtype,
          .out_dtype = p.out_dtype,
          .x = x.get(),
          .qweight = o.qweight + block * kBlockWords,
          .scales = At(o.scales, col, p.x_dtype),
          .zeros = At(p.has_zeros ? o.zeros : nullptr, col, p.x_dtype),
          .bias = At(p.has_bias ? o.bias : nullptr, col, p.x_dtype),
          .out = const_cast<std::byte*>(At(o.out, row * p.n + col, p.out_dtype)),
          .alpha = o.alpha,
      });
    });
  }
}

void Dot(const Problem& p, const Operands& o, Executor& executor) {
  DotWith(BestIsa(), p, o, executor);
}

void RaggedDot(const Problem& p, const Experts& e, const Operands& o, Executor& executor) {
  const int64_t qweight_words = BlocksK(p.k) * BlocksN(p.n) * kBlockWords;
  const int64_t scale_elements = NumGroups(p) * p.n;
  Problem part = p;
  Operands at = o;
  int64_t row = 0;
  for (int64_t i = 0; i < e.count && row < p.m; ++i) {
    part.m = std::clamp<int64_t>(e.group_sizes[i], 0, p.m - row);
    if (part.m == 0) continue;
    at.x = At(o.x, row * p.k, p.x_dtype);
    at.qweight = o.qweight + i * qweight_words;
    at.scales = At(o.scales, i * scale_elements, p.x_dtype);
    at.zeros = At(o.zeros, i * scale_elements, p.x_dtype);
    at.out = const_cast<std::byte*>(At(o.out, row * p.n, p.out_dtype));
    Dot(part, at, executor);
    row += part.m;
  }
  if (row < p.m && p.n > 0)
    std::memset(const_cast<std::byte*>(At(o.out, row * p.n, p.out_dtype)), 0,
                (p.m - row) * p.n * DTypeBytes(p.out_dtype));
}

const char* InstructionSet() { return IsaName(BestIsa()); }

}  // namespace w4a16::cpu
