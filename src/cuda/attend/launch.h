// Decode attention: launchers by head size. Each head size is a translation unit (head_64.cu, ...), as its kernels take
// minutes to compile.
#pragma once

#include <cuda_runtime.h>

#include "cuda/attend/formats.h"
#include "cuda/host/device.h"
#include "cuda/host/status.h"
#include "cuda/types.h"

namespace thimble::cuda {

inline Card card_of(const DeviceInfo& device) {
  return {device.capability, device.shared_bytes};
}
inline bool has_large_tables(const DeviceInfo& device) {
  return has_large_tables(card_of(device));
}

/// Launch the kernel of a format, widths and batch that `args` tell. Defined for head sizes 64, 128 and 256.
template <int HeadDim>
Status launch_attend(const DeviceInfo& device, const AttendArgs& args, dim3 grid, cudaStream_t stream);
template <int HeadDim>
Status launch_score(const DeviceInfo& device, const ScoreArgs& args, dim3 grid, cudaStream_t stream);

/// The same for codes in the order for tiles (tiles.cu).
Status launch_attend_tiles(const DeviceInfo& device, const AttendArgs& args, dim3 grid, cudaStream_t stream);
Status launch_score_tiles(const DeviceInfo& device, const ScoreArgs& args, dim3 grid, cudaStream_t stream);

}  // namespace thimble::cuda
