// Graphs over a cache in RAM.
#pragma once

#include <atomic>
#include <deque>
#include <vector>

#include "attention/attention.h"
#include "plugin/graph.h"
#include "plugin/kv_buffer.h"
#include "plugin/team.h"

namespace thimble {

/// Runs graphs on an inner CPU backend. Cache nodes become custom ops of the same graph, on the same threads.
class CpuGraph : public Graph {
public:
  explicit CpuGraph(ggml_backend_t inner) : inner_(inner) {}
  ggml_status compute(ggml_cgraph* graph) override;

private:
  struct Op {
    ManagedLayer* layer = nullptr;
    Kind kind = Kind::key;
    const ggml_tensor* node = nullptr;
    CpuGraph* graph = nullptr;
    bool commits = false;  // the last node that attends to the layer
    bool failed = false;
    Barrier barrier;
    std::vector<int64_t> cells;
  };
  static void run_write(ggml_tensor* dst, int thread, int n_threads, void* op);
  static void run_attend(ggml_tensor* dst, int thread, int n_threads, void* op);
  ggml_status run_segment(ggml_cgraph* graph, int first, int last);
  ggml_status shift(const ggml_tensor* node);

  ggml_backend_t inner_;
  Attention attention_;
  std::atomic<bool> failed_ = false;  // some op of the graph being computed: what follows is not worth running
  std::deque<Op> ops_;                // of the graph being computed
  std::deque<ggml_tensor> nodes_;     // the custom ops that stand in for its nodes
};

}  // namespace thimble
