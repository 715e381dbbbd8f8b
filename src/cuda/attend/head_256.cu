#include "cuda/attend/dispatch.h"

namespace thimble::cuda {

template Status launch_attend<256>(const DeviceInfo&, const AttendArgs&, dim3, cudaStream_t);
template Status launch_score<256>(const DeviceInfo&, const ScoreArgs&, dim3, cudaStream_t);

}  // namespace thimble::cuda
