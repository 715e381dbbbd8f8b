// A build without CUDA.
#include "api/cuda/ops.h"
#include "api/status.h"

namespace thimble::api {

std::unique_ptr<CudaOps> make_cuda_ops(int) {
  throw Failure(THIMBLE_UNSUPPORTED,
                "this build of the library has no CUDA: use THIMBLE_DEVICE_CPU, or a build with -DTHIMBLE_CUDA=ON");
}

}  // namespace thimble::api
