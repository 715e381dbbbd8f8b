// Graphs over a cache whose engine has a queue of its own, beside the stream of the inner backend.
//
// Both are ordered by events, never by waiting on the host: a ggml_backend_event's context is an event of the device,
// so that the inner backend records and awaits events of ours.
//
// A graph that comes a second time is recorded whole. Recording begins on our queue; as the inner backend awaits an
// event of it, its stream joins, and what it launches becomes part of the one recording that later tokens replay: the
// cuts then cost nothing.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "plugin/cuts.h"
#include "plugin/runner.h"

namespace thimble {

class StreamRunner : public Runner {
public:
  StreamRunner(ggml_backend_t inner, std::unique_ptr<Queue> queue) : inner_(inner), queue_(std::move(queue)) {}
  ~StreamRunner() override;
  ggml_status compute(ggml_cgraph* graph) override;

private:
  // A graph that was run lately, by what its nodes are; `uid` is ggml's own number for it, where it has one.
  struct Seen {
    uint64_t uid = 0, hash = 0, last_use = 0;
    bool was_run = false;
    std::unique_ptr<Queue::Recording> recording;
    KvBuffer* buffer = nullptr;  // that the recording works on
  };
  Seen& find(const ggml_cgraph* graph);
  void drop_stale_recordings();
  void replay(const Seen& seen);
  void record(const std::vector<Step>& steps, ggml_cgraph* graph, Seen& seen);

  // Whose stream has the latest work; going over to the other makes it wait for that.
  void go_to_ours();
  void go_to_inner();

  void run(const std::vector<Step>& steps, ggml_cgraph* graph);
  void run_inner(std::vector<ggml_tensor*> nodes, const ggml_cgraph* graph);
  void run_cut(const std::vector<Step>& steps, const Cut& cut);
  void attend_dense(const Cut& cut, const AttendTask& task, const DenseAttention& dense);
  void mind_refused(const Cut& cut);

  ggml_backend_t inner_;
  std::unique_ptr<Queue> queue_;
  bool on_ours_ = false;
  bool recording_ = false, can_record_ = true;
  uint64_t clock_ = 0, memory_version_ = 0;
  std::vector<Seen> seen_;
  ggml_tensor marker_{};  // see run_inner
  ggml_tensor stand_ins_[4]{};
  std::map<const void*, std::vector<uint8_t>> masks_;  // of this graph, on the host; see mind_refused
};

}  // namespace thimble
