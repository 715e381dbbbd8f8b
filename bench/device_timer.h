// What the benchmarks of kernels share: memory of the device, and the time of steps that are replayed as a CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "codec/format.h"
#include "cuda/host/device.h"

namespace thimble::bench {

/// Ends the program with a sentence where `good` is false.
inline void require(bool good, const char* what) {
  if (good) return;
  std::printf("%s\n", what);
  std::exit(1);
}
inline void require(cudaError_t e) {
  require(e == cudaSuccess, cudaGetErrorString(e));
}
inline void require(const cuda::Status& s) {
  require(s.ok(), s.ok() ? "" : s.message);
}

/// Device memory that is zero. It is not given back: a benchmark ends soon.
template <typename T>
T* allocate(size_t n) {
  void* p = nullptr;
  require(cudaMalloc(&p, n * sizeof(T)));
  require(cudaMemset(p, 0, n * sizeof(T)));
  return static_cast<T*>(p);
}
template <typename T>
T* copied(const std::vector<T>& values) {
  T* p = allocate<T>(values.size());
  require(cudaMemcpy(p, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return p;
}

/// Sets the scales of coded blocks, the last numbers of each, to about 1.
inline void set_scales(std::vector<uint8_t>& blocks, size_t block_bytes) {
  for (size_t i = 0; i < blocks.size(); i += block_bytes) {
    for (int c = 0; c < kBlockCells; c++) blocks[i + block_bytes - 2 * kBlockCells + 2 * c + 1] = 0x3c;
  }
}

struct Times {
  double median, least, most;
};
inline Times times_of(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front(), times.back()};
}

/// Microseconds of a step, over 11 replays of a graph of n steps; enqueue(i, stream) enqueues step i.
inline Times time_steps(int n, const std::function<void(int, cudaStream_t)>& enqueue) {
  constexpr int kRounds = 11;
  cudaStream_t stream;
  require(cudaStreamCreate(&stream));
  enqueue(0, stream);
  require(cudaStreamSynchronize(stream));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < n; i++) enqueue(i, stream);
  require(cudaStreamEndCapture(stream, &graph));
  require(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin));
  require(cudaEventCreate(&end));
  std::vector<double> times;
  for (int i = 0; i <= kRounds; i++) {
    require(cudaEventRecord(begin, stream));
    require(cudaGraphLaunch(exec, stream));
    require(cudaEventRecord(end, stream));
    require(cudaStreamSynchronize(stream));
    float ms = 0;
    require(cudaEventElapsedTime(&ms, begin, end));
    if (i > 0) times.push_back(ms * 1000 / n);
  }
  require(cudaEventDestroy(begin));
  require(cudaEventDestroy(end));
  require(cudaGraphExecDestroy(exec));
  require(cudaGraphDestroy(graph));
  require(cudaStreamDestroy(stream));
  return times_of(times);
}

}  // namespace thimble::bench
