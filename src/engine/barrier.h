// A barrier for the threads of a team.
#pragma once

#include <atomic>

namespace thimble {

/// A waiting thread spins for a while and then sleeps: on a busy machine the thread that it waits for may not be
/// running.
class Barrier {
public:
  void wait(int n_threads) {
    if (n_threads == 1) return;
    const unsigned phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_threads) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      phase_.notify_all();
      return;
    }
    for (int spins = 0; spins < kSpins; spins++) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
    }
    phase_.wait(phase, std::memory_order_acquire);
  }

  /// Does not wait. True for the thread of the team that calls this last, after all the others did.
  bool is_last(int n_threads) {
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < n_threads) return false;
    arrived_.store(0, std::memory_order_relaxed);
    return true;
  }

private:
  static constexpr int kSpins = 1000000;  // about a millisecond; most phases of a task are shorter than waking a thread
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> phase_{0};
};

}  // namespace thimble
