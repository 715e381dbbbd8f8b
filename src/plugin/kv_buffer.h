// A buffer of a Thimble device. It wraps a buffer of the inner device. Tensors named cache_k_l<i> and cache_v_l<i> get
// memory for their codes, and the engine's KvCache serves them; all other tensors are handed to the inner buffer, so
// that the inner backend sees tensors of its own.
//
// A cache tensor does not say its head size, and llama.cpp allocates it before any graph exists. So memory is reserved
// for the head size that CachePlanner assumes, and a layer is bound to its true shape at the first attention node over
// it, which llama.cpp shows while it makes the context.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cache/cache_name.h"
#include "engine/kv_cache.h"
#include "engine/layer_plan.h"
#include "ggml-backend-impl.h"
#include "ggml.h"
#include "plugin/device.h"
#include "plugin/far_caches.h"
#include "plugin/refused_cells.h"
#include "plugin/row_parts.h"

namespace thimble {

/// The tensor that owns the memory of a view, through all views.
const ggml_tensor* root_of(const ggml_tensor* tensor);

/// The part of a layer's geometry that one cache tensor shows.
LayerGeometry geometry_of(Device& device, const ggml_tensor* tensor, const CacheName& name);

/// Bytes that a coded cache tensor takes in its buffer. One of another type than f16 takes no less than in that type:
/// a program at the far end of RPC has it left as it is.
size_t bytes_in_buffer(const LayerPlan& plan, const ggml_tensor* tensor, Kind kind);

/// The numbers of a row of one cache tensor that belong to one side of its layer.
struct RowPart {
  Kind kind;
  size_t first, n;
};

/// All of a row, or the two parts of a latent one, keys first.
std::vector<RowPart> row_parts(const LayerPlan& plan, Kind kind);

/// One layer of a KV cache as llama.cpp allocated it.
struct ManagedLayer {
  int index = 0;
  ggml_tensor* tensors[2] = {nullptr, nullptr};  // by Kind; set by init_tensor
  std::optional<LayerPlan> plan;                 // once bound
  PartOfRow parts[2];                            // by Kind; where the device has a part of the rows
  bool written[2] = {false, false};              // by Kind: whether a node was seen that writes this side
  int rotated[2] = {0, 0};                       // by Kind: LayerGeometry::rotated
  std::vector<float> query_norm, key_norm;       // LayerGeometry's
  bool norms_unread = false;                     // LayerGeometry's
  int latent = 0;                                // LayerGeometry's, where it has keys alone
  bool transposed = false;                       // values are [number][cell], as with flash attention off
  std::optional<uint64_t> unsupported_at;        // when flash attention was seen first that the inner device cannot do
  RefusedCells refused;

  int64_t cells_per_stream() const { return tensors[0]->ne[1]; }
};

class Calibration;

class KvBuffer {
public:
  /// `reserved`: where the buffer's memory is, of which the inner buffer has none then. Else null.
  KvBuffer(Device& device, ggml_backend_buffer_t inner, size_t size, std::unique_ptr<ReservedMemory> reserved)
      : device_(device), inner_(inner), size_(size), reserved_(std::move(reserved)), number_(device.count_buffer()) {}
  ~KvBuffer();

  Device& device() const { return device_; }
  ggml_backend_buffer_t inner() const { return inner_; }
  void* base() const { return reserved_ ? reserved_->base() : ggml_backend_buffer_get_base(inner_); }
  /// Sees to it that there is memory, of zeros where it is new. To be called before the inner buffer's functions are,
  /// or a graph. Throws as ReservedMemory::back does.
  void back(const void* data, size_t size);
  /// The same for a whole tensor.
  void back(const ggml_tensor* tensor);
  /// Buffers are numbered in the order in which they were made.
  uint64_t number() const { return number_; }
  KvCache& cache() { return *cache_; }

  /// The layer behind a tensor or a view of it, or null where the tensor is not a managed cache.
  static ManagedLayer* layer_of(const ggml_tensor* tensor, Kind* kind = nullptr);
  /// The buffer of a tensor or a view of it, or null where that is not a KvBuffer.
  static KvBuffer* of(const ggml_tensor* tensor);

