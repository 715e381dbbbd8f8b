// The threads of a context. They wait between calls; each call runs on all of them and on the caller's thread.
#pragma once

#include <atomic>
#include <exception>
#include <functional>
#include <thread>
#include <vector>

namespace thimble::api {

class Team {
public:
  /// `n_threads` counts the caller's. Throws std::system_error where the system starts no more threads.
  explicit Team(int n_threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return int(threads_.size()) + 1; }
  /// Calls work(0) to work(size() - 1), one on each thread, and returns when all have ended. Throws the first exception
  /// that one of them threw.
  void run(const std::function<void(int)>& work);

private:
  void serve(int thread);
  void work(int thread) noexcept;
  void end();

  std::vector<std::thread> threads_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<unsigned> round_{0};
  std::atomic<int> n_left_{0};
  std::atomic<bool> ends_{false};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // the first that a thread threw
};

}  // namespace thimble::api
