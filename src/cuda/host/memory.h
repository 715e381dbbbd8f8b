// Owned memory: a device's, and pinned memory of the host.
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

#include "cuda/host/status.h"

namespace thimble::cuda {

/// Sets all bytes of memory that the device may use. It waits for the device first, and for the bytes to be set.
inline Status fill_memory(void* data, int byte, size_t size) {
  if (size == 0) return {};
  if (const cudaError_t e = cudaDeviceSynchronize(); e != cudaSuccess) return Status::from(e);
  if (const cudaError_t e = cudaMemset(data, byte, size); e != cudaSuccess) return Status::from(e);
  return Status::from(cudaStreamSynchronize(nullptr));
}

/// Memory that `Release` gives back.
template <cudaError_t (*Release)(void*)>
class OwnedMemory {
public:
  OwnedMemory() = default;
  OwnedMemory(OwnedMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  OwnedMemory& operator=(OwnedMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~OwnedMemory() {
    if (data_) (void)Release(data_);
  }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t size() const { return size_; }

protected:
  void* data_ = nullptr;
  size_t size_ = 0;
};

class DeviceMemory : public OwnedMemory<cudaFree> {
public:
  /// Makes the memory at least `size` bytes. If it must grow, this waits for the device; the contents are lost, all
  /// bytes are zero, and `moved` is set if given.
  Status reserve(size_t size, bool* moved = nullptr) {
    if (size <= size_) return {};
    if (data_) (void)cudaFree(std::exchange(data_, nullptr));  // waits for the device
    size_ = 0;
    if (const cudaError_t e = cudaMalloc(&data_, size); e != cudaSuccess) {
      data_ = nullptr;
      return Status::from(e);
    }
    size_ = size;
    if (moved) *moved = true;
    return fill(0);
  }
  /// Sets all bytes, as fill_memory does.
  Status fill(int byte) { return fill_memory(data_, byte, size_); }
};

/// Host memory that stays where it is, so that kernels read and write it over the bus, at the host's own addresses.
class PinnedMemory : public OwnedMemory<cudaFreeHost> {
public:
  /// Allocates zeroed memory. Call it once.
  Status allocate(size_t size) {
    if (data_) return Status::invalid("memory is there already");
    if (const cudaError_t e = cudaHostAlloc(&data_, size, cudaHostAllocMapped); e != cudaSuccess) {
      data_ = nullptr;
      (void)cudaGetLastError();
      return Status::from(e);
    }
    size_ = size;
    return clear();
  }
  /// Sets all bytes to zero, as fill_memory does. The device writes them, faster than a thread of the host.
  Status clear() { return fill_memory(data_, 0, size_); }
};

}  // namespace thimble::cuda