  /// Gives a tensor to the inner buffer where it was placed in one of ours and is no coded cache. init_tensor does so
  /// for most; ggml's Meta device places what it copies between devices, and ggml's RPC every tensor, without it.
  static void hand_over(ggml_tensor* tensor);
  /// A copy of a tensor that is no coded cache, in the inner buffer; for functions of the inner backend.
  static ggml_tensor handed_over(const ggml_tensor* tensor);

  /// Takes a cache tensor; false where its layer is left f16. The first tensor makes the cache, with the settings that
  /// THIMBLE_KV has at that moment. Throws as CachePlanner's constructor does.
  bool add(ggml_tensor* tensor, const CacheName& name);
  /// Takes a cache tensor that llama.cpp made with another type than f16, and makes it and `view`, a view of it, f16.
  /// False where its layer keeps its type. llama.cpp asks tensors for their types, so from then on all is as with f16.
  bool add_of_other_type(ggml_tensor* tensor, ggml_tensor* view, const CacheName& name);
  /// Whether llama.cpp made a layer with a quantized type.
  bool was_quantized(int layer) const;
  /// The cache tensors of a program that uses this buffer over RPC.
  FarCaches& far() { return far_; }
  /// Takes such a cache tensor: codes it, or leaves its layer f16.
  void add_far(const ggml_tensor* tensor, const CacheName& name);
  /// Leaves a layer f16 that was taken but cannot be coded. Nothing may be in its cache yet.
  void leave_f16(int layer, const std::string& why);
  /// Loads the rows that were set before the layers were bound.
  void load_early();
  /// Binds a layer to its head sizes; `group` as in LayerGeometry. Throws std::runtime_error with a sentence that says
  /// what to change.
  void bind(ManagedLayer& layer, int key_dim, int value_dim, int n_kv_heads, int group);
  /// Binds a layer that has keys alone, which are values too (MLA), or choose the cells to attend to (`as_f16`).
  /// `group` as in LayerGeometry.
  void bind_keys_alone(ManagedLayer& layer, bool as_f16, int group);
  /// The caches by layer, those left f16 included.
  const std::map<int, LayerGeometry>& caches() const { return caches_; }
  /// Whether its layers have sliding windows: llama.cpp keeps those in a cache of their own.
  bool is_window() const { return !caches_.empty() && caches_.begin()->second.is_window; }
  /// Whether no further cache tensor fits. ggml makes a buffer for the sum of the sizes of its tensors.
  bool is_full() const { return size_ - used_ < least_; }
  const CachePlanner& planner() const { return *planner_; }
  bool all_bound() const;
  /// Whether the caches here stay f16 for a calibration, and the calibration, once a graph has run.
  bool calibrates() const { return planner_ && planner_->settings().calibrates(); }
  const std::shared_ptr<Calibration>& calibration() const { return calibration_; }
  void join(const std::shared_ptr<Calibration>& calibration) { calibration_ = calibration; }
  void add_to(PlanTotals& totals) const;
  bool is_reported() const { return is_reported_; }
  void set_reported() { is_reported_ = true; }

  /// Whether a graph has run on this cache. Before that, supports_op throws where a node is refused, so that llama.cpp
  /// cannot make the context; afterwards it must not throw.
  bool in_use() const { return in_use_; }
  /// Called for each graph that uses the cache.
  void use();
  /// Tells the user, once, that a node reads decoded rows (row_reader.h), which is slow.
  void tell_of_reading(const ggml_tensor* node);

  void clear(uint8_t value);
  void save(const ggml_tensor* tensor, uint8_t* data, size_t offset, size_t size);
  /// Loads saved rows. Rows that the cache refuses are reported in the log. Where llama.cpp reads a file, the load then
  /// throws, and llama.cpp gives the sequence up. Where it loads a state from memory it does so in a destructor, which
  /// no exception may leave; attention to the cells of such rows fails instead (RefusedCells).
  void load(const ggml_tensor* tensor, const uint8_t* data, size_t offset, size_t size);
  bool copy(const ggml_tensor* from, ggml_tensor* to);
  /// Loads the rows that came one by one and wait to be loaded together. To be called before any other use of the
  /// cache.
  void settle();
  /// Whether any cell holds a row that was refused.
  bool has_refused() const;

