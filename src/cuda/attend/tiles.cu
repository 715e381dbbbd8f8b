// Decode attention over tiles: the kernels of all head sizes.
#include "cuda/attend/launch.h"
#include "cuda/attend/shared.h"
#include "cuda/attend/tile_kernel.h"
#include "cuda/attend/tile_shape.h"
#include "cuda/formats.h"
#include "cuda/host/launch.h"

namespace thimble::cuda {
namespace {

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1) attend_tiles_kernel(const __grid_constant__ AttendArgs args) {
  TileKernel<S>::attend(args);
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1) score_tiles_kernel(const __grid_constant__ ScoreArgs args) {
  TileKernel<S>::score(args);
}

const Status kNoHeadSize = Status::unsupported("head size must be 64, 128 or 256");

/// Calls f<shape>() with the shape for a device: with codewords in shared memory if they fit.
template <typename F>
Status for_shape(const DeviceInfo& device, int head_dim, F f) {
  constexpr size_t kLeast = 64 << 10;  // that a device has
  return for_head_dim(
      head_dim,
      [&]<int HeadDim>() {
        if constexpr (shared_bytes<TileShape<HeadDim>>() > kLeast) {
          if (shared_bytes<TileShape<HeadDim>>() > device.shared_bytes) {
            return f.template operator()<TileShape<HeadDim, false>>();
          }
        }
        return f.template operator()<TileShape<HeadDim>>();
      },
      kNoHeadSize);
}

}  // namespace

Status launch_attend_tiles(const DeviceInfo& device, const AttendArgs& args, dim3 grid, cudaStream_t stream) {
  return for_shape(device, args.head_dim, [&]<typename S>() {
    return launch(device, attend_tiles_kernel<S>, args, grid, S::kThreads, shared_bytes<S>(), stream);
  });
}

Status launch_score_tiles(const DeviceInfo& device, const ScoreArgs& args, dim3 grid, cudaStream_t stream) {
  return for_shape(device, args.attend.head_dim, [&]<typename S>() {
    return launch(device, score_tiles_kernel<S>, args, grid, S::kThreads, shared_bytes<S>(), stream);
  });
}

}  // namespace thimble::cuda
