// The threads of a context: they wait between calls, and each call is done by all of them and the caller's.
#pragma once

#include <atomic>
#include <exception>
#include <functional>
#include <thread>
#include <vector>

namespace thimble::api {

class Team {
public:
  /// `n_threads` with the caller's. Throws std::system_error where the system has no more.
  explicit Team(int n_threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return int(threads_.size()) + 1; }
  /// Calls work(0) to work(size() - 1), one a thread, and returns when all are done. An exception of one of them is
  /// thrown here.
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
  std::exception_ptr error_;  // of the first that failed
};

}  // namespace thimble::api
