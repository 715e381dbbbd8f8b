// Runs graphs over a cache whose engine has a queue of its own, beside the stream of the inner backend.
//
// Events order the queue and the stream, so the host never waits. The context of a ggml_backend_event is an event of
// the device, so the inner backend can record and await events of the queue. Where the inner backend has no events, the
// host waits for the one and for the other.
//
// A node that reads rows of a cache runs on rows that the queue has decoded before. The masks of such a graph are
// copied to the host, which waits for them, and to the device as f16.
//
// A graph that comes a second time is recorded whole (captured, on CUDA). Recording begins on the queue. When the inner
// backend awaits an event of the queue, its stream joins the recording, and its launches become part of it. Later
// tokens replay the recording, in which the cuts cost nothing. A graph may have a part of the layers alone: where
// tensors are split over devices, ggml's Meta device runs two for each layer on each device and sums up behind each.
#pragma once

#include <list>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "plugin/cuts.h"
#include "plugin/host_waits.h"
#include "plugin/row_reader.h"
#include "plugin/runner.h"

namespace thimble {

class StreamRunner : public Runner {
public:
  StreamRunner(ggml_backend_t inner, std::unique_ptr<Queue> queue);
  ~StreamRunner() override;
  ggml_status compute(ggml_cgraph* graph) override;

private:
  // A graph that was run. `hash` is of its nodes; `uid` is ggml's own number for it, or 0.
  struct Seen {
    uint64_t uid = 0, hash = 0;
    size_t n_nodes = 0;
    bool was_run = false;
    bool has_no_cache = false;
    std::unique_ptr<Queue::Recording> recording;
    KvBuffer* buffer = nullptr;  // the recording's buffer
    std::vector<RecordedWrites> writes;
  };
  Seen& find(const ggml_cgraph* graph);
  void drop_stale_recordings();
  bool replay(Seen& seen);
  void run_recorded(const Seen& seen);
  bool can_record(const std::vector<Step>& steps);
  void record(const std::vector<Step>& steps, ggml_cgraph* graph, Seen& seen);

  // Makes the next work go to the queue, or to the inner backend's stream, and wait for the other's earlier work.
  void go_to_ours();
  void go_to_inner();

  void run(const std::vector<Step>& steps, ggml_cgraph* graph);
  void end_graph(const std::vector<Step>& steps);
  void run_inner(std::vector<ggml_tensor*> nodes, const ggml_cgraph* graph);
  void run_cut(const std::vector<Step>& steps, const Cut& cut);
  void run_read(const std::vector<Step>& steps, const Cut& cut);
  BatchSight sight_of_writes(const std::vector<Step>& steps, const Cut& of, int64_t n_rows);
  BatchSight sight_of_reading(const ReadingNode::Source& source);
  void attend_dense(const Cut& cut, const AttendTask& task, const DenseAttention& dense);
  void mind_refused(const Cut& cut);
  void check_refused(const Cut& cut);

  ggml_backend_t inner_;
  std::unique_ptr<Queue> queue_;
  InnerBuild inner_build_;
  bool on_ours_ = false;
  bool recording_ = false, said_host_waits_ = false;
  bool can_record_;
  uint64_t memory_version_ = 0;
  std::list<Seen> seen_;  // the last one first
  size_t seen_nodes_ = 0;
  ggml_tensor marker_{};  // see run_inner
  ggml_tensor stand_ins_[4]{};
  std::map<const void*, std::vector<uint8_t>> masks_;  // of this graph, on the host; see mind_refused

  // Memory of the inner device.
  struct InnerMemory {
    std::unique_ptr<ggml_backend_buffer, decltype(&ggml_backend_buffer_free)> buffer{nullptr, ggml_backend_buffer_free};
    uint8_t* data() const { return static_cast<uint8_t*>(ggml_backend_buffer_get_base(buffer.get())); }
  };
  void reserve(InnerMemory& memory, size_t bytes);
  InnerMemory rows_;                                 // that one node reads
  std::map<const uint16_t*, InnerMemory> of_batch_;  // copies of the masks of `batch_`
  std::optional<BatchOfGraph> batch_;                // of this graph, where it has a node that reads rows
};

}  // namespace thimble
