// Decode attention: the kernels of one head size, and which of them a call takes. Only head_<head size>.cu include it.
#pragma once

#include <cuda_runtime.h>

#include "cuda/attend/kernel.h"
#include "cuda/attend/launch.h"
#include "cuda/attend/score_kernel.h"
#include "cuda/attend/shape.h"
#include "cuda/attend/shared.h"
#include "cuda/formats.h"
#include "cuda/host/device.h"
#include "cuda/host/launch.h"
#include "cuda/host/status.h"
#include "cuda/types.h"

namespace thimble::cuda {

template <typename S, bool Large>
__global__ void __launch_bounds__(S::kThreads, 1) attend_kernel(const __grid_constant__ AttendArgs args) {
#if __CUDA_ARCH__ >= 900
  AttendKernel<S>::run(args);
#elif __CUDA_ARCH__ >= 800
  if constexpr (!Large) AttendKernel<S>::run(args);  // the others do not fit these devices
#endif
}

template <typename S, bool Large>
__global__ void __launch_bounds__(S::kThreads, 1) score_kernel(const __grid_constant__ ScoreArgs args) {
#if __CUDA_ARCH__ >= 900
  ScoreKernel<S>::run(args);
#elif __CUDA_ARCH__ >= 800
  if constexpr (!Large) ScoreKernel<S>::run(args);
#endif
}

template <int HeadDim, int KeyWidth, int ValueWidth>
Status launch_paged(const DeviceInfo& device, const AttendArgs& args, dim3 grid, cudaStream_t stream) {
  using Large = AttendShape<HeadDim, KeyWidth, ValueWidth, true, 1, true>;
  using Small = AttendShape<HeadDim, KeyWidth, ValueWidth, false, 1, true>;
  if (has_large_tables(device)) {
    return launch(device, attend_kernel<Large, true>, args, grid, Large::kThreads, shared_bytes<Large>(), stream);
  }
  return launch(device, attend_kernel<Small, false>, args, grid, Small::kThreads, shared_bytes<Small>(), stream);
}

template <int HeadDim, int KeyWidth, int ValueWidth>
Status launch_widths(const DeviceInfo& device, const AttendArgs& args, dim3 grid, cudaStream_t stream) {
  if (args.pages.sequences) return launch_paged<HeadDim, KeyWidth, ValueWidth>(device, args, grid, stream);
  using Large = AttendShape<HeadDim, KeyWidth, ValueWidth, true>;
  if constexpr (has_pairs(HeadDim, KeyWidth)) {
    using Pair = AttendShape<HeadDim, KeyWidth, ValueWidth, true, 2>;
    if (args.batch_shift == 1) {
      return launch(device, attend_kernel<Pair, true>, args, grid, Pair::kThreads, shared_bytes<Pair>(), stream);
    }
  }
  if constexpr (has_direct(HeadDim, KeyWidth)) {
    using Direct = AttendShape<HeadDim, KeyWidth, ValueWidth, true, kMaxBatch>;
    if (args.batch_shift > 0) {
      return launch(device, attend_kernel<Direct, true>, args, grid, Direct::kThreads, shared_bytes<Direct>(), stream);
    }
  }
  if (has_large_tables(device)) {
    return launch(device, attend_kernel<Large, true>, args, grid, Large::kThreads, shared_bytes<Large>(), stream);
  }
  using Small = AttendShape<HeadDim, KeyWidth, ValueWidth, false>;
  return launch(device, attend_kernel<Small, false>, args, grid, Small::kThreads, shared_bytes<Small>(), stream);
}

template <int HeadDim>
Status launch_attend(const DeviceInfo& device, const AttendArgs& args, dim3 grid, cudaStream_t stream) {
  return for_widths(
      args.key_codec.width, args.value_codec.width,
      [&]<int KeyWidth, int ValueWidth>() {
        return launch_widths<HeadDim, KeyWidth, ValueWidth>(device, args, grid, stream);
      },
      Status::unsupported("no attention kernel for this pair of widths"));
}

template <int HeadDim>
Status launch_score(const DeviceInfo& device, const ScoreArgs& args, dim3 grid, cudaStream_t stream) {
  return for_width(
      args.attend.key_codec.width,
      [&]<int Width>() {
        using Large = AttendShape<HeadDim, Width, Width, true>;
        using Small = AttendShape<HeadDim, Width, Width, false>;
        if (has_large_tables(device)) {
          return launch(device, score_kernel<Large, true>, args, grid, Large::kThreads, shared_bytes<Large>(), stream);
        }
        return launch(device, score_kernel<Small, false>, args, grid, Small::kThreads, shared_bytes<Small>(), stream);
      },
      Status::unsupported("no kernel for this width"));
}

}  // namespace thimble::cuda
