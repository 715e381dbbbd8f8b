// A third engine, linked in the place of src/engine/registry.cpp: f16 rows and scalar loops, no window and no codes. It
// shows what an engine has to do, and the plugin's own tests run on it at 16 bits. THIMBLE_TEST_REFUSES makes it refuse
// something by a sentence: "settings", "layer", "write" or "attend" before there is a context, "failure" while it runs.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <stdexcept>

#include "cache/state_row.h"
#include "codec/half.h"
#include "engine/engine.h"

namespace thimble {
namespace {

std::string refusal_of(const char* what) {
  const char* refuses = std::getenv("THIMBLE_TEST_REFUSES");
  return refuses && std::strcmp(refuses, what) == 0 ? "the plain engine was told to refuse: " + std::string(what) : "";
}

/// Memory of a side: [cell][n_kv_heads][head_dim] f16.
class PlainCache : public KvCache {
public:
  void add_layer(const LayerPlan& plan, const LayerCodecs&, uint8_t* const memory[2]) override {
    Layer& layer = layers_[plan.layer];
    layer.shape = plan.shape;
    for (int side : {0, 1}) {
      layer.dim[side] = plan.format[side].head_dim;
      layer.rows[side] = reinterpret_cast<uint16_t*>(memory[side]);
    }
  }

  std::string refusal(const WriteTask&) const override { return refusal_of("write"); }
  std::string refusal(const AttendTask&) const override { return refusal_of("attend"); }

  void write(const Lane& lane, const WriteTask& task) override {
    Layer& layer = layers_.at(task.layer);
    const size_t n = layer.row_size(task.kind);
    for (int64_t i = lane.team->thread(); i < task.n_rows; i += lane.team->size()) {
      const char* from = static_cast<const char*>(task.rows) + i * task.row_bytes;
      uint16_t* to = layer.row(task.kind, task.cell(i));
      for (size_t k = 0; k < n; k++) {
        to[k] = task.is_f16 ? reinterpret_cast<const uint16_t*>(from)[k]
                            : float_to_half(reinterpret_cast<const float*>(from)[k]);
      }
    }
  }

  bool attend(const Lane& lane, const AttendTask& task, DenseAttention*) override {
    if (!lane.team->lead([] {
          if (const std::string why = refusal_of("failure"); !why.empty()) throw std::runtime_error(why);
        })) {
      return true;
    }
    const AttentionProblem& p = task.problem;
    const int64_t n = int64_t(p.n_streams) * p.n_tokens * p.n_heads;
    for (int64_t i = lane.team->thread(); i < n; i += lane.team->size()) {
      attend_row(layers_.at(task.layer), task, int(i / p.n_heads / p.n_tokens), int(i / p.n_heads % p.n_tokens),
                 int(i % p.n_heads));
    }
    return true;
  }

  std::string refusal(const ReadTask&) const override { return {}; }

  void read(const Lane& lane, const ReadTask& task) override {
    Layer& from = layers_.at(task.layer);
    const int64_t n = int64_t(from.row_size(task.kind)), n_cells = task.n_cells;
    for (int64_t i = lane.team->thread(); i < task.n_streams * n_cells; i += lane.team->size()) {
      const int64_t stream = i / n_cells, cell = i % n_cells;
      const uint16_t* row = from.row(task.kind, (task.first_stream + stream) * from.shape.cells_per_stream + cell);
      const int64_t stride = task.row_stride ? int64_t(task.row_stride) : n;
      uint16_t* to = task.rows + stream * n_cells * stride;
      for (int64_t k = 0; k < n; k++) to[task.transposed ? k * n_cells + cell : cell * stride + k] = row[k];
    }
  }

  void read_cells(int layer, Kind kind, int64_t first, int64_t n, uint8_t* rows) override {
    Layer& from = layers_.at(layer);
    std::memcpy(rows, from.row(kind, first), n * from.row_size(kind) * sizeof(uint16_t));
  }

  RefusedRows write_cells(int layer, Kind kind, std::span<const int64_t> cells, const uint8_t* rows) override {
    Layer& to = layers_.at(layer);
    const size_t row_bytes = to.row_size(kind) * sizeof(uint16_t);
    RefusedRows refused;
    for (size_t i = 0; i < cells.size(); i++) {
      const uint8_t* row = rows + i * row_bytes;
      const std::vector<uint64_t> no_hashes(to.shape.n_kv_heads);
      const RowLayout layout = {row_bytes / to.shape.n_kv_heads, 0, no_hashes, /*takes_codes=*/false};
      if (row_kind(row, layout) == RowKind::exact) {
        std::memcpy(to.row(kind, cells[i]), row, row_bytes);
      } else {
        refused.entries.push_back(i);
        refused.why = kOtherSettings;
      }
    }
    return refused;
  }

  KeyRows read_keys(int layer, std::span<const int64_t> cells, std::span<const int32_t> shifts) override {
    Layer& from = layers_.at(layer);
    keys_.clear();
    shifts_.assign(shifts.begin(), shifts.end());
    for (int64_t cell : cells) {
      for (size_t k = 0; k < from.row_size(Kind::key); k++)
        keys_.push_back(half_to_float(from.row(Kind::key, cell)[k]));
    }
    return {keys_.data(), shifts_.data()};
  }

