// Runs graphs over a cache whose engine computes on the threads of the inner backend.
#pragma once

#include <deque>
#include <map>
#include <vector>

#include "plugin/kv_buffer.h"
#include "plugin/row_reader.h"
#include "plugin/runner.h"

namespace thimble {

/// Replaces cache nodes by custom ops of the inner backend's graph while it runs, and puts custom ops that decode rows
/// before the nodes that read them.
class InlineRunner : public Runner {
public:
  explicit InlineRunner(ggml_backend_t inner) : inner_(inner) {}
  ggml_status compute(ggml_cgraph* graph) override;

private:
  // What nodes that read a layer have shown of the batch.
  struct Reading {
    BatchQueries queries;
    std::vector<float> memory;
  };
  struct Op {
    KvCache* cache = nullptr;
    ManagedLayer* layer = nullptr;
    WriteTask write;
    AttendTask attend;
    ReadTask* read = nullptr;
    const ggml_tensor* queries = nullptr;  // that the node multiplies with the rows that are read
    Reading* reading = nullptr;
    Team::Shared shared;
  };
  static void run_write(ggml_tensor* dst, int thread, int n_threads, void* op);
  static void run_attend(ggml_tensor* dst, int thread, int n_threads, void* op);
  static void run_read(ggml_tensor* dst, int thread, int n_threads, void* op);
  Op& add_op(KvBuffer& buffer, ManagedLayer& layer);
  ggml_tensor* stand_in(const ggml_tensor* node, ggml_custom_op_t run, Op& op);
  void add_read(ggml_tensor* node, const BatchOfGraph& batch);
  ggml_status run_segment(ggml_cgraph* graph);
  ggml_status run_nodes(ggml_cgraph* graph);

  ggml_backend_t inner_;
  // Of the graph being computed:
  Failure failure_;
  std::deque<Op> ops_;
  std::deque<ggml_tensor> stand_ins_;  // the custom ops
  std::deque<ReadingNode> reading_nodes_;
  std::map<const ManagedLayer*, Reading> readings_;
  std::map<const ManagedLayer*, Op*> last_;  // the last use of each layer that is attended to or read
  std::vector<ggml_tensor*> nodes_;          // that are run together

  std::vector<uint8_t> rows_;  // that one node reads
};

}  // namespace thimble
