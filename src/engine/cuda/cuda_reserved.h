// Addresses of a CUDA device that get physical memory piece by piece (the driver's virtual memory management).
#pragma once

#include <memory>

#include "engine/reserved_memory.h"

namespace thimble {

/// Null where the device has no virtual memory management. Throws std::runtime_error where the driver fails.
std::unique_ptr<ReservedMemory> reserve_cuda_memory(int device, size_t size);

}  // namespace thimble
