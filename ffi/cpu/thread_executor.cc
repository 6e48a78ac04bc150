#include "thread_executor.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

namespace w4a16::cpu {

ThreadExecutor::ThreadExecutor(int num_threads)
    : num_threads_(num_threads > 0
                       ? num_threads
                       : std::max(1, static_cast<int>(std::thread::hardware_concurrency()))) {}

void ThreadExecutor::ParallelFor(int64_t num_tasks, const std::function<void(int64_t)>& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) body(i);
  };
  std::vector<std::thread> helpers;
  try {
    const int64_t count = std::min<int64_t>(num_threads_, num_tasks) - 1;
    for (int64_t i = 0; i < count; ++i) helpers.emplace_back(work);
  } catch (const std::exception&) {
    // Fewer helpers, or none: the caller takes every task that they do not.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace w4a16::cpu
