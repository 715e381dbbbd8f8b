// Picks the attention kernel of a format. One translation unit a head size (attend_64.cu, ...), for they take time to
// compile.
#pragma once

#include <cuda_runtime.h>

#include "cuda/attend/attend.h"

namespace thimble::cuda {

/// Whether a device takes the kernels that use all of Hopper's shared memory.
inline bool has_large_tables(const DeviceInfo& device) {
  return device.capability >= 90 && device.shared_bytes >= 227 * 1024;
}

Status launch_attend_64(const DeviceInfo& device, const AttendArgs& args, dim3 grid, cudaStream_t stream);
Status launch_attend_128(const DeviceInfo& device, const AttendArgs& args, dim3 grid, cudaStream_t stream);
Status launch_attend_256(const DeviceInfo& device, const AttendArgs& args, dim3 grid, cudaStream_t stream);
Status launch_score_64(const DeviceInfo& device, const ScoreArgs& args, dim3 grid, cudaStream_t stream);
Status launch_score_128(const DeviceInfo& device, const ScoreArgs& args, dim3 grid, cudaStream_t stream);
Status launch_score_256(const DeviceInfo& device, const ScoreArgs& args, dim3 grid, cudaStream_t stream);

}  // namespace thimble::cuda
