#include "api/team.h"

namespace thimble::api {
namespace {

// Attention over a short context takes about as long as it takes to wake a thread, so threads poll for a while before
// they sleep.
constexpr int kLooks = 4000;

template <typename T>
void wait_while(const std::atomic<T>& value, T old) {
  for (int i = 0; i < kLooks; i++) {
    if (value.load(std::memory_order_acquire) != old) return;
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

Team::Team(int n_threads) {
  try {
    for (int i = 1; i < n_threads; i++) threads_.emplace_back([this, i] { serve(i); });
  } catch (...) {
    end();
    throw;
  }
}

Team::~Team() {
  end();
}

void Team::end() {
  ends_ = true;
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Team::serve(int thread) {
  for (unsigned seen = 0;;) {
    wait_while(round_, seen);
    seen = round_.load(std::memory_order_acquire);
    if (ends_) return;
    work(thread);
    if (n_left_.fetch_sub(1, std::memory_order_acq_rel) == 1) n_left_.notify_one();
  }
}

void Team::work(int thread) noexcept {
  try {
    (*work_)(thread);
  } catch (...) {
    if (!failed_.exchange(true)) error_ = std::current_exception();
  }
}

void Team::run(const std::function<void(int)>& work) {
  work_ = &work;
  failed_ = false;
  error_ = nullptr;
  n_left_.store(int(threads_.size()), std::memory_order_relaxed);
  if (!threads_.empty()) {
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
  }
  this->work(0);
  for (int left; (left = n_left_.load(std::memory_order_acquire)) > 0;) wait_while(n_left_, left);
  if (failed_) std::rethrow_exception(error_);
}

}  // namespace thimble::api
