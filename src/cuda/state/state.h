// StateKernels on a CUDA device.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "cuda/host/device.h"
#include "cuda/state/cell_state.h"

namespace thimble::cuda {

/// On the current device, on a stream of its own. Throws std::runtime_error where the device fails, as do its
/// functions.
std::unique_ptr<StateKernels> state_kernels(const DeviceInfo& device);

}  // namespace thimble::cuda
