// What becomes of each layer of a KV cache under the settings: computed here, once, and read by all who size, make or
// report a cache.
#pragma once

#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "cache/layer.h"
#include "engine/codec_source.h"
#include "engine/settings.h"

namespace thimble {

class Engine;

/// What is known of a layer's cache: a tensor of `width` numbers a cell for its keys and one for its values. llama.cpp
/// allocates both before it says how many heads they hold: then n_kv_heads is 0, and the head sizes are taken from the
/// profile or assumed.
struct LayerGeometry {
  int layer = 0;
  int64_t width[2] = {0, 0};  // by Kind; 0: there is none
  int head_dim[2] = {0, 0};
  int n_kv_heads = 0;
  int64_t cells_per_stream = 0;
  int n_streams = 1;
  bool is_window = false;  // of a sliding window
};

struct LayerPlan {
  int layer = 0;
  bool coded = false;   // the engine keeps it (at 16 bits as f16 rows of its own)
  std::string why_f16;  // where not: the rest but f16_bytes is empty then
  CacheShape shape;
  Format format[2];                  // by Kind
  bool has_codes[2] = {true, true};  // values of which only exact rows are read need none
  WindowSize window;
  int top = 0;  // cells to retrieve; above 0, the layer has an exact store
  bool drop_tail = false;
  size_t bytes[2] = {0, 0};  // of memory, by Kind
  size_t more_bytes = 0;     // that the exact rows of further sequences may take besides
  size_t store_bytes = 0;    // of the exact store, where there is one, at most
  size_t f16_bytes = 0;      // that an f16 cache takes

  const Format& side(Kind kind) const { return format[int(kind)]; }
};

/// One codec a KV head, by Kind.
struct LayerCodecs {
  std::shared_ptr<const std::vector<HeadCodec>> sides[2];
  const std::vector<HeadCodec>& of(Kind kind) const { return *sides[int(kind)]; }
};

/// The settings of a cache, read once, and what follows from them for one engine.
class CachePlanner {
public:
  /// Throws std::invalid_argument or std::runtime_error with a sentence where the settings are wrong, the profile
  /// cannot be read or the engine cannot serve them. `engine` must outlive the planner.
  CachePlanner(const Engine& engine, const Settings& settings);

  const Settings& settings() const { return settings_; }
  /// Names everything that saved codes depend on.
  uint64_t hash() const { return source_->hash(); }

  /// Why a layer of this many cells is left f16, or nothing where it is coded.
  std::string why_f16(const LayerGeometry& geometry) const;
  /// Throws std::runtime_error where the layer's heads are known and cannot be coded, or the profile is of another
  /// model.
  LayerPlan plan(const LayerGeometry& geometry) const;
  /// Of a layer whose heads are known.
  LayerCodecs codecs(const LayerPlan& plan) const;

private:
  const Engine& engine_;
  Settings settings_;
  std::shared_ptr<const CodecSource> source_;
};

/// "12.34 MiB"
std::string mebibytes(size_t bytes);

/// What all layers come to.
struct PlanTotals {
  int n_coded = 0, n_f16 = 0, n_retrieving = 0;
  size_t coded_bytes = 0;      // of the coded layers
  size_t coded_f16_bytes = 0;  // that those would take as f16
  size_t f16_bytes = 0;        // of the layers left f16
  size_t more_bytes = 0, store_bytes = 0;
  std::string why_f16;   // of the first layer left f16
  std::set<int> layers;  // all of these

  void add(const LayerPlan& plan);
};

}  // namespace thimble
