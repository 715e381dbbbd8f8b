// Where the work of a task on a cache is done: by a team of threads of the host, or on the queue of a device.
//
// An engine that computes on the host gets a Team: every thread of it calls the same function of the cache with the
// same task. An engine with a device of its own makes a Queue: one thread calls, what it calls for is done later, in
// order.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "engine/barrier.h"

namespace thimble {

/// The first failure of a graph. What follows it is not worth running.
class Failure {
public:
  explicit operator bool() const { return failed_.load(std::memory_order_acquire); }
  void set(const std::string& why);
  /// The sentence; after all threads have ended.
  const std::string& why() const { return why_; }
  void clear();

private:
  std::atomic<bool> failed_ = false;
  std::mutex mutex_;
  std::string why_;
};

/// The threads that run one task together, as one of them sees it.
class Team {
public:
  /// What they share, for as long as the task runs.
  struct Shared {
    Barrier barrier;
    bool stopped = false;
    Failure* failure = nullptr;  // of the graph that the task belongs to
  };

  Team(Shared& shared, int thread, int n_threads) : shared_(&shared), thread_(thread), n_threads_(n_threads) {}

  int thread() const { return thread_; }
  int size() const { return n_threads_; }

  /// Runs `f` on the first thread while the others wait for its end. False, on all threads, where it threw or the graph
  /// has failed before: then all return.
  template <typename F>
  bool lead(F f) const {
    if (thread_ == 0) shared_->stopped = !attempt(f);
    wait();
    return !shared_->stopped;
  }
  /// Runs all of a task on the first thread, which the others do not wait for.
  template <typename F>
  void leave_to_first(F f) const {
    if (thread_ == 0) attempt(f);
  }
  /// Waits for all threads.
  void wait() const { shared_->barrier.wait(n_threads_); }
  /// Waits for none: true for the last thread to come here, after all the others did.
  bool is_last() const { return shared_->barrier.is_last(n_threads_); }

private:
  template <typename F>
  bool attempt(F f) const {
    if (*shared_->failure) return false;
    try {
      f();
      return true;
    } catch (const std::exception& error) {
      shared_->failure->set(error.what());
      return false;
    }
  }

  Shared* shared_;
  int thread_, n_threads_;
};

/// What a device does in order, beside the host. Its functions throw std::runtime_error where the device fails.
class Queue {
public:
  /// Work that was recorded once and can be done again.
  class Recording {
  public:
    virtual ~Recording() = default;
    virtual void replay() = 0;
  };

  virtual ~Queue() = default;

  /// Makes the device the calling thread's.
  virtual void make_current() = 0;
  /// Waits for all that was called for.
  virtual void synchronize() = 0;

  // The order between this queue and the one of the program around it, by two events of the device, so that the host
  // waits for neither.
  /// An event that the other side records.
  virtual void* theirs() = 0;
  /// What is called for from now on is done after `theirs`.
  virtual void await_theirs() = 0;
  /// Records an event, which the other side awaits.
  virtual void* record_ours() = 0;

  /// What is called for from now on is recorded instead of done, on this queue and on those that await an event of it.
  virtual void begin_recording() = 0;
  /// Null, with a sentence, where that could not be recorded.
  virtual std::unique_ptr<Recording> end_recording(std::string* why) = 0;
  /// Grows when memory that recordings may use was moved: they are void then.
  virtual uint64_t memory_version() const = 0;
};

/// One of the two.
struct Lane {
  Team* team = nullptr;
  Queue* queue = nullptr;
};

}  // namespace thimble
