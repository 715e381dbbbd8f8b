#include "cuda/attend/dispatch.h"

namespace thimble::cuda {

Status launch_attend_128(const DeviceInfo& device, const AttendArgs& args, dim3 grid, cudaStream_t stream) {
  return launch_attend_any<128>(device, args, grid, stream);
}

Status launch_score_128(const DeviceInfo& device, const ScoreArgs& args, dim3 grid, cudaStream_t stream) {
  return launch_score_any<128>(device, args, grid, stream);
}

}  // namespace thimble::cuda
