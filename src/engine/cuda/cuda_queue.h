// A CUDA stream of our own. It and the inner backend's stream are ordered by events.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/host/device.h"
#include "cuda/host/memory.h"
#include "engine/lane.h"

namespace thimble {

/// Throws std::runtime_error with `what` and the reason where a status is not ok.
void require(const cuda::Status& status, const char* what);
void require(cudaError_t error, const char* what);

class CudaQueue final : public Queue {
public:
  explicit CudaQueue(const cuda::DeviceInfo& device);
  ~CudaQueue() override;

  int architecture() const override { return 10 * device_.capability; }
  void make_current() override;
  void synchronize() override;
  void* theirs() override { return theirs_; }
  void await_theirs() override;
  void* record_ours() override;
  void begin_recording() override;
  std::unique_ptr<Recording> end_recording(std::string* why) override;
  uint64_t memory_version() const override { return memory_version_; }

  cudaStream_t stream() const { return stream_; }
  /// Room for n values. While a recording is made it must be there.
  template <typename T>
  T* room(cuda::DeviceMemory& memory, size_t n) {
    reserve(memory, n * sizeof(T));
    return memory.as<T>();
  }

  // What the tasks of this queue work in.
  cuda::DeviceMemory workspace, queries, dense, retrieval, judge, exact;

private:
  void reserve(cuda::DeviceMemory& memory, size_t bytes);

  cuda::DeviceInfo device_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t ours_ = nullptr, theirs_ = nullptr;
  bool is_recording_ = false;
  uint64_t memory_version_ = 0;
};

inline CudaQueue& queue_of(const Lane& lane) {
  return static_cast<CudaQueue&>(*lane.queue);
}

}  // namespace thimble
