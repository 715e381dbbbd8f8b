#include "plugin/kv_buffer.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "cache/state_row.h"
#include "ggml-impl.h"

namespace thimble {
namespace {

// Scales are one a head, so the memory of codes depends (a little) on the head size.
constexpr int kAssumedHeadDim = 64;

struct BufferTypeContext {
  ggml_backend_buffer_type_t inner;
  ggml_backend_dev_t inner_device;
  std::string name;
};

BufferTypeContext& context_of(ggml_backend_buffer_type_t type) {
  return *static_cast<BufferTypeContext*>(type->context);
}
KvBuffer& context_of(ggml_backend_buffer_t buffer) {
  return *static_cast<KvBuffer*>(buffer->context);
}

int window_slots(const Settings& settings, int64_t cells_per_stream, int64_t n_streams, bool on_cpu) {
  const WindowSize& window = settings.window;
  if (settings.passthrough()) return 0;
  if (on_cpu) return window.slots() * int(n_streams);
  const int slots = Window::slots_of_stream(window, cells_per_stream, int(n_streams));
  return std::min(slots + DeviceCache::kInFlightRows, DeviceCache::kMaxRows) * int(n_streams);
}

// Values of which only the window and retrieved cells are read need no codes.
bool is_coded(Kind kind, int layer, const Settings& settings, const CodecSource& source) {
  return kind == Kind::key || !settings.drop_tail || !source.retrieves(layer);
}

// Memory to reserve for a cache tensor, and to report as the size of its cache.
size_t reserved_bytes(const ggml_tensor* tensor, const CacheName& name, const Settings& settings,
                      const CodecSource& source, bool on_cpu) {
  const int64_t width = tensor->ne[0];
  const int assumed = width % kAssumedHeadDim == 0 ? kAssumedHeadDim : int(width & -width);
  const int head_dim = std::clamp(source.head_dim(name.layer, name.kind).value_or(assumed), 2, kMaxHeadDim);
  const Format format = source.format(name.layer, name.kind, head_dim);
  const CacheShape shape{int(width / format.head_dim), tensor->ne[1], int(tensor->ne[2])};
  // In RAM the exact store has the window's rows, too.
  const int n_slots = on_cpu && source.retrieves(name.layer)
                          ? 0
                          : window_slots(settings, shape.cells_per_stream, shape.n_streams, on_cpu);
  return CacheSide::memory_bytes(shape, format, n_slots, is_coded(name.kind, name.layer, settings, source));
}

// ---- buffer

void buffer_free(ggml_backend_buffer_t buffer) {
  delete &context_of(buffer);
}

void* buffer_base(ggml_backend_buffer_t buffer) {
  return ggml_backend_buffer_get_base(context_of(buffer).inner());
}

ggml_status buffer_init_tensor(ggml_backend_buffer_t buffer, ggml_tensor* tensor) {
  KvBuffer& kv = context_of(buffer);
  if (tensor->view_src) {
    // Views of caches stay ours; views of anything else have the inner buffer already, from their source.
    return GGML_STATUS_SUCCESS;
  }
  if (const auto name = parse_cache_name(tensor->name)) {
    if (tensor->type != GGML_TYPE_F16) {
      GGML_LOG_ERROR(
          "thimble: cache type %s: Thimble codes the cache itself; leave --cache-type-k and --cache-type-v at f16\n",
          ggml_type_name(tensor->type));
      return GGML_STATUS_FAILED;
    }
    if (is_managed(tensor, kv.settings(), !kv.device_cache())) {
      kv.add(tensor, *name);
      return GGML_STATUS_SUCCESS;
    }
  }
  tensor->buffer = kv.inner();
  // llama.cpp marks weight buffers as such after their tensors were handed to the inner buffer, which it cannot see.
  const std::string_view name = tensor->name;
  if (tensor->op == GGML_OP_NONE && name.ends_with(".weight")) {
    ggml_backend_buffer_set_usage(kv.inner(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
  }
  return kv.inner()->iface.init_tensor ? kv.inner()->iface.init_tensor(kv.inner(), tensor) : GGML_STATUS_SUCCESS;
}

// Tensors that a caller placed here without init_tensor (ggml's Meta device does) are the inner buffer's all the same.
ggml_backend_buffer_t inner_of_unmanaged(ggml_backend_buffer_t buffer, const ggml_tensor* tensor) {
  return KvBuffer::layer_of(tensor) ? nullptr : context_of(buffer).inner();
}

void buffer_memset(ggml_backend_buffer_t buffer, ggml_tensor* tensor, uint8_t value, size_t offset, size_t size) {
  if (auto* inner = inner_of_unmanaged(buffer, tensor)) {
    return inner->iface.memset_tensor(inner, tensor, value, offset, size);
  }
  const std::vector<uint8_t> data(size, value);
  context_of(buffer).load(tensor, data.data(), offset, size);
}

void buffer_set(ggml_backend_buffer_t buffer, ggml_tensor* tensor, const void* data, size_t offset, size_t size) {
  if (auto* inner = inner_of_unmanaged(buffer, tensor)) {
    return inner->iface.set_tensor(inner, tensor, data, offset, size);
  }
  context_of(buffer).load(tensor, static_cast<const uint8_t*>(data), offset, size);
}

void buffer_get(ggml_backend_buffer_t buffer, const ggml_tensor* tensor, void* data, size_t offset, size_t size) {
  if (auto* inner = inner_of_unmanaged(buffer, tensor)) {
    return inner->iface.get_tensor(inner, tensor, data, offset, size);
  }
  context_of(buffer).save(tensor, static_cast<uint8_t*>(data), offset, size);
}

bool buffer_copy(ggml_backend_buffer_t buffer, const ggml_tensor* from, ggml_tensor* to) {
  if (auto* inner = inner_of_unmanaged(buffer, to)) {
    return inner->iface.cpy_tensor && !KvBuffer::of(from) && inner->iface.cpy_tensor(inner, from, to);
  }
  return context_of(buffer).copy(from, to);
}

void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
  context_of(buffer).clear(value);
}

constexpr ggml_backend_buffer_i kBufferInterface = {
    /* .free_buffer   = */ buffer_free,
    /* .get_base      = */ buffer_base,
    /* .init_tensor   = */ buffer_init_tensor,
    /* .memset_tensor = */ buffer_memset,
    /* .set_tensor    = */ buffer_set,
    /* .get_tensor    = */ buffer_get,
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ buffer_copy,
    /* .clear         = */ buffer_clear,
    /* .reset         = */ nullptr,
};

// ---- buffer type

const char* type_name(ggml_backend_buffer_type_t type) {
  return context_of(type).name.c_str();
}

ggml_backend_buffer_t type_alloc(ggml_backend_buffer_type_t type, size_t size) {
  try {
    auto settings = Settings::from_environment();
    auto source = codec_source(settings);
    auto device_cache = make_device_cache(context_of(type).inner_device, settings);
    ggml_backend_buffer_t inner = ggml_backend_buft_alloc_buffer(context_of(type).inner, size);
    if (!inner) return nullptr;
    return ggml_backend_buffer_init(
        type, kBufferInterface, new KvBuffer(inner, std::move(settings), std::move(source), std::move(device_cache)),
        size);
  } catch (const std::exception& error) {
    GGML_LOG_ERROR("thimble: %s\n", error.what());
    return nullptr;
  }
}

size_t type_alignment(ggml_backend_buffer_type_t type) {
  return ggml_backend_buft_get_alignment(context_of(type).inner);
}
size_t type_max_size(ggml_backend_buffer_type_t type) {
  return ggml_backend_buft_get_max_size(context_of(type).inner);
}

size_t type_alloc_size(ggml_backend_buffer_type_t type, const ggml_tensor* tensor) {
  try {
    const auto name = tensor->view_src ? std::nullopt : parse_cache_name(tensor->name);
    if (name && tensor->type == GGML_TYPE_F16) {
      const Settings settings = Settings::from_environment();
      const bool on_cpu = is_cpu(context_of(type).inner_device);
      if (is_managed(tensor, settings, on_cpu))
        return reserved_bytes(tensor, *name, settings, *codec_source(settings), on_cpu);
    }
  } catch (const std::exception&) {
    // Said by type_alloc, which can refuse; here the nominal size does.
  }
  return ggml_backend_buft_get_alloc_size(context_of(type).inner, tensor);
}

}  // namespace

std::optional<CacheName> parse_cache_name(const char* name) {
  CacheName result{};
  char kind = 0;
  int end = 0;
  if (std::sscanf(name, "cache_%c_l%d%n", &kind, &result.layer, &end) != 2 || name[end] != '\0') return std::nullopt;
  if (kind != 'k' && kind != 'v') return std::nullopt;
  result.kind = kind == 'k' ? Kind::key : Kind::value;
  return result;
}

const ggml_tensor* root_of(const ggml_tensor* tensor) {
  while (tensor->view_src) tensor = tensor->view_src;
  return tensor;
}

bool is_managed(const ggml_tensor* tensor, const Settings& settings, bool on_cpu) {
  return tensor->ne[1] > settings.small_cells && (on_cpu || !settings.passthrough());
}

KvBuffer::KvBuffer(ggml_backend_buffer_t inner, Settings settings, std::shared_ptr<const CodecSource> source,
                   std::unique_ptr<DeviceCache> device_cache)
    : inner_(inner),
      settings_(std::move(settings)),
      source_(std::move(source)),
      device_cache_(std::move(device_cache)) {}

KvBuffer::~KvBuffer() {
  device_cache_.reset();
  ggml_backend_buffer_free(inner_);
}

KvBuffer* KvBuffer::of(const ggml_tensor* tensor) {
  const ggml_tensor* root = root_of(tensor);
  if (!root->buffer || root->buffer->iface.get_base != buffer_base) return nullptr;
  return &context_of(root->buffer);
}

ManagedLayer* KvBuffer::layer_of(const ggml_tensor* tensor, Kind* kind) {
  KvBuffer* buffer = of(tensor);
  if (!buffer) return nullptr;
  const auto it = buffer->by_tensor_.find(root_of(tensor));
  if (it == buffer->by_tensor_.end()) return nullptr;
  if (kind) *kind = it->second.kind;
  return &buffer->layers_.at(it->second.layer);
}

void KvBuffer::add(ggml_tensor* tensor, const CacheName& name) {
  ManagedLayer& layer = layers_[name.layer];
  layer.index = name.layer;
  layer.tensors[int(name.kind)] = tensor;
  by_tensor_[tensor] = name;
}

void KvBuffer::bind(ManagedLayer& layer, int key_dim, int value_dim, int n_kv_heads) {
  if (layer.bound) return;
  const std::string where = "layer " + std::to_string(layer.index) + ": ";
  for (Kind kind : {Kind::key, Kind::value}) {
    const int dim = kind == Kind::key ? key_dim : value_dim;
    const ggml_tensor* tensor = layer.tensors[int(kind)];
    if (!tensor || tensor->ne[0] != int64_t(dim) * n_kv_heads) {
      throw std::runtime_error(
          where +
          "this model's cache has no plain keys and values (MLA or the like), which Thimble cannot "
          "code; run it without the THIMBLE device (--device none, or thimble --kv f16)");
    }
  }
  device_cache_ ? bind_on_device(layer, key_dim, value_dim, n_kv_heads)
                : bind_in_ram(layer, key_dim, value_dim, n_kv_heads);
  layer.bound = true;
}

Format KvBuffer::checked_format(const ManagedLayer& layer, Kind kind, int head_dim, const CacheShape& shape) const {
  const Format format = source_->format(layer.index, kind, head_dim);
  if (!state_row_fits(shape, format)) {
    throw std::runtime_error("layer " + std::to_string(layer.index) + ": heads of size " + std::to_string(head_dim) +
                             " are too small to code; use bits=16 or run without the THIMBLE device");
  }
  return format;
}

void KvBuffer::bind_on_device(ManagedLayer& layer, int key_dim, int value_dim, int n_kv_heads) {
  std::shared_ptr<const std::vector<HeadCodec>> codecs[2];
  uint8_t* memory[2];
  size_t bytes = 0;
  const ggml_tensor* keys = layer.tensors[int(Kind::key)];
  const CacheShape shape{n_kv_heads, keys->ne[1], int(keys->ne[2])};
  for (Kind kind : {Kind::key, Kind::value}) {
    const int dim = kind == Kind::key ? key_dim : value_dim;
    const ggml_tensor* tensor = layer.tensors[int(kind)];
    const Format format = checked_format(layer, kind, dim, shape);
    const int n_slots = window_slots(settings_, shape.cells_per_stream, shape.n_streams, /*on_cpu=*/false);
    const size_t needed =
        CacheSide::memory_bytes(shape, format, n_slots, is_coded(kind, layer.index, settings_, *source_));
    if (needed > reserved_bytes(tensor, {kind, layer.index}, settings_, *source_, /*on_cpu=*/false)) {
      throw std::runtime_error("layer " + std::to_string(layer.index) + ": heads of size " + std::to_string(dim) +
                               " cannot be coded on this device; use bits=16 or device=CPU");
    }
    bytes += needed;
    codecs[int(kind)] = source_->codecs(layer.index, kind, dim, n_kv_heads);
    memory[int(kind)] = static_cast<uint8_t*>(tensor->data);
  }
  layer.top = source_->retrieves(layer.index) ? settings_.top : 0;
  layer.drop_tail = settings_.drop_tail;
  store_bytes_ += device_cache_->bind(layer.index, shape, *codecs[int(Kind::key)], *codecs[int(Kind::value)], memory,
                                      layer.top > 0, is_coded(Kind::value, layer.index, settings_, *source_));
  bound_bytes_ += bytes;
}

void KvBuffer::bind_in_ram(ManagedLayer& layer, int key_dim, int value_dim, int n_kv_heads) {
  const auto make_side = [&](Kind kind) {
    const int dim = kind == Kind::key ? key_dim : value_dim;
    const ggml_tensor* tensor = layer.tensors[int(kind)];
    const CacheShape shape{n_kv_heads, tensor->ne[1], int(tensor->ne[2])};
    const Format format = checked_format(layer, kind, dim, shape);
    auto codecs = source_->codecs(layer.index, kind, dim, n_kv_heads);
    std::unique_ptr<ExactStore> store;
    if (source_->retrieves(layer.index)) {
      store = in_file() ? ExactStore::file(settings_.path, shape.n_cells(), tensor->ne[0])
                        : ExactStore::ram(shape.n_cells(), tensor->ne[0]);
      store_bytes_ += store->total_bytes();
    }
    const int n_slots = store ? 0 : window_slots(settings_, shape.cells_per_stream, shape.n_streams, /*on_cpu=*/true);
    const bool coded = is_coded(kind, layer.index, settings_, *source_);
    const size_t bytes = CacheSide::memory_bytes(shape, format, n_slots, coded);
    uint8_t* memory = static_cast<uint8_t*>(tensor->data);
    if (bytes > reserved_bytes(tensor, {kind, layer.index}, settings_, *source_, /*on_cpu=*/true)) {
      layer.own_memory[int(kind)].assign(bytes, 0);
      memory = layer.own_memory[int(kind)].data();
    }
    bound_bytes_ += bytes;
    return CacheSide(shape, std::move(codecs), n_slots, memory, std::move(store), coded);
  };
  CacheSide keys = make_side(Kind::key), values = make_side(Kind::value);
  layer.top = keys.store() ? settings_.top : 0;
  layer.drop_tail = settings_.drop_tail;
  const int n_streams = keys.shape().n_streams;
  const int64_t cells = keys.shape().cells_per_stream;
  WindowSize window = settings_.window;
  // A state of exact rows does not say which cells were not coded yet, and what matters most is retrieved.
  if (keys.store()) window.spare = window.pool = 0;
  const int max_slots = settings_.passthrough() ? 0 : Window::slots_of_stream(window, cells, n_streams) * n_streams;
  layer.cache =
      std::make_unique<CacheLayer>(std::move(keys), std::move(values), Window(window, max_slots, cells, n_streams));
}

void KvBuffer::use(const char* kernels) {
  said_refusal_ = false;
  if (in_use_) return;
  in_use_ = true;
  size_t f16_bytes = 0;
  for (const auto& [index, layer] : layers_) {
    for (const ggml_tensor* tensor : layer.tensors) f16_bytes += tensor ? ggml_nbytes(tensor) : 0;
  }
  GGML_LOG_INFO("thimble: KV cache of %zu layers: %.2f MiB, %.2f MiB as f16; %s; %s kernels\n", layers_.size(),
                double(bound_bytes_) / (1 << 20), double(f16_bytes) / (1 << 20), settings_.to_string().c_str(),
                kernels);
  if (store_bytes_ > 0) {
    const auto n =
        std::count_if(layers_.begin(), layers_.end(), [](const auto& layer) { return layer.second.top > 0; });
    GGML_LOG_INFO("thimble: exact store of %d layers: up to %.2f MiB in %s\n", int(n), double(store_bytes_) / (1 << 20),
                  in_file()       ? settings_.path.c_str()
                  : device_cache_ ? "pinned RAM"
                                  : "RAM");
  }
}

void KvBuffer::clear(uint8_t value) {
  if (inner_->size > 0) ggml_backend_buffer_clear(inner_, value);
  waiting_ = {};
  if (device_cache_) device_cache_->clear();
  for (auto& [index, layer] : layers_) {
    if (layer.cache) layer.cache->clear();
    for (auto& cells : layer.refused) cells.clear();
    for (auto& memory : layer.own_memory) std::fill(memory.begin(), memory.end(), value);
  }
}

// llama.cpp saves and loads whole rows of stream views; `offset` counts nominal f16 bytes.
KvBuffer::Rows KvBuffer::rows_of(const ggml_tensor* tensor, size_t offset, size_t size) const {
  Rows rows{};
  rows.layer = layer_of(tensor, &rows.kind);
  const size_t row_bytes = root_of(tensor)->nb[1];
  const size_t from = tensor->view_offs + offset;
  if (!rows.layer || !(device_cache_ ? rows.layer->bound : rows.layer->cache != nullptr) || from % row_bytes != 0 ||
      size % row_bytes != 0) {
    throw std::runtime_error(std::string("tensor ") + tensor->name +
                             ": a coded cache can be read and written by whole rows only");
  }
  rows.first = int64_t(from / row_bytes);
  rows.count = int64_t(size / row_bytes);
  return rows;
}

void KvBuffer::save(const ggml_tensor* tensor, uint8_t* data, size_t offset, size_t size) {
  const Rows rows = rows_of(tensor, offset, size);
  const size_t row_bytes = root_of(tensor)->nb[1];
  if (device_cache_) {
    settle();
    try {
      device_cache_->read_cells(rows.layer->index, rows.kind, rows.first, rows.count, source_->hash(), data);
    } catch (const std::runtime_error& error) {
      // llama.cpp saves in a destructor, out of which no exception gets: no cache will load such rows.
      GGML_LOG_ERROR("thimble: %s\n", error.what());
      for (int64_t i = 0; i < rows.count; i++) write_refused_row(data + i * row_bytes, row_bytes);
    }
  }
  for (int64_t i = 0; i < rows.count; i++) {
    uint8_t* row = data + i * row_bytes;
    const auto& refused = rows.layer->refused[int(rows.kind)];
    if (const auto it = refused.find(rows.first + i); it != refused.end()) {
      std::copy(it->second.begin(), it->second.end(), row);
    } else if (!device_cache_) {
      save_cell(*rows.layer->cache, rows.kind, rows.first + i, source_->hash(), row);
    }
  }
}

void KvBuffer::load(const ggml_tensor* tensor, const uint8_t* data, size_t offset, size_t size) {
  const Rows rows = rows_of(tensor, offset, size);
  const size_t row_bytes = root_of(tensor)->nb[1];
  if (device_cache_) {
    constexpr int64_t kFewRows = 64;
    constexpr size_t kManyBytes = size_t(64) << 20;
    std::vector<int64_t> cells(rows.count);
    std::iota(cells.begin(), cells.end(), rows.first);
    if (rows.layer != waiting_.layer || rows.kind != waiting_.kind || waiting_.rows.size() > kManyBytes) settle();
    if (rows.count >= kFewRows) {
      settle();
      return load_on_device(*rows.layer, rows.kind, cells, data);
    }
    if (std::find_first_of(cells.begin(), cells.end(), waiting_.cells.begin(), waiting_.cells.end()) != cells.end()) {
      settle();  // the same cells anew
    }
    waiting_.layer = rows.layer;
    waiting_.kind = rows.kind;
    waiting_.cells.insert(waiting_.cells.end(), cells.begin(), cells.end());
    waiting_.rows.insert(waiting_.rows.end(), data, data + size);
    return;
  }
  for (int64_t i = 0; i < rows.count; i++) {
    const uint8_t* row = data + i * row_bytes;
    const int64_t cell = rows.first + i;
    auto& refused = rows.layer->refused[int(rows.kind)];
    try {
      load_cell(*rows.layer->cache, rows.kind, cell, source_->hash(), row);
      refused.erase(cell);
    } catch (const std::runtime_error& error) {
      refused[cell].assign(row, row + row_bytes);
      if (!said_refusal_) GGML_LOG_ERROR("thimble: %s\n", error.what());
      said_refusal_ = true;
    }
  }
}

void KvBuffer::settle() {
  const Waiting waiting = std::exchange(waiting_, {});
  if (waiting.layer) load_on_device(*waiting.layer, waiting.kind, waiting.cells, waiting.rows.data());
}

void KvBuffer::load_on_device(ManagedLayer& layer, Kind kind, const std::vector<int64_t>& cells, const uint8_t* rows) {
  std::string why = kOtherSettings;
  std::vector<size_t> refused;
  try {
    refused = device_cache_->write_cells(layer.index, kind, cells, source_->hash(), rows);
  } catch (const std::runtime_error& error) {
    why = error.what();
    refused.resize(cells.size());
    std::iota(refused.begin(), refused.end(), size_t(0));
  }
  const size_t row_bytes = layer.tensors[int(kind)]->nb[1];
  for (int64_t cell : cells) layer.refused[int(kind)].erase(cell);
  for (size_t i : refused) layer.refused[int(kind)][cells[i]].assign(rows + i * row_bytes, rows + (i + 1) * row_bytes);
  if (!refused.empty() && !std::exchange(said_refusal_, true)) GGML_LOG_ERROR("thimble: %s\n", why.c_str());
}

bool KvBuffer::has_refused() const {
  return std::any_of(layers_.begin(), layers_.end(), [](const auto& entry) {
    return !entry.second.refused[0].empty() || !entry.second.refused[1].empty();
  });
}

bool KvBuffer::copy(const ggml_tensor* from, ggml_tensor* to) {
  Kind kind;
  ManagedLayer* layer = layer_of(to, &kind);
  if (!layer || layer != layer_of(from)) return false;  // the caller then goes through save and load
  const size_t stream_bytes = root_of(to)->nb[2];
  if (ggml_nbytes(from) != stream_bytes || ggml_nbytes(to) != stream_bytes) return false;
  if (!device_cache_ && !layer->cache) return false;
  const Rows source = rows_of(from, 0, stream_bytes), target = rows_of(to, 0, stream_bytes);
  const int from_stream = int(source.first / source.count), to_stream = int(target.first / target.count);
  if (device_cache_) {
    settle();
    device_cache_->copy_stream(layer->index, kind, from_stream, to_stream);
  } else {
    try {
      layer->cache->copy_stream(kind, from_stream, to_stream);
    } catch (const std::runtime_error&) {
      return false;  // the exact store is full, which `load` says and lives with
    }
  }
  auto& refused = layer->refused[int(kind)];
  std::erase_if(refused, [&](const auto& entry) {
    return entry.first >= target.first && entry.first < target.first + target.count;
  });
  for (int64_t i = 0; i < source.count && !refused.empty(); i++) {
    if (const auto it = refused.find(source.first + i); it != refused.end()) refused[target.first + i] = it->second;
  }
  return true;
}

ggml_backend_buffer_type_t kv_buffer_type(ggml_backend_dev_t device, ggml_backend_dev_t inner) {
  static std::mutex mutex;
  static std::map<ggml_backend_dev_t, BufferTypeContext> contexts;
  static std::map<ggml_backend_dev_t, ggml_backend_buffer_type> types;
  const std::lock_guard lock(mutex);
  auto [it, is_new] = types.try_emplace(device);
  if (is_new) {
    contexts[device] = {ggml_backend_dev_buffer_type(inner), inner, ggml_backend_dev_name(device)};
    it->second = {
        {type_name, type_alloc, type_alignment, type_max_size, type_alloc_size, nullptr}, device, &contexts[device]};
  }
  return &it->second;
}

bool is_kv_buffer_type(ggml_backend_buffer_type_t type) {
  return type->iface.get_name == type_name;
}

}  // namespace thimble
