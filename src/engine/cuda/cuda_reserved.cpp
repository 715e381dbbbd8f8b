#include "engine/cuda/cuda_reserved.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>

namespace thimble {
namespace {

// A function of libcuda, which the plugin is not linked to: machines without a GPU have none.
template <typename F>
void find(const char* name, F** function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 11000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess || !found) {
    throw std::runtime_error(std::string("the CUDA driver has no ") + name + ": use a newer one");
  }
  *function = reinterpret_cast<F*>(found);
}

struct Driver {
  decltype(cuDeviceGetAttribute)* get_attribute;
  decltype(cuMemGetAllocationGranularity)* granularity;
  decltype(cuMemAddressReserve)* reserve;
  decltype(cuMemAddressFree)* free;
  decltype(cuMemCreate)* create;
  decltype(cuMemRelease)* release;
  decltype(cuMemMap)* map;
  decltype(cuMemUnmap)* unmap;
  decltype(cuMemSetAccess)* set_access;

  Driver() {
    find("cuDeviceGetAttribute", &get_attribute);
    find("cuMemGetAllocationGranularity", &granularity);
    find("cuMemAddressReserve", &reserve);
    find("cuMemAddressFree", &free);
    find("cuMemCreate", &create);
    find("cuMemRelease", &release);
    find("cuMemMap", &map);
    find("cuMemUnmap", &unmap);
    find("cuMemSetAccess", &set_access);
  }
};

const Driver& driver() {
  static const Driver all;
  return all;
}

void require(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  throw std::runtime_error(std::string(what) + " of a CUDA device: " +
                           (result == CUDA_ERROR_OUT_OF_MEMORY
                                ? "there is not enough; use a smaller context or fewer layers"
                                : "the driver's error " + std::to_string(int(result))));
}

class CudaReserved : public ReservedMemory {
public:
  CudaReserved(int device, size_t size) : device_(device) {
    kind_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    kind_.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
    require(driver().granularity(&piece_, &kind_, CU_MEM_ALLOC_GRANULARITY_MINIMUM), "memory");
    size_ = (size + piece_ - 1) / piece_ * piece_;
    require(driver().reserve(&base_, size_, 0, 0, 0), "addresses");
    // Devices that reach one another's memory copy directly.
    int n_devices = 0;
    cudaGetDeviceCount(&n_devices);
    for (int i = 0; i < n_devices; i++) {
      int reaches = i == device;
      if (!reaches) cudaDeviceCanAccessPeer(&reaches, i, device);
      CUmemAccessDesc access{};
      access.location = {CU_MEM_LOCATION_TYPE_DEVICE, i};
      access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
      if (reaches) access_.push_back(access);
    }
  }
  CudaReserved(const CudaReserved&) = delete;
  CudaReserved& operator=(const CudaReserved&) = delete;

  ~CudaReserved() override {
    cudaSetDevice(device_);
    cudaDeviceSynchronize();
    for (const auto& [at, size] : backed_) driver().unmap(base_ + at, size);
    driver().free(base_, size_);
  }

  char* base() const override { return reinterpret_cast<char*>(base_); }

  std::vector<Range> back(const void* data, size_t size) override {
    std::vector<Range> made;
    if (size == 0) return made;
    const size_t first = static_cast<const char*>(data) - base();
    const size_t end = std::min(size_, (first + size + piece_ - 1) / piece_ * piece_);
    for (size_t at = first / piece_ * piece_; at < end;) {
      auto next = backed_.upper_bound(at);
      if (next != backed_.begin()) {
        const auto& [start, length] = *std::prev(next);
        if (at < start + length) {
          at = start + length;
          continue;
        }
      }
      const size_t stop = next == backed_.end() ? end : std::min(end, next->first);
      make(at, stop - at);
      made.push_back({base() + at, stop - at});
      at = stop;
    }
    return made;
  }

  std::vector<Range> backed() const override {
    std::vector<Range> all;
    for (const auto& [at, size] : backed_) all.push_back({base() + at, size});
    return all;
  }

private:
  void make(size_t at, size_t size) {
    CUmemGenericAllocationHandle memory{};
    require(driver().create(&memory, size, &kind_, 0), "memory");
    const CUresult mapped = driver().map(base_ + at, size, 0, memory, 0);
    driver().release(memory);  // it is freed when it is unmapped
    require(mapped, "memory");
    if (const CUresult result = driver().set_access(base_ + at, size, access_.data(), access_.size());
        result != CUDA_SUCCESS) {
      driver().unmap(base_ + at, size);
      require(result, "memory");
    }
    backed_[at] = size;
  }

  int device_;
  CUmemAllocationProp kind_{};
  std::vector<CUmemAccessDesc> access_;
  CUdeviceptr base_ = 0;
  size_t size_ = 0, piece_ = 0;
  std::map<size_t, size_t> backed_;  // where a range that was made at once begins, and its size
};

}  // namespace

std::unique_ptr<ReservedMemory> reserve_cuda_memory(int device, size_t size) {
  int can = 0;
  require(driver().get_attribute(&can, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device), "properties");
  return can ? std::make_unique<CudaReserved>(device, size) : nullptr;
}

}  // namespace thimble
