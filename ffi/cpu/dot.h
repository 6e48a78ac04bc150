// Dot on a chosen instruction set: Dot takes the best, tests take each.
#pragma once

#include "cpu.h"

namespace w4a16::cpu {

enum class Isa { kPortable, kAvx2, kAvx512 };

inline constexpr Isa kAllIsas[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512};

const char* IsaName(Isa isa);

// Whether this machine, and its operating system, can run it.
bool IsaAvailable(Isa isa);

// Dot with `isa`, which is available.
void DotWith(Isa isa, const Problem& p, const Operands& o, Executor& executor);

}  // namespace w4a16::cpu
