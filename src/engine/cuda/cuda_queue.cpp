#include "engine/cuda/cuda_queue.h"

#include <stdexcept>

namespace thimble {
namespace {

class CudaRecording : public Queue::Recording {
public:
  CudaRecording(cudaGraphExec_t exec, cudaStream_t stream) : exec_(exec), stream_(stream) {}
  ~CudaRecording() override { (void)cudaGraphExecDestroy(exec_); }
  void replay() override { require(cudaGraphLaunch(exec_, stream_), "CUDA graph"); }

private:
  cudaGraphExec_t exec_;
  cudaStream_t stream_;
};

}  // namespace

void require(const cuda::Status& status, const char* what) {
  if (!status.ok()) throw std::runtime_error(std::string(what) + ": " + status.message);
}

void require(cudaError_t error, const char* what) {
  require(cuda::Status::from(error), what);
}

CudaQueue::CudaQueue(const cuda::DeviceInfo& device) : device_(device) {
  make_current();
  require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
  require(cudaEventCreateWithFlags(&ours_, cudaEventDisableTiming), "event");
  require(cudaEventCreateWithFlags(&theirs_, cudaEventDisableTiming), "event");
}

CudaQueue::~CudaQueue() {
  if (stream_) (void)cudaStreamSynchronize(stream_);
  if (ours_) (void)cudaEventDestroy(ours_);
  if (theirs_) (void)cudaEventDestroy(theirs_);
  if (stream_) (void)cudaStreamDestroy(stream_);
}

void CudaQueue::make_current() {
  require(cudaSetDevice(device_.ordinal), "CUDA device");
}

void CudaQueue::synchronize() {
  require(cudaStreamSynchronize(stream_), "stream");
}

void CudaQueue::await_theirs() {
  require(cudaStreamWaitEvent(stream_, theirs_, 0), "event");
}

void* CudaQueue::record_ours() {
  require(cudaEventRecord(ours_, stream_), "event");
  return ours_;
}

void CudaQueue::begin_recording() {
  require(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), "capture");
  is_recording_ = true;
}

std::unique_ptr<Queue::Recording> CudaQueue::end_recording(std::string* why) {
  is_recording_ = false;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  cudaError_t status = cudaStreamEndCapture(stream_, &graph);
  if (status == cudaSuccess) status = cudaGraphInstantiate(&exec, graph, 0);
  if (graph) (void)cudaGraphDestroy(graph);
  if (status == cudaSuccess) return std::make_unique<CudaRecording>(exec, stream_);
  (void)cudaGetLastError();
  *why = cudaGetErrorString(status);
  return nullptr;
}

void CudaQueue::reserve(cuda::DeviceMemory& memory, size_t bytes) {
  if (is_recording_ && bytes > memory.size()) throw std::runtime_error("memory was not reserved");
  bool moved = false;
  require(memory.reserve(bytes, &moved), "scratch memory");
  if (moved) memory_version_++;
}

}  // namespace thimble
