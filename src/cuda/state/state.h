// StateKernels on a CUDA device, and those of its kernels that others use.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "cuda/host/device.h"
#include "cuda/state/cell_state.h"

namespace thimble::cuda {

/// On the current device, on a stream of its own. Throws std::runtime_error where the device fails, as do its
/// functions.
std::unique_ptr<StateKernels> state_kernels(const DeviceInfo& device);

/// Enqueues one kernel that reads rows to args.halves or args.floats.
Status read_rows(const DeviceInfo& device, const CellArgs& args, cudaStream_t stream);

/// Enqueues one kernel that widens args.halves to args.floats.
Status widen(const DeviceInfo& device, const CellArgs& args, cudaStream_t stream);

}  // namespace thimble::cuda
