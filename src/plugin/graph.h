// How the nodes of a ggml graph that touch a coded cache are recognized, checked and run.
//
//   SET_ROWS into a cache            encode
//   FLASH_ATTN_EXT over caches       attention from codes
//   ROPE in place on a key cache     context shift: decode, rotate, encode
//   views, reshapes, permutations    nothing to do
// Any other node on a cache is refused.
#pragma once

#include <atomic>
#include <deque>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "ggml-backend-impl.h"
#include "ggml.h"
#include "plugin/kv_buffer.h"
#include "plugin/team.h"

namespace thimble {

enum class NodeKind { other, write, attend, shift, view, refused };

/// What a node does to coded caches. For `refused`, `why` gets a sentence.
NodeKind classify(const ggml_tensor* node, std::string* why = nullptr);

/// Tells the layer that an attention node reads its head sizes, if it does not know them yet (KvBuffer::bind).
void bind(const ggml_tensor* node);

/// Runs graphs on an inner CPU backend. Cache nodes become custom ops of the same graph, on the same threads.
class CpuGraph {
public:
  explicit CpuGraph(ggml_backend_t inner) : inner_(inner) {}
  ggml_status compute(ggml_cgraph* graph);

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
