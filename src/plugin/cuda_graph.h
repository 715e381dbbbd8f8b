// Graphs over a cache in the memory of a CUDA device.
//
// Our kernels run on a stream of our own. It and the inner backend's stream are ordered by events, never by waiting on
// the host: a ggml_backend_event's context is a cudaEvent_t, so that the inner backend records and awaits events of
// ours, and ggml-cuda need not be linked.
//
// A graph that comes a second time is captured whole. Capture begins on our stream; as the inner backend awaits an
// event of it, its stream joins the capture, and what it launches becomes part of the one CUDA graph that later tokens
// replay: the cuts then cost nothing.
#pragma once

#include <map>
#include <vector>

#include "cuda/attend/attend.h"
#include "cuda/encode/encode.h"
#include "cuda/host/memory.h"
#include "cuda/retrieve/retrieve.h"
#include "plugin/cuda_cache.h"
#include "plugin/graph.h"
#include "plugin/plan.h"

namespace thimble {

class CudaGraph : public Graph {
public:
  explicit CudaGraph(ggml_backend_t inner);
  ~CudaGraph() override;
  ggml_status compute(ggml_cgraph* graph) override;

private:
  // A graph that was run lately, by what its nodes are; `uid` is ggml's own number for it, where it has one.
  struct Seen {
    uint64_t uid = 0, hash = 0, last_use = 0;
    bool was_run = false;
    cudaGraphExec_t exec = nullptr;
    KvBuffer* buffer = nullptr;  // that `exec` works on
  };
  Seen& find(const ggml_cgraph* graph);
  void forget_captures();
  void replay(const Seen& seen);
  void capture(const std::vector<Step>& steps, ggml_cgraph* graph, Seen& seen);

  // Whose stream has the latest work; going over to the other makes it wait for that.
  void go_to_ours();
  void go_to_inner();

  void run(const std::vector<Step>& steps, ggml_cgraph* graph);
  void run_inner(std::vector<ggml_tensor*> nodes, const ggml_cgraph* graph);
  void run_cut(const Cut& cut);
  void shift(const Cut& cut);
  void mind_refused(const Cut& cut);
  void attend(const Cut& cut, const cuda::EncodeArgs& encode);
  void retrieve(const Cut& cut, const cuda::AttendArgs& attend);
  void prefill(const Cut& cut, cuda::EncodeArgs& encode);
  void read_store(const Cut& cut, const cuda::DenseRows& rows);
  void decode(const Cut& cut, const cuda::DenseRows& rows, bool before_batch);
  cuda::EncodeArgs encode_args(const Cut& cut);
  cuda::BatchMask mask_of_batch(const CudaCache& cache) const;
  const float* slopes(float max_bias, int n_heads);
  template <typename T>
  T* scratch(cuda::DeviceMemory& memory, size_t n);

  ggml_backend_t inner_;
  cuda::DeviceInfo device_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t ours_ = nullptr, theirs_ = nullptr;  // recorded on our stream and on the inner one
  bool on_ours_ = false;
  bool capturing_ = false, can_capture_ = true;
  uint64_t clock_ = 0;
  std::vector<Seen> seen_;
  const std::vector<Step>* steps_ = nullptr;  // that are run
  ggml_tensor marker_{};                      // see run_inner
  ggml_tensor stand_ins_[4]{};
  cuda::DeviceMemory workspace_, queries_, dense_, retrieval_;
  cuda::DeviceMemory positions_;
  std::map<const void*, std::vector<uint8_t>> masks_;  // of this graph, on the host; see mind_refused
  std::map<std::pair<float, int>, cuda::DeviceMemory> slopes_;
};

}  // namespace thimble
