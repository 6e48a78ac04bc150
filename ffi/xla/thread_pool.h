// Runs the library's CPU tasks on XLA's thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "../w4a16.h"
#include "xla/ffi/api/ffi.h"

namespace w4a16::xla {

// The caller works too and waits only for tasks that another thread has begun, never for one still
// in the pool's queue: a handler that itself runs on the pool cannot deadlock it. A helper that
// starts after the loop has ended finds no task left and touches nothing but the shared state.
class PoolExecutor {
 public:
  explicit PoolExecutor(::xla::ffi::ThreadPool pool) : pool_(pool) {}

  w4a16_executor callbacks() {
    return {this, static_cast<int>(std::clamp<int64_t>(pool_.num_threads(), 1, 1024)), &Run};
  }

 private:
  struct Loop {
    int64_t num_tasks;
    void (*task)(void*, int64_t);
    void* arg;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all_done;
    int64_t done = 0;

    void Work() {
      int64_t finished = 0;
      for (int64_t i; (i = next.fetch_add(1)) < num_tasks; ++finished) task(arg, i);
      if (finished == 0) return;
      std::lock_guard lock(mutex);
      done += finished;
      if (done == num_tasks) all_done.notify_all();
    }
  };

  static void Run(void* context, int64_t num_tasks, void (*task)(void*, int64_t), void* arg) {
    auto& self = *static_cast<PoolExecutor*>(context);
    auto loop = std::make_shared<Loop>();
    loop->num_tasks = num_tasks;
    loop->task = task;
    loop->arg = arg;
    const int64_t helpers = std::min(num_tasks, self.pool_.num_threads()) - 1;
    for (int64_t i = 0; i < helpers; ++i) self.pool_.Schedule([loop] { loop->Work(); });
    loop->Work();
    std::unique_lock lock(loop->mutex);
    loop->all_done.wait(lock, [&] { return loop->done == num_tasks; });
  }

  ::xla::ffi::ThreadPool pool_;
};

}  // namespace w4a16::xla
