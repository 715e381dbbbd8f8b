// Decode attention over codes: 1 to 8 query tokens a stream, any number of streams.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// Device memory for one attend call at a time (on one stream), aligned to 256 bytes. It must be zeroed before its
/// first use; then calls of any shape may share the largest.
size_t attend_workspace_bytes(const DeviceInfo& device, const AttendArgs& args);

/// Enqueues one kernel on `stream`, which waits for what is before it there. Row groups, splits, partials and counters
/// of `args` are filled in here.
Status attend(const DeviceInfo& device, AttendArgs args, void* workspace, size_t workspace_bytes, cudaStream_t stream);

/// The greatest score of each cell over a KV head's query rows, in units of log2 e, to scores [n_streams][n_kv_heads]
/// [args.n_cells]; -infinity for masked and hidden cells. At most 4 query rows a KV head. Values, exact rows, sinks and
/// output of `args` are not looked at.
Status score_cells(const DeviceInfo& device, AttendArgs args, float* scores, cudaStream_t stream);

}  // namespace thimble::cuda
