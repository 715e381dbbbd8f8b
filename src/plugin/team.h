// What the threads of one ggml custom op need to work as a team.
#pragma once

#include <atomic>
#include <thread>

namespace thimble {

/// Spins, then yields: there may be more threads than cores.
class Barrier {
public:
  void wait(int n_threads) {
    if (n_threads == 1) return;
    const unsigned phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_threads) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++) {
      if (spins > 2000) std::this_thread::yield();
    }
  }

private:
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> phase_{0};
};

}  // namespace thimble
