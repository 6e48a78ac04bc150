#include "problem.h"

namespace w4a16 {
namespace {

// Keeps every element count and byte count below 2^62.
constexpr int64_t kMaxExtent = int64_t{1} << 30;
constexpr int64_t kMaxExperts = 1 << 16;

std::string Got(const char* name, int64_t value) {
  return std::string(name) + " = " + std::to_string(value);
}

Status CheckExtent(const char* name, int64_t value) {
  if (value >= 0 && value <= kMaxExtent) return {};
  return Status::Invalid(Got(name, value) + ": expected 0.." + std::to_string(kMaxExtent));
}

}  // namespace

Status CheckPointer(const char* name, const void* pointer, int64_t elements) {
  if (elements == 0) return {};
  if (pointer == nullptr)
    return Status::Invalid(std::string(name) + ": expected a pointer, got null");
  if (reinterpret_cast<uintptr_t>(pointer) % 16 == 0) return {};
  return Status::Invalid(std::string(name) + ": expected an address aligned to 16 bytes");
}

Status CheckProblem(const Problem& p) {
  for (auto [name, value] : {std::pair{"M", p.m}, std::pair{"N", p.n}, std::pair{"K", p.k}}) {
    if (Status s = CheckExtent(name, value); !s.ok()) return s;
  }
  if (p.x_dtype < W4A16_F16 || p.x_dtype > W4A16_F32)
    return Status::Invalid(Got("x_dtype", static_cast<int>(p.x_dtype)) + ": unknown type");
  if (p.out_dtype != p.x_dtype && p.out_dtype != W4A16_F32)
    return Status::Invalid(Got("out_dtype", static_cast<int>(p.out_dtype)) +
                           ": expected x's type or float32");
  // Kernels fetch scales per 32 codes; other sizes would cut a fragment.
  if (p.group_size < p.k && (p.group_size < 32 || p.group_size % 32 != 0))
    return Status::Invalid(Got("group_size", p.group_size) +
                           ": expected a multiple of 32, or at least K = " + std::to_string(p.k));
  if (p.epilogue < W4A16_NO_EPILOGUE || p.epilogue > W4A16_SWIGLU)
    return Status::Invalid(Got("epilogue", static_cast<int>(p.epilogue)) + ": unknown");
  if (p.epilogue != W4A16_NO_EPILOGUE) {
    if (p.has_bias) return Status::Invalid("has_bias: a product with an epilogue has none");
    if (p.out_dtype != p.x_dtype)
      return Status::Invalid("out_dtype: expected x's type, because there is an epilogue");
    if (p.n % kBlockN != 0)
      return Status::Invalid(Got("N", p.n) + ": expected a multiple of " + std::to_string(kBlockN) +
                             ", because there is an epilogue");
  }
  return {};
}

Status CheckOperands(const Problem& p, const Operands& o) {
  if (o.workspace_bytes < 0)
    return Status::Invalid(Got("workspace_bytes", o.workspace_bytes) + ": expected at least 0");
  const bool add_norm = p.epilogue == W4A16_ADD_NORM, swiglu = p.epilogue == W4A16_SWIGLU;
  if (o.num_squares < 0 || o.num_squares > kMaxExtent ||
      (add_norm ? o.num_squares != BlocksN(p.n) : o.num_squares % 4 != 0))
    return Status::Invalid(
        Got("num_squares", o.num_squares) + ": expected " +
        (add_norm ? "N / 16" : "a multiple of 4 up to " + std::to_string(kMaxExtent)));
  // Of no rows, nothing is read.
  const int64_t scales = p.m > 0 ? NumGroups(p) * p.n : 0;
  struct Row {
    const char* name;
    const void* pointer;
    int64_t elements;
  };
  const Row rows[] = {
      {"x", o.x, p.m * p.k},
      {"qweight", o.qweight, p.m > 0 ? BlocksK(p.k) * BlocksN(p.n) : 0},
      {"scales", o.scales, scales},
      {"zeros", o.zeros, p.has_zeros ? scales : 0},
      {"bias", o.bias, p.has_bias ? p.m * p.n : 0},
      {"out", o.out, p.m * p.n},
      {"workspace", o.workspace, o.workspace_bytes},
      {"residual", o.residual, add_norm ? p.m * p.n : 0},
      {"norm_scale", o.norm_scale, add_norm ? p.m * p.n : 0},
      {"scaled", o.scaled, add_norm ? p.m * p.n : 0},
      {"squares", o.squares, add_norm || o.squares != nullptr ? p.m * o.num_squares : 0},
  };
  for (const Row& row : rows) {
    if (Status s = CheckPointer(row.name, row.pointer, row.elements); !s.ok()) return s;
  }
  if (!p.has_zeros && o.zeros != nullptr)
    return Status::Invalid("zeros: expected null, because the problem has none");
  if (!p.has_bias && o.bias != nullptr)
    return Status::Invalid("bias: expected null, because the problem has none");
  if (!add_norm && (o.residual != nullptr || o.norm_scale != nullptr || o.scaled != nullptr))
    return Status::Invalid(
        "residual, norm_scale, scaled: expected null, because the epilogue has none");
  if (!add_norm && !swiglu && o.squares != nullptr)
    return Status::Invalid("squares: expected null, because there is no epilogue");
  return {};
}

Status CheckRaggedProblem(const Problem& p, int64_t experts) {
  if (Status s = CheckProblem(p); !s.ok()) return s;
  if (experts < 0 || experts > kMaxExperts)
    return Status::Invalid(Got("experts", experts) + ": expected 0.." +
                           std::to_string(kMaxExperts));
  if (p.has_bias) return Status::Invalid("has_bias: a ragged product has none");
  if (p.batch_invariant)
    return Status::Invalid("batch_invariant: a ragged product does not promise it");
  if (p.epilogue != W4A16_NO_EPILOGUE)
    return Status::Invalid("epilogue: a ragged product has none");
  int64_t codes = 0;
  if (__builtin_mul_overflow(BlocksK(p.k) * BlocksN(p.n) * kBlockBytes, experts, &codes))
    return Status::Invalid(Got("experts", experts) + ": their weights are larger than any memory");
  return {};
}

Status CheckRaggedOperands(const Problem& p, const Experts& e, const Operands& o) {
  Problem read = p;
  if (e.count == 0) read.k = 0;  // no weight is read
  if (Status s = CheckOperands(read, o); !s.ok()) return s;
  if (Status s = CheckPointer("x", o.x, p.m * p.k); !s.ok()) return s;
  return CheckPointer("group_sizes", e.group_sizes, p.m * p.n > 0 ? e.count : 0);
}

}  // namespace w4a16
