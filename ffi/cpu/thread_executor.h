// An Executor on threads of its own.
#pragma once

#include "cpu.h"

namespace w4a16::cpu {

// Each ParallelFor starts threads and joins them; the caller works too. Threads that the system
// refuses to start are done without.
class ThreadExecutor final : public Executor {
 public:
  explicit ThreadExecutor(int num_threads);  // 0: as many as the machine has

  int num_threads() const override { return num_threads_; }
  void ParallelFor(int64_t num_tasks, const std::function<void(int64_t)>& body) override;

 private:
  int num_threads_;
};

}  // namespace w4a16::cpu
