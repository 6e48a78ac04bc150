// The CPU half of the library: the same packed layout, threaded and vectorised.
//
// Results do not depend on the executor. Out of memory is thrown as std::bad_alloc, by products
// alone and on the calling thread; tasks never throw.
#pragma once

#include <cstdint>
#include <functional>

#include "problem.h"

namespace w4a16::cpu {

// Runs body(0) ... body(num_tasks - 1), in any order and on any threads, and returns when all are
// done.
class Executor {
 public:
  virtual ~Executor() = default;
  virtual int num_threads() const = 0;
  virtual void ParallelFor(int64_t num_tasks, const std::function<void(int64_t)>& body) = 0;
};

// Inputs have passed CheckProblem and CheckOperands. Operand order and meaning: w4a16.h.
void Dot(const Problem& p, const Operands& o, Executor& executor);

// Inputs have passed CheckRaggedProblem and CheckRaggedOperands.
void RaggedDot(const Problem& p, const Experts& e, const Operands& o, Executor& executor);

void Pack(const uint8_t* codes, int64_t k, int64_t n, uint32_t* qweight, Executor& executor);

void Dequantize(const uint32_t* qweight, const void* scales, const void* zeros, DType scale_dtype,
                int64_t k, int64_t n, int64_t group_size, DType out_dtype, void* out,
                Executor& executor);

void Quantize(const void* w, DType w_dtype, int64_t k, int64_t n, int64_t group_size,
              DType scale_dtype, uint32_t* qweight, void* scales, void* zeros, Executor& executor);

// Name of the instruction set that Dot uses on this machine: "avx512", "avx2" or "portable".
const char* InstructionSet();

}  // namespace w4a16::cpu
