// Retrieval on the device: chooses the cells of greatest score and fetches their exact rows, from device memory or
// pinned host memory.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/attend/attend.h"
#include "cuda/host/device.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// Bytes of scratch memory for one call at a time; they need not be initialized.
size_t retrieval_bytes(const RetrieveArgs& args);
/// Lays the arrays of `args` out in such memory, which is aligned to 256 bytes.
void place_retrieval(void* memory, RetrieveArgs* args);

/// Enqueues one kernel that fills args.cells from the scores (score_cells, attend.h), and adds them to args.all_hidden.
Status choose_cells(const DeviceInfo& device, const RetrieveArgs& args, cudaStream_t stream);

/// Enqueues one kernel that reads the chosen cells' rows from the store, which the device must be able to address.
Status gather_cells(const DeviceInfo& device, const RetrieveArgs& args, cudaStream_t stream);

/// Enqueues one layer's decode step with retrieval, four kernels: it scores all cells, chooses the best, gathers their
/// rows and attends. `encode` comes before it and writes new rows to the store and the window. The workspace is of
/// attend_workspace_bytes for with_retrieved(...) (types.h); place_retrieval has placed the arrays of `retrieve_args`.
Status retrieve_step(const DeviceInfo& device, const AttendArgs& attend_args, const RetrieveArgs& retrieve_args,
                     bool drop_tail, void* workspace, size_t workspace_bytes, cudaStream_t stream);

}  // namespace thimble::cuda
