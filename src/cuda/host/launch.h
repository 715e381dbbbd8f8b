// Launches kernels, with their shared memory and launch attributes.
#pragma once

#include <cuda_runtime.h>

#include "cuda/host/device.h"

namespace thimble::cuda {

/// Launches a kernel that takes one argument structure. From sm_90 on it may start while the kernel before it in the
/// stream still runs; every kernel here waits for that one before it reads or writes what that one may have written.
template <typename Args>
Status launch(const DeviceInfo& device, void (*kernel)(Args), const Args& args, dim3 grid, int threads,
              size_t shared_bytes, cudaStream_t stream) {
  if (shared_bytes > device.shared_bytes) {
    return Status::unsupported("this format needs more shared memory than the device has");
  }
  if (shared_bytes > (48 << 10)) {
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (e != cudaSuccess) return Status::from(e);
  }
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = device.capability >= 90 ? 1 : 0;
  return Status::from(cudaLaunchKernelEx(&config, kernel, args));
}

}  // namespace thimble::cuda
