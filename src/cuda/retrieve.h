// Retrieval on the device: the cells of greatest score, and their exact rows, from pinned host memory if need be.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// Enqueues one kernel that fills args.cells and args.all_hidden from args.scores (score_cells, attend.h).
Status choose_cells(const DeviceInfo& device, const RetrieveArgs& args, cudaStream_t stream);

/// Enqueues one kernel that reads the chosen cells' rows from the store, which the device must be able to address.
Status gather_cells(const DeviceInfo& device, const RetrieveArgs& args, cudaStream_t stream);

}  // namespace thimble::cuda
