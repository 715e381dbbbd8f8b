// Decode attention over codes: 1 to 8 query tokens a stream, any number of streams.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/status.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// What the launchers need to know of a device, asked once.
struct DeviceInfo {
  int ordinal = 0;
  int multiprocessors = 0;
  size_t shared_bytes = 0;  // that a block may have
  int capability = 0;       // 80, 86, 89, 90
};
Status query_device(int ordinal, DeviceInfo* info);

/// Device memory for one attend call at a time (on one stream). It must be zeroed before its first use.
size_t attend_workspace_bytes(const DeviceInfo& device, const AttendArgs& args);

/// Enqueues one kernel on `stream`. `args.queries` and `args.query_factors` must be on the device, transformed
/// (prepare.h); the kernel waits for what is before it in the stream. Row groups, splits, partials and counters of
/// `args` are filled in here.
Status attend(const DeviceInfo& device, AttendArgs args, void* workspace, size_t workspace_bytes, cudaStream_t stream);

}  // namespace thimble::cuda
