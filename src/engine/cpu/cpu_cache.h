// A KV cache in RAM.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "attention/attention.h"
#include "engine/kv_cache.h"

namespace thimble {

class CpuCache : public KvCache {
public:
  explicit CpuCache(const Settings& settings) : settings_(settings) {}

  /// How many exact rows the layer's memory has room for: 0 with an exact store, which holds all rows.
  static int n_slots(const LayerPlan& plan);
  /// How many exact rows the layer's window may hold; memory for those beyond n_slots is allocated when it is needed.
  static int max_slots(const LayerPlan& plan);

  void add_layer(const LayerPlan& plan, const LayerCodecs& codecs, uint8_t* const memory[2]) override;
  void write(const Lane& lane, const WriteTask& task) override;
  bool attend(const Lane& lane, const AttendTask& task, DenseAttention* dense) override;
  std::string refusal(const ReadTask&) const override { return {}; }
  void read(const Lane& lane, const ReadTask& task) override;
  void read_cells(int layer, Kind kind, int64_t first, int64_t n, uint8_t* rows) override;
  RefusedRows write_cells(int layer, Kind kind, std::span<const int64_t> cells, const uint8_t* rows) override;
  KeyRows read_keys(int layer, std::span<const int64_t> cells, std::span<const int32_t> shifts) override;
  void write_keys(int layer, std::span<const int64_t> cells) override;
  void copy_stream(int layer, Kind kind, int from, int to) override;
  void clear() override;
  std::string take_warning() override;

private:
  struct Layer {
    std::unique_ptr<CacheLayer> cache;
    Retrieval retrieval;
    std::vector<uint64_t> hashes;        // LayerPlan::hashes
    std::vector<int64_t> cells[2];       // by Kind: the cells that the current write writes to
    std::vector<const uint16_t*> exact;  // of the current read: by stream and cell, the exact row or null
  };
  CacheLayer& cache_of(int layer) { return *layers_.at(layer).cache; }
  void begin_write(Layer& layer, const WriteTask& task);
  void begin_attend(Layer& layer, const AttendTask& task, int n_threads);
  static void settle(CacheLayer& cache, const BatchSight& sight);
  static void begin_commit(CacheLayer& cache, const BatchSight& sight, const BatchQueries& queries);
  static void code_leaving(CacheLayer& cache, const Team& team);
  static void begin_read(Layer& layer, const ReadTask& task);
  static void read_rows(const Layer& layer, const ReadTask& task, int thread, int n_threads);
  static void write_rows(Layer& layer, const WriteTask& task, int thread, int n_threads);

  Settings settings_;
  std::map<int, Layer> layers_;
  Attention attention_;  // one task runs at a time
  bool told_of_full_store_ = false;
  std::vector<float> keys_;
  std::vector<int32_t> shifts_;
};

}  // namespace thimble
