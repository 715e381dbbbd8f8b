#include "cuda/attend/dispatch.h"

namespace thimble::cuda {

Status launch_attend_256(const DeviceInfo& device, const AttendArgs& args, dim3 grid, cudaStream_t stream) {
  return launch_attend_any<256>(device, args, grid, stream);
}

Status launch_score_256(const DeviceInfo& device, const ScoreArgs& args, dim3 grid, cudaStream_t stream) {
  return launch_score_any<256>(device, args, grid, stream);
}

}  // namespace thimble::cuda