  /// The cache of this model's layers with sliding windows, or this one where there is none; null while neither is
  /// known. Guarded by the device (Device::is_window).
  const KvBuffer* window_cache = nullptr;

private:
  struct Rows {
    ManagedLayer* layer;
    Kind kind;
    int64_t first, count;
    int64_t number = -1;  // of a transposed cache: the one number of each row that is meant
  };
  struct FreeBuffer {
    void operator()(ggml_backend_buffer_t buffer) const { ggml_backend_buffer_free(buffer); }
  };
  using Buffer = std::unique_ptr<ggml_backend_buffer, FreeBuffer>;

  const ggml_tensor* cache_of(const ggml_tensor* tensor) const;
  void zero(void* data, size_t size);
  void fill(void* data, size_t size, uint8_t value);
  static void set_heads(const ManagedLayer& layer, LayerGeometry& geometry);
  void make_layer(ManagedLayer& layer, LayerGeometry geometry);
  uint8_t* memory_of(const ManagedLayer& layer, const LayerPlan& plan, Kind kind);
  Rows rows_of(const ggml_tensor* tensor, size_t offset, size_t size) const;
  static bool is_unused(const ggml_tensor* tensor);
  static bool is_never_written(const Rows& rows);
  void save_rows(const Rows& rows, uint8_t* data);
  void save_numbers(const Rows& rows, uint8_t* data);
  void load_numbers(const Rows& rows, const uint8_t* data, bool comes_again);
  void throw_of_refusal(bool comes_again);
  void load_rows(ManagedLayer& layer, Kind kind, const std::vector<int64_t>& cells, const uint8_t* rows);
  void read_cells(const Rows& rows, uint8_t* data);
  RefusedRows write_cells(const ManagedLayer& layer, Kind kind, const std::vector<int64_t>& cells, const uint8_t* rows);

  Device& device_;
  ggml_backend_buffer_t inner_;
  size_t size_;
  std::unique_ptr<ReservedMemory> reserved_;
  uint64_t number_;
  std::vector<Buffer> more_;                     // memory of layers whose heads are smaller than assumed
  std::shared_ptr<const CachePlanner> planner_;  // null until there is a cache tensor
  std::unique_ptr<KvCache> cache_;               // null until there is a coded cache tensor
  std::map<int, ManagedLayer> layers_;
  std::unordered_map<const ggml_tensor*, CacheName> by_tensor_;
  std::map<int, LayerGeometry> caches_;
  size_t used_ = 0, least_ = 0;               // bytes that the cache tensors take, and that the smallest takes
  std::shared_ptr<Calibration> calibration_;  // that of the context, which ends with its last buffer
  FarCaches far_;
  std::map<int, std::string> left_;  // why layers were left f16 by leave_f16
  bool is_reported_ = false;
  bool in_use_ = false;
  bool told_of_reading_ = false;
  bool told_of_type_ = false;
  std::map<int, ggml_type> types_;                               // of layers that llama.cpp made with another type
  std::unordered_map<const ggml_tensor*, size_t> stream_bytes_;  // of tensors of another type than f16, in that type
  // Rows that wait to be loaded together: llama.cpp loads a sequence row by row where its cells are not adjacent, and
  // number by number where values are transposed.
  struct Waiting {
    ManagedLayer* layer = nullptr;
    Kind kind = Kind::key;
    std::vector<int64_t> cells;
    std::vector<uint8_t> rows;
    int64_t number = -1;                         // of a transposed cache: that came last
    std::unordered_map<int64_t, size_t> places;  // of a transposed cache: of a cell's row in `rows`
  } waiting_;
  // Rows of a transposed cache that are being saved, number by number, by their first cell and how many they are.
  struct Saved {
    const ManagedLayer* layer = nullptr;
    std::map<std::pair<int64_t, int64_t>, std::vector<uint8_t>> rows;
  } saved_;
  bool said_refusal_ = false;  // a refused row was reported since the last graph
  bool has_new_refusal_ = false;
  const uint8_t* last_data_ = nullptr;  // of the last load
};

/// The buffer of the cache that a node writes or reads, or null.
KvBuffer* buffer_of_cache(const ggml_tensor* node);

}  // namespace thimble
