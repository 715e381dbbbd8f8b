// Where a task on a cache runs: on a team of threads of the host, or on the queue of a device.
//
// An engine that computes on the host gets a Team: every thread of it calls the same function of the cache with the
// same task. An engine with a device of its own makes a Queue: one thread calls, and the device runs the work later, in
// the order of the calls.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "engine/barrier.h"

namespace thimble {

/// The first failure of a graph. Tasks behind it are not run.
class Failure {
public:
  explicit operator bool() const { return failed_.load(std::memory_order_acquire); }
  void set(const std::string& why);
  /// The sentence. To be read when all threads have ended.
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
  /// The threads' common state, which lives as long as the task runs.
  struct Shared {
    Barrier barrier;
    bool stopped = false;
    Failure* failure = nullptr;  // of the graph that the task belongs to
  };

  Team(Shared& shared, int thread, int n_threads) : shared_(&shared), thread_(thread), n_threads_(n_threads) {}

  int thread() const { return thread_; }
  int size() const { return n_threads_; }

  /// Runs `f` on the first thread while the others wait for its end. Returns false on all threads where `f` threw or
  /// the graph has failed before; the caller should then return.
  template <typename F>
  bool lead(F f) const {
    if (thread_ == 0) shared_->stopped = !attempt(f);
    wait();
    return !shared_->stopped;
  }
  /// Runs `f` on the first thread; the others do not wait for it.
  template <typename F>
  void leave_to_first(F f) const {
    if (thread_ == 0) attempt(f);
  }
  /// Waits for all threads.
  void wait() const { shared_->barrier.wait(n_threads_); }
  /// Does not wait. True for the thread that calls this last, after all the others did.
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

/// Work that a device does in order, beside the host. The functions throw std::runtime_error where the device fails.
class Queue {
public:
  /// Work that was recorded once and can be done again.
  class Recording {
  public:
    virtual ~Recording() = default;
    virtual void replay() = 0;
  };

  virtual ~Queue() = default;

  /// The device's architecture as CUDA numbers them (900 is 9.0), or 0.
  virtual int architecture() const { return 0; }
  /// Makes the device the calling thread's.
  virtual void make_current() = 0;
  /// Waits until all work of the queue is done.
  virtual void synchronize() = 0;

  // Two events of the device order this queue and the queue of the host program, so that no thread has to wait.
  /// The event that the host program records on its queue.
  virtual void* theirs() = 0;
  /// Makes later work of this queue wait for `theirs`.
  virtual void await_theirs() = 0;
  /// Records an event on this queue, which the host program's queue is to wait for.
  virtual void* record_ours() = 0;

  /// From now on, work of this queue, and of queues that wait for an event of it, is recorded and not done.
  virtual void begin_recording() = 0;
  /// Ends the recording. Null, with a sentence in *why, where the work could not be recorded.
  virtual std::unique_ptr<Recording> end_recording(std::string* why) = 0;
  /// Grows when memory that recordings may use was moved; earlier recordings must not be replayed then.
  virtual uint64_t memory_version() const = 0;
};

/// Either a team or a queue; the other is null.
struct Lane {
  Team* team = nullptr;
  Queue* queue = nullptr;
};

}  // namespace thimble
