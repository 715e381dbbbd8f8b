// What coded cells' scores lack, for dense attention over decoded rows (bias_kernel.h).
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/host/device.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// Enqueues kernels that put score_bias into dense rows and transformed queries. To be called when all rows are
/// written, those of the window and of the batch included. The keys' codec must have `error`.
Status add_bias(const DeviceInfo& device, const BiasArgs& args, cudaStream_t stream);

}  // namespace thimble::cuda
