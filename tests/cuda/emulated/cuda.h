// The part of CUDA's driver that Thimble uses, on the host (cuda_runtime_api.h): addresses that get memory piece by
// piece. What has none cannot be touched, as on a device.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cuda_runtime_api.h"

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_OUT_OF_MEMORY = 2 };
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUmemGenericAllocationHandle = unsigned long long;
enum CUdevice_attribute { CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED };
enum CUmemAllocationType { CU_MEM_ALLOCATION_TYPE_PINNED = 1 };
enum CUmemLocationType { CU_MEM_LOCATION_TYPE_DEVICE = 1 };
enum CUmemAccess_flags { CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3 };
enum CUmemAllocationGranularity_flags { CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0 };
struct CUmemLocation {
  CUmemLocationType type;
  int id;
};
struct CUmemAllocationProp {
  CUmemAllocationType type;
  CUmemLocation location;
};
struct CUmemAccessDesc {
  CUmemLocation location;
  CUmemAccess_flags flags;
};

inline void* cu_host_pointer(CUdeviceptr at) {
  return reinterpret_cast<void*>(uintptr_t(at));
}
inline CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute, CUdevice) {
  *value = 1;
  return CUDA_SUCCESS;
}
inline CUresult cuMemGetAllocationGranularity(size_t* granularity, const CUmemAllocationProp*,
                                              CUmemAllocationGranularity_flags) {
  *granularity = size_t(64) << 10;
  return CUDA_SUCCESS;
}
inline CUresult cuMemAddressReserve(CUdeviceptr* base, size_t size, size_t, CUdeviceptr, unsigned long long) {
  void* at = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  *base = CUdeviceptr(reinterpret_cast<uintptr_t>(at));
  return at == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}
inline CUresult cuMemAddressFree(CUdeviceptr base, size_t size) {
  munmap(cu_host_pointer(base), size);
  return CUDA_SUCCESS;
}
inline CUresult cuMemCreate(CUmemGenericAllocationHandle* memory, size_t size, const CUmemAllocationProp*,
                            unsigned long long) {
  *memory = size;
  return CUDA_SUCCESS;
}
inline CUresult cuMemRelease(CUmemGenericAllocationHandle) {
  return CUDA_SUCCESS;
}
inline CUresult cuMemMap(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long) {
  return CUDA_SUCCESS;
}
inline CUresult cuMemSetAccess(CUdeviceptr at, size_t size, const CUmemAccessDesc*, size_t) {
  return mprotect(cu_host_pointer(at), size, PROT_READ | PROT_WRITE) == 0 ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
inline CUresult cuMemUnmap(CUdeviceptr at, size_t size) {
  madvise(cu_host_pointer(at), size, MADV_DONTNEED);
  mprotect(cu_host_pointer(at), size, PROT_NONE);
  return CUDA_SUCCESS;
}

// What cudaGetDriverEntryPoint finds.
inline void* cu_entry_point(const char* name) {
  struct Entry {
    const char* name;
    void* function;
  };
#define THIMBLE_ENTRY(f) \
  { #f, reinterpret_cast < void*>(&f) }
  static const Entry entries[] = {THIMBLE_ENTRY(cuDeviceGetAttribute),
                                  THIMBLE_ENTRY(cuMemGetAllocationGranularity),
                                  THIMBLE_ENTRY(cuMemAddressReserve),
                                  THIMBLE_ENTRY(cuMemAddressFree),
                                  THIMBLE_ENTRY(cuMemCreate),
                                  THIMBLE_ENTRY(cuMemRelease),
                                  THIMBLE_ENTRY(cuMemMap),
                                  THIMBLE_ENTRY(cuMemUnmap),
                                  THIMBLE_ENTRY(cuMemSetAccess)};
#undef THIMBLE_ENTRY
  for (const Entry& entry : entries) {
    if (std::strcmp(entry.name, name) == 0) return entry.function;
  }
  return nullptr;
}

// ---- what the runtime has for the driver

#define CUDART_VERSION 13000
inline cudaError_t cudaGetDeviceCount(int* n) {
  *n = 1;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
constexpr unsigned long long cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  *function = cu_entry_point(name);
  *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
