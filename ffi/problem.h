// One matrix multiplication, as the library sees it: the static problem and its operands.
#pragma once

#include <string_view>

#include "layout.h"
#include "status.h"
#include "w4a16.h"

namespace w4a16 {

using DType = w4a16_dtype;
using Problem = w4a16_problem;
using Operands = w4a16_operands;
using Device = w4a16_device;

constexpr int DTypeBytes(DType t) { return t == W4A16_F32 ? 4 : 2; }
constexpr const char* DTypeName(DType t) {
  return t == W4A16_F16 ? "float16" : t == W4A16_BF16 ? "bfloat16" : "float32";
}

// By the names that JAX's side gives them: "add_norm", "swiglu". False: there is no such.
inline bool FindEpilogue(std::string_view name, w4a16_epilogue* epilogue) {
  *epilogue = name == "add_norm" ? W4A16_ADD_NORM
              : name == "swiglu" ? W4A16_SWIGLU
                                 : W4A16_NO_EPILOGUE;
  return *epilogue != W4A16_NO_EPILOGUE;
}

constexpr int64_t NumGroups(int64_t k, int64_t group_size) {
  return group_size >= k ? (k > 0 ? 1 : 0) : CeilDiv(k, group_size);
}
constexpr int64_t NumGroups(const Problem& p) { return NumGroups(p.k, p.group_size); }

// Sizes that no kernel's index arithmetic can overflow, known types, a usable group size.
Status CheckProblem(const Problem& p);

// Present and aligned to 16 bytes, if it is of any elements.
Status CheckPointer(const char* name, const void* pointer, int64_t elements);

// Pointers present and aligned to 16 bytes. `p` has passed CheckProblem.
Status CheckOperands(const Problem& p, const Operands& o);

// What a ragged product has beyond a product.
struct Experts {
  int64_t count;
  const int32_t* group_sizes;  // [count], of the backend's memory
};

// CheckProblem and the number of experts; a ragged product has no bias.
Status CheckRaggedProblem(const Problem& p, int64_t experts);

// As CheckOperands. `p` has passed CheckRaggedProblem.
Status CheckRaggedOperands(const Problem& p, const Experts& e, const Operands& o);

}  // namespace w4a16
