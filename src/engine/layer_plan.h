// How each layer of a KV cache is kept under the settings: whether it is coded, its formats, its bytes. Computed here,
// once, and read by all code that sizes, makes or reports a cache.
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
  // Where devices share a layer's KV heads: the first one here, and how many the layer has; else 0.
  int first_head = 0, heads_of_layer = 0;
  int64_t cells_per_stream = 0;
  int n_streams = 1;
  bool is_window = false;  // of a sliding window
  // By Kind: the host program rotates heads by a Walsh-Hadamard matrix in blocks of so many numbers; 0: it does not.
  int rotated[2] = {0, 0};
  // The weights that the model multiplies normalized queries and keys by, for one head or for all of them; empty: it
  // does not, or they are not known.
  std::vector<float> query_norm, key_norm;
  bool norms_unread = false;  // the model has such weights, and they cannot be read
  bool as_f16 = false;  // the engine keeps its rows as f16, whatever the settings say: few rows that choose others
  int group = 0;        // query heads of a KV head; 0: attention over the layer is no one node
  int latent = 0;       // of the numbers of a row that keys and values share (MLA): the first ones, which RoPE leaves
};

/// Cuts a row that is no whole number of known heads, such as the row of a cell that keys and values share (MLA), into
/// heads for the codec: the size of each.
int piece_of_row(int64_t width);

struct LayerPlan {
  int layer = 0;
  bool coded = false;   // the engine keeps the layer (with bits=16 as f16 blocks)
  std::string why_f16;  // why the layer is not coded; all that follows but f16_bytes is empty then
  CacheShape shape;
  Format format[2];  // by Kind; the values' head_dim is 0 where the layer has keys alone
  /// LayerGeometry::latent. Above 0, the values' side has these numbers, and the keys' side those behind them; a query
  /// is multiplied with both.
  int latent = 0;
  HeadRange heads;          // that are here
  bool as_f16 = false;      // LayerGeometry::as_f16
  int rotated[2] = {0, 0};  // LayerGeometry::rotated
  int group = 0;            // LayerGeometry::group
  bool as_rows = false;     // the host program attends to decoded rows (Engine::attends)
  /// By KV head: what keys are multiplied by before they are coded without a profile (key_stretch); empty: by nothing.
  std::vector<std::vector<float>> key_stretches;
  bool norms_unread = false;         // LayerGeometry::norms_unread, where keys would have been stretched
  std::vector<uint64_t> hashes;      // by KV head, of everything that its codes depend on, for saved states
  bool has_codes[2] = {true, true};  // values have none with tail=drop, as only their exact rows are read
  WindowSize window;
  int top = 0;  // cells to retrieve; above 0, the layer has an exact store
  bool drop_tail = false;
  std::string why_slow;      // why it takes slower kernels than other formats; else empty
  size_t bytes[2] = {0, 0};  // of memory that a side takes from the start, by Kind
  size_t more_bytes = 0;     // that the exact rows of further sequences may take in addition
  size_t store_bytes = 0;    // that the exact store may take; 0 where there is none
  size_t f16_bytes = 0;      // that an f16 cache would take

  const Format& side(Kind kind) const { return format[int(kind)]; }
  bool keys_alone() const { return format[int(Kind::value)].head_dim == 0; }
};

/// One codec a KV head, by Kind.
struct LayerCodecs {
  std::shared_ptr<const std::vector<HeadCodec>> sides[2];
  const std::vector<HeadCodec>& of(Kind kind) const { return *sides[int(kind)]; }
};

/// Plans the layers of a cache, from its settings and for one engine.
class CachePlanner {
public:
  /// Throws std::invalid_argument or std::runtime_error with a sentence where the settings are wrong, the profile
  /// cannot be read or the engine cannot serve them. `engine` must outlive the planner.
  CachePlanner(const Engine& engine, const Settings& settings);

  const Settings& settings() const { return settings_; }
  /// Why a layer is left f16, as half a sentence; "" where it is coded.
  std::string why_f16(const LayerGeometry& geometry) const;
  /// Throws std::runtime_error where the layer's heads are known and cannot be coded, or the profile is of another
  /// model.
  LayerPlan plan(const LayerGeometry& geometry) const;
  /// Numbers of a row of one side in the model that the profile was made for, all heads; 0 where that is not known.
  int64_t row_of_profile(int layer, Kind kind) const;
  /// The codecs of a layer whose heads are known.
  LayerCodecs codecs(const LayerPlan& plan) const;

private:
  void plan_latent(const LayerGeometry& geometry, LayerPlan& plan) const;

  const Engine& engine_;
  Settings settings_;
  std::shared_ptr<const CodecSource> source_;
};

/// "12.34 MiB"
std::string mebibytes(size_t bytes);

/// The sums of the plans of all layers.
struct PlanTotals {
  int n_coded = 0, n_f16 = 0, n_retrieving = 0, n_slow = 0, n_norms_unread = 0;
  size_t coded_bytes = 0;      // of the coded layers
  size_t coded_f16_bytes = 0;  // that the coded layers would take as f16
  size_t f16_bytes = 0;        // of the layers left f16
  size_t more_bytes = 0, store_bytes = 0;
  std::string why_f16;   // of the first layer left f16
  std::string why_slow;  // of the first layer that takes slower kernels
  std::set<int> layers;  // all layers that were added, and those of other devices

  void add(const LayerPlan& plan);
};

}  // namespace thimble
