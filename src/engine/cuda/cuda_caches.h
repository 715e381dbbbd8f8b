// The layers of one buffer on a CUDA device, which may have caches of several lengths (DeepSeek 4). The layers of a
// CudaCache share what depends on their cells, a prompt's end above all, so there is one for each length.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "engine/cuda/cuda_cache.h"

namespace thimble {

class CudaCaches final : public KvCache {
public:
  explicit CudaCaches(const cuda::DeviceInfo& device) : device_(device) {}

  void add_layer(const LayerPlan& plan, const LayerCodecs& codecs, uint8_t* const memory[2]) override;

  // These are asked before layers are added.
  std::string refusal(const WriteTask& task) const override;
  std::string refusal(const AttendTask& task) const override;
  std::string refusal(const ReadTask&) const override { return {}; }

  // Of one layer.
  void write(const Lane& lane, const WriteTask& task) override { of(task.layer).write(lane, task); }
  bool attend(const Lane& lane, const AttendTask& task, DenseAttention* dense) override {
    return of(task.layer).attend(lane, task, dense);
  }
  void end_dense(const Lane& lane, const AttendTask& task) override { of(task.layer).end_dense(lane, task); }
  void read(const Lane& lane, const ReadTask& task) override { of(task.layer).read(lane, task); }
  void flush(const Lane& lane, int layer) override { of(layer).flush(lane, layer); }
  void read_cells(int layer, Kind kind, int64_t first, int64_t n, uint8_t* rows) override {
    of(layer).read_cells(layer, kind, first, n, rows);
  }
  RefusedRows write_cells(int layer, Kind kind, std::span<const int64_t> cells, const uint8_t* rows) override {
    return of(layer).write_cells(layer, kind, cells, rows);
  }
  int64_t keys_at_once() const override { return cuda::CellState::kKeysAtOnce; }
  KeyRows read_keys(int layer, std::span<const int64_t> cells, std::span<const int32_t> shifts) override {
    return of(layer).read_keys(layer, cells, shifts);
  }
  void write_keys(int layer, std::span<const int64_t> cells) override { of(layer).write_keys(layer, cells); }
  void copy_stream(int layer, Kind kind, int from, int to) override { of(layer).copy_stream(layer, kind, from, to); }

  // Of all.
  void end_graph(const Lane& lane) override;
  void abandon() override;
  void clear() override;
  bool can_record() const override { return true; }
  void begin_recording() override;
  std::vector<RecordedWrites> end_recording(bool will_be_done) override;
  bool take_recorded(const std::vector<RecordedWrites>& writes) override;

private:
  CudaCache& of(int layer) const { return *by_layer_.at(layer); }

  cuda::DeviceInfo device_;
  std::vector<std::unique_ptr<CudaCache>> caches_;
  std::map<int, CudaCache*> by_layer_;
};

}  // namespace thimble
