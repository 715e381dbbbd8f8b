// A buffer of a Thimble device. It wraps a buffer of the inner device: every tensor but the KV cache's is handed to
// that, so that the inner backend sees tensors of its own; tensors named cache_k_l<i> and cache_v_l<i> get the memory
// of their codes and are served by the engine's KvCache.
//
// A cache tensor does not say its head size, and llama.cpp allocates it before any graph exists. So memory is reserved
// for what CachePlanner takes the head size to be, and a layer is bound to its true shape when the first attention node
// over it is seen, which llama.cpp does while it makes the context.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "cache/cache_name.h"
#include "engine/kv_cache.h"
#include "engine/layer_plan.h"
#include "ggml-backend-impl.h"
#include "ggml.h"
#include "plugin/device.h"
#include "plugin/refused_cells.h"

namespace thimble {

/// The tensor that owns the memory of a view, through all views.
const ggml_tensor* root_of(const ggml_tensor* tensor);

/// What one cache tensor shows of its layer.
LayerGeometry geometry_of(Device& device, const ggml_tensor* tensor, const CacheName& name);

/// One layer of a KV cache as llama.cpp allocated it.
struct ManagedLayer {
  int index = 0;
  ggml_tensor* tensors[2] = {nullptr, nullptr};  // by Kind; set by init_tensor
  std::optional<LayerPlan> plan;                 // once bound
  RefusedCells refused;

  int64_t cells_per_stream() const { return tensors[0]->ne[1]; }
};

class KvBuffer {
public:
  KvBuffer(Device& device, ggml_backend_buffer_t inner) : device_(device), inner_(inner) {}
  ~KvBuffer();

  Device& device() const { return device_; }
  ggml_backend_buffer_t inner() const { return inner_; }
  KvCache& cache() { return *cache_; }

  /// The layer behind a tensor or a view of it, or null where the tensor is not a managed cache.
  static ManagedLayer* layer_of(const ggml_tensor* tensor, Kind* kind = nullptr);
  static KvBuffer* of(const ggml_tensor* tensor);

  /// Takes a cache tensor if its layer is coded. The first makes the cache, under the settings of that moment: throws
  /// as CachePlanner's constructor.
  bool add(ggml_tensor* tensor, const CacheName& name);
  /// Binds a layer to its head sizes. Throws std::runtime_error with what the user should change.
  void bind(ManagedLayer& layer, int key_dim, int value_dim, int n_kv_heads);
  /// By layer, those left f16 too.
  const std::map<int, LayerGeometry>& caches() const { return caches_; }
  const CachePlanner& planner() const { return *planner_; }
  bool all_bound() const;
  void add_to(PlanTotals& totals) const;
  bool is_reported() const { return is_reported_; }
  void set_reported() { is_reported_ = true; }

  /// Whether a graph has run on this cache. Until then what cannot be done is refused by an exception, which makes the
  /// making of the context fail; later it must not be thrown any more.
  bool in_use() const { return in_use_; }
  /// Called for each graph that uses the cache.
  void use();

  void clear(uint8_t value);
  void save(const ggml_tensor* tensor, uint8_t* data, size_t offset, size_t size);
  /// Rows that the cache refuses are said in the log. Where llama.cpp reads a file, the load then fails by an
  /// exception, on which it gives the sequence up. Elsewhere attention to their cells fails (RefusedCells): llama.cpp
  /// loads states that are in memory in a destructor, which no exception may leave.
  void load(const ggml_tensor* tensor, const uint8_t* data, size_t offset, size_t size);
  bool copy(const ggml_tensor* from, ggml_tensor* to);
  /// Loads the rows that came one by one and wait to be loaded together. Before anything else is done with the cache.
  void settle();
  /// Whether any cell holds a row that was refused.
  bool has_refused() const;

private:
  struct Rows {
    ManagedLayer* layer;
    Kind kind;
    int64_t first, count;
  };
  struct FreeBuffer {
    void operator()(ggml_backend_buffer_t buffer) const { ggml_backend_buffer_free(buffer); }
  };
  using Buffer = std::unique_ptr<ggml_backend_buffer, FreeBuffer>;

  uint8_t* memory_of(const ManagedLayer& layer, const LayerPlan& plan, Kind kind);
  Rows rows_of(const ggml_tensor* tensor, size_t offset, size_t size) const;
  void load_rows(ManagedLayer& layer, Kind kind, const std::vector<int64_t>& cells, const uint8_t* rows);

  Device& device_;
  ggml_backend_buffer_t inner_;
  std::vector<Buffer> more_;                     // where the reserved memory is too small (heads smaller than assumed)
  std::shared_ptr<const CachePlanner> planner_;  // null until there is a cache tensor
  std::unique_ptr<KvCache> cache_;               // null until one is coded
  std::map<int, ManagedLayer> layers_;
  std::unordered_map<const ggml_tensor*, CacheName> by_tensor_;
  std::map<int, LayerGeometry> caches_;
  bool is_reported_ = false;
  bool in_use_ = false;
  // llama.cpp loads a sequence whose cells are not adjacent row by row.
  struct Waiting {
    ManagedLayer* layer = nullptr;
    Kind kind = Kind::key;
    std::vector<int64_t> cells;
    std::vector<uint8_t> rows;
  } waiting_;
  bool said_refusal_ = false;  // since the last graph
  bool has_new_refusal_ = false;
  const uint8_t* last_data_ = nullptr;  // of the last load
};

/// The buffer of the cache that a node writes or reads, or null.
KvBuffer* buffer_of_cache(const ggml_tensor* node);

}  // namespace thimble
