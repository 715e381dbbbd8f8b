// The part of CUDA's runtime that Thimble uses, on the host: with this folder before CUDA's among the include paths,
// and THIMBLE_SIMT_HOST, the whole CUDA engine is compiled by the C++ compiler and runs in emulation
// (simt/emulation.h). Device memory is the host's, and work is done when it is asked for or recorded. The device is one
// of compute capability 7.5, whose 64 KiB of shared memory leave the kernels over tiles alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "cuda/simt/emulation.h"

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorStreamCaptureUnsupported = 900 };
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory"
         : error == cudaSuccess             ? "no error"
                                            : "not allowed while recording";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

// ---- devices

enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // One multiprocessor, as thread blocks run one after the other.
  constexpr int kValues[] = {7, 5, 1, 64 << 10};
  *value = kValues[attribute];
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetByPCIBusId(int* ordinal, const char*) {
  *ordinal = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}

// ---- streams, events and recordings

// Work that was given to a stream while it recorded. Queues of other libraries (tests/plugin/recording_backend.cpp)
// join a recording as CUDA's streams do: by waiting for an event of it.
struct CUgraph_st {
  std::vector<std::function<void()>> work;
};
struct CUstream_st {
  std::shared_ptr<CUgraph_st> recording;
};
struct CUevent_st {
  std::shared_ptr<CUgraph_st> recording;
};
struct CUgraphExec_st {
  std::vector<std::function<void()>> work;
};
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;
using cudaGraph_t = CUgraph_st*;
using cudaGraphExec_t = CUgraphExec_st*;

template <typename Work>
cudaError_t do_or_record(cudaStream_t stream, const Work& work) {
  if (stream && stream->recording) {
    stream->recording->work.emplace_back(work);
  } else {
    work();
  }
  return cudaSuccess;
}

enum { cudaStreamNonBlocking, cudaEventDisableTiming, cudaStreamCaptureModeRelaxed };
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return stream && stream->recording ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->recording = stream->recording;
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
  return cudaSuccess;  // what was given before is done
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, int) {
  stream->recording = std::make_shared<CUgraph_st>();
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = new CUgraph_st(*stream->recording);
  stream->recording.reset();
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, int) {
  *exec = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  for (const auto& work : exec->work) work();
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}

// ---- memory

inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  constexpr size_t kAlignment = 256;
  *memory = std::aligned_alloc(kAlignment, (bytes / kAlignment + 1) * kAlignment);
  if (!*memory) return cudaErrorMemoryAllocation;
  std::memset(*memory, 0xcd, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
inline constexpr unsigned cudaHostAllocMapped = 2;
inline cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  return cudaMalloc(memory, bytes);
}
inline cudaError_t cudaMallocHost(void** memory, size_t bytes) {
  return cudaMalloc(memory, bytes);
}
inline cudaError_t cudaFreeHost(void* memory) {
  return cudaFree(memory);
}
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDefault };
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return do_or_record(stream, [=] { (void)cudaMemcpy(to, from, bytes, kind); });
}
inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                     size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  return do_or_record(stream, [=] {
    for (size_t row = 0; row < height; row++) {
      (void)cudaMemcpy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch,
                       width, kind);
    }
  });
}
inline cudaError_t cudaMemset(void* memory, int byte, size_t bytes) {
  std::memset(memory, byte, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t stream) {
  return do_or_record(stream, [=] { (void)cudaMemset(memory, byte, bytes); });
}

// ---- kernels

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
enum { cudaLaunchAttributeProgrammaticStreamSerialization, cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim{1}, blockDim{1};
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}
template <typename Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args), const Args& args) {
  const dim3 grid = config->gridDim;
  const int threads = int(config->blockDim.x);
  return do_or_record(config->stream, [=, shared_bytes = config->dynamicSmemBytes] {
    thimble::cuda::simt::Machine::launch({int(grid.x), int(grid.y), int(grid.z)}, threads, shared_bytes,
                                         [&] { kernel(args); });
  });
}
