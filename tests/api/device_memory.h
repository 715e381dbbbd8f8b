// Memory and a stream of the device under test: a CUDA device's where THIMBLE_ON_DEVICE is defined, else the host's,
// where the kernels are emulated.
#pragma once

#include <cstring>
#include <stdexcept>
#include <vector>

#ifdef THIMBLE_ON_DEVICE
#include <cuda_runtime_api.h>
#else
#include <new>
#endif

namespace thimble::test {

#ifdef THIMBLE_ON_DEVICE
inline void require_ok(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  require_ok(cudaMalloc(&memory, bytes));
  return memory;
}
inline void release(void* memory) {
  (void)cudaFree(memory);
}
inline void copy(void* to, const void* from, size_t bytes) {
  require_ok(cudaDeviceSynchronize());
  require_ok(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
  require_ok(cudaDeviceSynchronize());
}
/// A stream that does not wait for the default one.
inline void* stream() {
  static cudaStream_t stream = [] {
    cudaStream_t made = nullptr;
    require_ok(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
    return made;
  }();
  return stream;
}
#else
inline void* allocate(size_t bytes) {
  return ::operator new (bytes, std::align_val_t{256});
}
inline void release(void* memory) {
  ::operator delete (memory, std::align_val_t{256});
}
inline void copy(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
}
inline void* stream() {
  static int stream;
  return &stream;
}
#endif

/// An array there. It waits for the device before it copies.
template <typename T>
class DeviceArray {
public:
  explicit DeviceArray(const std::vector<T>& values) : size_(values.size()), data_(allocate(bytes() + 1)) {
    copy(data_, values.data(), bytes());
  }
  ~DeviceArray() { release(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return static_cast<T*>(data_); }
  std::vector<T> host() const {
    std::vector<T> values(size_);
    copy(values.data(), data_, bytes());
    return values;
  }

private:
  size_t bytes() const { return size_ * sizeof(T); }

  size_t size_;
  void* data_;
};

}  // namespace thimble::test
