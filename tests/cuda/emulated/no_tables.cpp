// The emulated device attends to tiles alone: it has too little shared memory for the kernels with tables, which take
// minutes to compile.
#include "cuda/attend/launch.h"

namespace thimble::cuda {

template <int HeadDim>
Status launch_attend(const DeviceInfo&, const AttendArgs&, dim3, cudaStream_t) {
  return Status::unsupported("the emulated device has no kernels with tables");
}
template <int HeadDim>
Status launch_score(const DeviceInfo&, const ScoreArgs&, dim3, cudaStream_t) {
  return Status::unsupported("the emulated device has no kernels with tables");
}

template Status launch_attend<64>(const DeviceInfo&, const AttendArgs&, dim3, cudaStream_t);
template Status launch_attend<128>(const DeviceInfo&, const AttendArgs&, dim3, cudaStream_t);
template Status launch_attend<256>(const DeviceInfo&, const AttendArgs&, dim3, cudaStream_t);
template Status launch_score<64>(const DeviceInfo&, const ScoreArgs&, dim3, cudaStream_t);
template Status launch_score<128>(const DeviceInfo&, const ScoreArgs&, dim3, cudaStream_t);
template Status launch_score<256>(const DeviceInfo&, const ScoreArgs&, dim3, cudaStream_t);

}  // namespace thimble::cuda
