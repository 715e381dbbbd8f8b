// Memory of a device, and the kernels of the emulated tests' scripts on it. CUDA's errors end the program.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "cuda/encode/encode.h"
#include "cuda/host/device.h"
#include "cuda/host/tables.h"

namespace thimble::cuda {

inline void require(cudaError_t e) {
  if (e == cudaSuccess) return;
  std::printf("CUDA: %s\n", cudaGetErrorString(e));
  std::exit(1);
}

/// An array that is on the host and on the device; pinned ones are the host's, and the device reads them there.
template <typename T>
class Array {
public:
  explicit Array(size_t n, T value = {}) : host(n, value) {
    require(cudaMalloc(&device_, std::max<size_t>(n, 1) * sizeof(T)));
  }
  explicit Array(std::vector<T> values) : Array(values.size()) {
    host = std::move(values);
    upload();
  }
  Array(const Array&) = delete;
  ~Array() { (void)cudaFree(device_); }
  T* upload() {
    require(cudaMemcpy(device_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    return device_;
  }
  std::vector<T>& download() {
    require(cudaMemcpy(host.data(), device_, host.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }
  T* device() { return device_; }
  std::vector<T> host;

private:
  T* device_ = nullptr;
};

/// Memory that the host and the device both use, in the host.
template <typename T>
struct Mapped {
  using value_type = T;
  Mapped() = default;
  template <typename U>
  Mapped(const Mapped<U>&) {}
  T* allocate(size_t n) {
    void* p = nullptr;
    require(cudaHostAlloc(&p, n * sizeof(T), cudaHostAllocMapped));
    return static_cast<T*>(p);
  }
  void deallocate(T* p, size_t) { (void)cudaFreeHost(p); }
  bool operator==(const Mapped&) const { return true; }
};

/// What runs the windows' scripts on the device.
struct OnDevice {
  template <typename T>
  using Vector = std::vector<T, Mapped<T>>;
  /// Codecs in device memory.
  struct Tables {
    std::unique_ptr<DeviceTables> tables;
    const CodecTables& view() const { return tables->view(); }
  };
  static Tables tables_of(const HostTables& host) {
    Tables t{std::make_unique<DeviceTables>()};
    done(t.tables->upload(host));
    return t;
  }
  static inline DeviceInfo device;
  static void done(const Status& status) { require(status.ok() ? cudaDeviceSynchronize() : cudaErrorInvalidValue); }
  static void update_window(const WindowArgs& a) { done(cuda::update_window(device, a, nullptr)); }
  static void judge_cells(const JudgeArgs& a) { done(cuda::judge_cells(device, a, nullptr)); }
  template <int HeadDim>
  static void prepare_prompt(const PromptArgs& a) {
    done(cuda::prepare_prompt(device, a, nullptr));
  }
};

}  // namespace thimble::cuda
