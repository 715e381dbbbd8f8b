// Runs graphs over a cache whose engine computes on the threads of the inner backend.
#pragma once

#include <deque>
#include <vector>

#include "plugin/kv_buffer.h"
#include "plugin/runner.h"

namespace thimble {

/// Replaces cache nodes by custom ops of the inner backend's graph while it runs.
class InlineRunner : public Runner {
public:
  explicit InlineRunner(ggml_backend_t inner) : inner_(inner) {}
  ggml_status compute(ggml_cgraph* graph) override;

private:
  struct Op {
    KvCache* cache = nullptr;
    ManagedLayer* layer = nullptr;
    WriteTask write;
    AttendTask attend;
    Team::Shared shared;
  };
  static void run_write(ggml_tensor* dst, int thread, int n_threads, void* op);
  static void run_attend(ggml_tensor* dst, int thread, int n_threads, void* op);
  Op& add_op(KvBuffer& buffer, ManagedLayer& layer);
  void replace(ggml_tensor** node, ggml_custom_op_t run, Op& op);
  ggml_status run_segment(ggml_cgraph* graph, int first, int last);
  ggml_status run_nodes(ggml_cgraph* graph);

  ggml_backend_t inner_;
  // Of the graph being computed:
  Failure failure_;
  std::deque<Op> ops_;
  std::deque<ggml_tensor> stand_ins_;  // the custom ops
  std::vector<std::pair<ggml_tensor**, ggml_tensor*>> replaced_;
};

}  // namespace thimble
