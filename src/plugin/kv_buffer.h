// The buffer type of a Thimble device. It wraps the inner device's: every tensor but the KV cache's is handed to the
// inner buffer, so that the inner backend sees tensors of its own; tensors named cache_k_l<i> and cache_v_l<i> get the
// memory of their codes and are served by a CacheLayer.
//
// A cache tensor does not say its head size, and llama.cpp allocates it before any graph exists. So memory is reserved
// for the head size that the profile tells or else `kAssumedHeadDim`, and a layer is bound to its true shape when the
// first attention node over it is seen, which llama.cpp does while it makes the context.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "cache/layer.h"
#include "ggml-backend-impl.h"
#include "ggml.h"
#include "plugin/codec_source.h"
#include "plugin/device_cache.h"
#include "plugin/settings.h"

namespace thimble {

/// The name of a cache tensor, taken apart.
struct CacheName {
  Kind kind;
  int layer;
};
std::optional<CacheName> parse_cache_name(const char* name);

/// The tensor that owns the memory of a view, through all views.
const ggml_tensor* root_of(const ggml_tensor* tensor);

/// One layer of a KV cache as llama.cpp allocated it.
struct ManagedLayer {
  int index = 0;
  ggml_tensor* tensors[2] = {nullptr, nullptr};  // by Kind; set by init_tensor
  bool bound = false;
  std::unique_ptr<CacheLayer> cache;  // once bound, where the cache is in RAM
  int top = 0;                        // cells to retrieve; above 0, the cache has exact stores
  bool drop_tail = false;
  std::vector<uint8_t> own_memory[2];  // where the reserved memory is too small (heads under kAssumedHeadDim)
  // By Kind: cells last loaded from a state of other settings, and the rows as they came, which is how they are saved.
  std::map<int64_t, std::vector<uint8_t>> refused[2];
};

class KvBuffer {
public:
  /// `device_cache`: null for a cache in RAM.
  KvBuffer(ggml_backend_buffer_t inner, Settings settings, std::shared_ptr<const CodecSource> source,
           std::unique_ptr<DeviceCache> device_cache);
  ~KvBuffer();

  ggml_backend_buffer_t inner() const { return inner_; }
  const Settings& settings() const { return settings_; }
  DeviceCache* device_cache() const { return device_cache_.get(); }

  /// The layer behind a tensor or a view of it, or null where the tensor is not a managed cache.
  static ManagedLayer* layer_of(const ggml_tensor* tensor, Kind* kind = nullptr);
  static KvBuffer* of(const ggml_tensor* tensor);

  /// Binds a layer to its head sizes. Throws std::runtime_error with what the user should change.
  void bind(ManagedLayer& layer, int key_dim, int value_dim, int n_kv_heads);

  void add(ggml_tensor* tensor, const CacheName& name);
  void clear(uint8_t value);
  void save(const ggml_tensor* tensor, uint8_t* data, size_t offset, size_t size);
  /// Rows of other settings are refused by a line in the log and by failing to attend to their cells: llama.cpp loads
  /// states in a destructor, out of which no exception gets.
  void load(const ggml_tensor* tensor, const uint8_t* data, size_t offset, size_t size);
  bool copy(const ggml_tensor* from, ggml_tensor* to);
  /// On a device: loads the rows that came one by one and wait to be loaded together. Before anything else is done with
  /// the cache.
  void settle();
  /// Whether any cell holds a row that was refused.
  bool has_refused() const;

  /// Whether a graph has run on this cache. Until then what cannot be done is refused by an exception, which makes the
  /// making of the context fail; later it must not be thrown any more.
  bool in_use() const { return in_use_; }
  /// Called for each graph that uses the cache; the first logs what the cache is.
  void use(const char* kernels);

private:
  struct Rows {
    ManagedLayer* layer;
    Kind kind;
    int64_t first, count;
  };
  bool in_file() const { return settings_.store == Settings::Store::file; }
  Rows rows_of(const ggml_tensor* tensor, size_t offset, size_t size) const;
  void load_on_device(ManagedLayer& layer, Kind kind, const std::vector<int64_t>& cells, const uint8_t* rows);
  void bind_in_ram(ManagedLayer& layer, int key_dim, int value_dim, int n_kv_heads);
  void bind_on_device(ManagedLayer& layer, int key_dim, int value_dim, int n_kv_heads);
  Format checked_format(const ManagedLayer& layer, Kind kind, int head_dim, const CacheShape& shape) const;

  ggml_backend_buffer_t inner_;
  Settings settings_;
  std::shared_ptr<const CodecSource> source_;
  std::unique_ptr<DeviceCache> device_cache_;
  std::map<int, ManagedLayer> layers_;
  std::unordered_map<const ggml_tensor*, CacheName> by_tensor_;
  size_t bound_bytes_ = 0, store_bytes_ = 0;
  bool in_use_ = false;
  // llama.cpp loads a sequence whose cells are not adjacent row by row.
  struct Waiting {
    ManagedLayer* layer = nullptr;
    Kind kind = Kind::key;
    std::vector<int64_t> cells;
    std::vector<uint8_t> rows;
  } waiting_;
  bool said_refusal_ = false;  // since the last graph
};

/// Whether a cache tensor of this shape is coded under these settings (else it stays f16 in the inner buffer).
bool is_managed(const ggml_tensor* tensor, const Settings& settings, bool on_cpu);

/// The buffer type of a device that wraps `inner`. Lives as long as the process.
ggml_backend_buffer_type_t kv_buffer_type(ggml_backend_dev_t device, ggml_backend_dev_t inner);
bool is_kv_buffer_type(ggml_backend_buffer_type_t type);

}  // namespace thimble