  void write_keys(int layer, std::span<const int64_t> cells) override {
    Layer& to = layers_.at(layer);
    size_t at = 0;
    for (int64_t cell : cells) {
      for (size_t k = 0; k < to.row_size(Kind::key); k++) to.row(Kind::key, cell)[k] = float_to_half(keys_[at++]);
    }
  }

  void copy_stream(int layer, Kind kind, int from, int to) override {
    Layer& of = layers_.at(layer);
    const int64_t n = of.shape.cells_per_stream;
    std::memcpy(of.row(kind, to * n), of.row(kind, from * n), n * of.row_size(kind) * sizeof(uint16_t));
  }

  void clear() override {
    for (auto& [index, layer] : layers_) {
      for (Kind kind : {Kind::key, Kind::value}) {
        std::memset(layer.row(kind, 0), 0, layer.shape.n_cells() * layer.row_size(kind) * sizeof(uint16_t));
      }
    }
  }

private:
  struct Layer {
    CacheShape shape;
    int dim[2];         // by Kind
    uint16_t* rows[2];  // by Kind
    size_t row_size(Kind kind) const { return size_t(shape.n_kv_heads) * dim[int(kind)]; }
    uint16_t* row(Kind kind, int64_t cell) { return rows[int(kind)] + cell * row_size(kind); }
  };

  // softmax(scale q.k + mask) v of one query head, in one pass over the cells.
  static void attend_row(Layer& layer, const AttendTask& task, int stream, int token, int head) {
    const AttentionProblem& p = task.problem;
    const BatchSight sight = task.sight();
    const int kv_head = head / (p.n_heads / layer.shape.n_kv_heads), key_dim = layer.dim[0], value_dim = layer.dim[1];
    const float* q = p.q + stream * p.q_stream + token * p.q_token + head * p.q_head;
    const double slope = p.max_bias > 0 ? alibi_slope(p.max_bias, p.n_heads, head) : 1;
    const int64_t first = (p.first_stream + stream) * layer.shape.cells_per_stream;
    double max = -std::numeric_limits<double>::infinity(), sum = 0;
    std::vector<double> acc(value_dim);
    const auto add = [&](double score, const uint16_t* value) {
      if (score > max) {
        const double shrink = std::exp(max - score);
        for (double& x : acc) x *= shrink;
        sum *= shrink;
        max = score;
      }
      const double weight = std::exp(score - max);
      sum += weight;
      for (int d = 0; value && d < value_dim; d++) acc[d] += weight * half_to_float(value[d]);
    };
    if (p.sinks) add(p.sinks[head], nullptr);
    for (int64_t cell = 0; cell < p.n_cells; cell++) {
      if (!sight.sees(int64_t(stream) * p.n_tokens + token, first + cell, layer.shape.cells_per_stream)) continue;
      const uint16_t* key = layer.row(Kind::key, first + cell) + size_t(kv_head) * key_dim;
      double score = 0;
      for (int d = 0; d < key_dim; d++) score += double(q[d]) * half_to_float(key[d]);
      score *= p.scale;
      if (p.softcap != 0) score = p.softcap * std::tanh(score / p.softcap);
      if (p.mask) score += slope * half_to_float(p.mask[stream * p.mask_stream + token * p.mask_token + cell]);
      add(score, layer.row(Kind::value, first + cell) + size_t(kv_head) * value_dim);
    }
    float* out = p.out + stream * p.out_stream + token * p.out_token + head * p.out_head;
    for (int d = 0; d < value_dim; d++) out[d] = sum > 0 ? float(acc[d] / sum) : 0;
  }

  std::map<int, Layer> layers_;
  std::vector<float> keys_;
  std::vector<int32_t> shifts_;
};

class PlainEngine : public Engine {
public:
  std::string kernels() const override { return "plain"; }
  std::string store_place(const Settings&) const override { return "nowhere"; }
  std::string refusal(const Settings& settings) const override {
    if (!settings.passthrough()) return "the plain engine keeps f16 rows: use bits=16";
    return refusal_of("settings");
  }
  std::string refusal(const LayerPlan&) const override { return refusal_of("layer"); }
  bool leaves_f16(const Settings&) const override { return false; }
  size_t side_bytes(const LayerPlan& plan, Kind kind) const override {
    return size_t(plan.shape.n_cells()) * plan.shape.n_kv_heads * plan.side(kind).head_dim * sizeof(uint16_t);
  }
  std::unique_ptr<KvCache> make_cache(const Settings&) override { return std::make_unique<PlainCache>(); }
};

}  // namespace

std::unique_ptr<Engine> make_engine(const HostDevice& device) {
  return device.backend == "CPU" ? std::make_unique<PlainEngine>() : nullptr;
}
std::string engine_names() {
  return "CPU";
}

}  // namespace thimble
