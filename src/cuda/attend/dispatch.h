// The attention kernels of one head size. Included by attend_<head size>.cu alone.
#pragma once

#include "cuda/attend/formats.h"
#include "cuda/attend/kernel.h"
#include "cuda/attend/launch.h"
#include "cuda/attend/score_kernel.h"
#include "cuda/host/launch.h"

namespace thimble::cuda {

template <typename S, bool Large>
__global__ void __launch_bounds__(S::kThreads, 1) attend_kernel(const __grid_constant__ AttendArgs args) {
#if __CUDA_ARCH__ >= 900
  AttendKernel<S>::run(args);
#else
  if constexpr (!Large) AttendKernel<S>::run(args);  // the others do not fit these devices
#endif
}

template <typename S, bool Large>
__global__ void __launch_bounds__(S::kThreads, 1) score_kernel(const __grid_constant__ ScoreArgs args) {
#if __CUDA_ARCH__ >= 900
  ScoreKernel<S>::run(args);
#else
  if constexpr (!Large) ScoreKernel<S>::run(args);
#endif
}

template <int HeadDim, int KeyWidth, int ValueWidth>
Status launch_attend(const DeviceInfo& device, const AttendArgs& args, dim3 grid, cudaStream_t stream) {
  using Large = AttendShape<HeadDim, KeyWidth, ValueWidth, true>;
  if constexpr (has_pairs(HeadDim, KeyWidth)) {
    using Pair = AttendShape<HeadDim, KeyWidth, ValueWidth, true, 2>;
    if (args.batch_shift == 1) {
      return launch(device, attend_kernel<Pair, true>, args, grid, Pair::kThreads, Pair::kSharedBytes, stream);
    }
  }
  if constexpr (has_direct(HeadDim, KeyWidth)) {
    using Direct = AttendShape<HeadDim, KeyWidth, ValueWidth, true, kMaxBatch>;
    if (args.batch_shift > 0) {
      return launch(device, attend_kernel<Direct, true>, args, grid, Direct::kThreads, Direct::kSharedBytes, stream);
    }
  }
  if (has_large_tables(device)) {
    return launch(device, attend_kernel<Large, true>, args, grid, Large::kThreads, Large::kSharedBytes, stream);
  }
  using Small = AttendShape<HeadDim, KeyWidth, ValueWidth, false>;
  return launch(device, attend_kernel<Small, false>, args, grid, Small::kThreads, Small::kSharedBytes, stream);
}

template <int HeadDim>
Status launch_attend_any(const DeviceInfo& device, const AttendArgs& args, dim3 grid, cudaStream_t stream) {
  return for_widths(
      args.key_codec.width, args.value_codec.width,
      [&]<int KeyWidth, int ValueWidth>() {
        return launch_attend<HeadDim, KeyWidth, ValueWidth>(device, args, grid, stream);
      },
      Status::unsupported("no attention kernel for this pair of widths"));
}

template <int HeadDim, int Width>
Status launch_score(const DeviceInfo& device, const ScoreArgs& args, dim3 grid, cudaStream_t stream) {
  using Large = AttendShape<HeadDim, Width, Width, true>;
  if (has_large_tables(device)) {
    return launch(device, score_kernel<Large, true>, args, grid, Large::kThreads, Large::kSharedBytes, stream);
  }
  using Small = AttendShape<HeadDim, Width, Width, false>;
  return launch(device, score_kernel<Small, false>, args, grid, Small::kThreads, Small::kSharedBytes, stream);
}

template <int HeadDim>
Status launch_score_any(const DeviceInfo& device, const ScoreArgs& args, dim3 grid, cudaStream_t stream) {
  switch (args.attend.key_codec.width) {
    case 2:
      return launch_score<HeadDim, 2>(device, args, grid, stream);
    case 4:
      return launch_score<HeadDim, 4>(device, args, grid, stream);
    case 8:
      return launch_score<HeadDim, 8>(device, args, grid, stream);
    default:
      return Status::unsupported("no kernel for this width");
  }
}

}  // namespace thimble::cuda
