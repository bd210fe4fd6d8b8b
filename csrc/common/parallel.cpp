#include "parallel.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace dgemma {
namespace {

struct Loop {
  int64_t count, grain;
  const std::function<void(int64_t, int64_t)>* body;
  std::atomic<int64_t> next{0};

  void work() {
    for (;;) {
      const int64_t first = next.fetch_add(grain, std::memory_order_relaxed);
      if (first >= count) return;
      (*body)(first, std::min(first + grain, count));
    }
  }
};

// Threads that wait for a loop. They live until the process ends, so the pool itself is never destroyed.
class Pool {
 public:
  void run(Loop& loop, int helpers) {
    std::lock_guard<std::mutex> one_loop(run_mutex_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (started_ < helpers) {
        std::thread(&Pool::wait_for_loops, this).detach();
        ++started_;
      }
      loop_ = &loop;
      wanted_ = helpers;
    }
    if (helpers == 1)
      wake_.notify_one();
    else
      wake_.notify_all();
    loop.work();
    // Nothing is left to hand out. Helpers that have not woken up by now never see the loop: on a busy machine
    // waiting for them can take longer than the loop itself.
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void wait_for_loops() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_;
      ++running_;
      Loop* loop = loop_;
      lock.unlock();
      loop->work();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex run_mutex_, mutex_;
  std::condition_variable wake_, done_;
  Loop* loop_ = nullptr;
  int started_ = 0, wanted_ = 0, running_ = 0;
};

// A forked child has none of its parent's threads, so it gets a pool of its own.
Pool& pool() {
  static std::mutex mutex;
  static Pool* instance = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(mutex);
  if (owner != getpid()) {
    instance = new Pool;
    owner = getpid();
  }
  return *instance;
}

// GNU's OpenMP waits for ever for the threads that a forked child does not have.
const pid_t loaded_by = getpid();

// The entry of the OpenMP runtime that PyTorch has loaded; nullptr without one, as in a process without PyTorch.
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
OpenMpParallel openmp_parallel() {
  static const auto entry = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return loaded_by == getpid() ? entry : nullptr;
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t pieces = (count + grain - 1) / grain;
  const int helpers = int(std::min<int64_t>(threads, pieces)) - 1;
  if (helpers <= 0) {
    body(0, count);
    return;
  }
  Loop loop{count, grain, &body};
  // PyTorch's threads go on spinning for milliseconds after each of its operators, and threads of our own would share
  // the cores with them. They take this loop at once.
  if (const auto parallel = openmp_parallel())
    parallel([](void* data) { static_cast<Loop*>(data)->work(); }, &loop, unsigned(helpers + 1), 0);
  else
    pool().run(loop, helpers);
}

}  // namespace dgemma
