// How a CUTLASS kernel runs. Apart from config.h, so that a change of the list of configurations
// does not recompile the CUTLASS kernels, which takes minutes.
#pragma once

namespace w4a16 {

enum class Schedule { kNone, kCooperative, kPingpong };

enum class Scheduler { kDataParallel, kStreamK };

}  // namespace w4a16
