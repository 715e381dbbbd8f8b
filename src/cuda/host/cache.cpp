#include "cuda/host/cache.h"

#include <algorithm>
#include <initializer_list>
#include <utility>

namespace thimble::cuda {
namespace {

Status copy(void* to, const void* from, size_t size) {
  return Status::from(cudaMemcpy(to, from, size, cudaMemcpyDefault));
}

}  // namespace

int DeviceWindow::rows_of_stream(WindowSize size, int64_t cells_per_stream, int n_streams) {
  return std::min(Window::slots_of_stream(size, cells_per_stream, n_streams) + kMaxTokens, kMaxWindowRows);
}

Status DeviceWindow::init(const CacheShape& shape, WindowSize size) {
  shape_ = shape;
  size_ = size;
  capacity_ = rows_of_stream(size, shape.cells_per_stream, shape.n_streams);
  const size_t n = size_t(shape.n_streams), rows = n * capacity_, cells = size_t(shape.n_cells());
  for (const auto& [memory, bytes] : std::initializer_list<std::pair<DeviceMemory*, size_t>>{
           {&books_, n * sizeof(WindowBooks)},
           {&order_, rows * sizeof(uint32_t)},
           {&sequence_, rows * sizeof(uint32_t)},
           {&marks_, cells * sizeof(uint32_t)},  // no batch has more tokens
           {&cells_, rows * sizeof(int32_t)},
           {&kept_cells_, rows * sizeof(int32_t)},
           {&slots_, cells * sizeof(int32_t)},
           {&tokens_, rows * sizeof(int32_t)},
           {&hidden_, n * hidden_stride() * sizeof(uint32_t)},
           {&leaving_cells_, rows * sizeof(int64_t)},
           {&leaving_slots_, rows * sizeof(int32_t)},
           {&n_leaving_, 2 * sizeof(int)}}) {
    if (Status s = memory->reserve(bytes); !s.ok()) return s;
  }
  return clear();
}

Status DeviceWindow::clear() {
  for (DeviceMemory* memory : {&cells_, &tokens_}) {
    if (Status s = memory->fill(0xff); !s.ok()) return s;  // -1
  }
  for (DeviceMemory* memory : {&books_, &order_, &sequence_, &n_leaving_}) {
    if (Status s = memory->fill(0); !s.ok()) return s;
  }
  return hidden_.fill(0);
}

Status DeviceWindow::keep_cells(cudaStream_t stream) {
  return Status::from(cudaMemcpyAsync(kept_cells_.as<int32_t>(), cells_.as<int32_t>(), cells_.size(),
                                      cudaMemcpyDeviceToDevice, stream));
}

Status DeviceWindow::copy_stream(int from, int to) {
  const size_t rows = size_t(capacity_);
  const auto copy_share = [&](const DeviceMemory& memory, size_t bytes) {
    char* all = memory.as<char>();
    return copy(all + to * bytes, all + from * bytes, bytes);
  };
  // Streams count batches alike, so that is the same in both.
  if (Status s = copy_share(books_, sizeof(WindowBooks)); !s.ok()) return s;
  if (Status s = copy_share(order_, rows * sizeof(uint32_t)); !s.ok()) return s;
  if (Status s = copy_share(sequence_, rows * sizeof(uint32_t)); !s.ok()) return s;
  if (Status s = copy_share(cells_, rows * sizeof(int32_t)); !s.ok()) return s;
  return copy_share(hidden_, hidden_stride() * sizeof(uint32_t));
}

Status DeviceWindow::read(HostWindow* window) const {
  const size_t rows = size_t(shape_.n_streams) * capacity_;
  window->n_streams = shape_.n_streams;
  window->cells_per_stream = int(shape_.cells_per_stream);
  window->last = size_.last;
  window->pool = size_.pool;
  window->spare = size_.spare;
  window->slots = capacity_ - kMaxTokens;
  window->capacity = capacity_;
  window->books.resize(shape_.n_streams);
  window->cells.resize(rows);
  window->order.resize(rows);
  window->sequence.resize(rows);
  if (const cudaError_t e = cudaDeviceSynchronize(); e != cudaSuccess) return Status::from(e);
  if (Status s = copy(window->books.data(), books_.as<void>(), books_.size()); !s.ok()) return s;
  if (Status s = copy(window->cells.data(), cells_.as<void>(), rows * sizeof(int32_t)); !s.ok()) return s;
  if (Status s = copy(window->order.data(), order_.as<void>(), rows * sizeof(uint32_t)); !s.ok()) return s;
  if (Status s = copy(window->sequence.data(), sequence_.as<void>(), rows * sizeof(uint32_t)); !s.ok()) return s;
  window->list_hidden(hidden_stride());
  return {};
}

Status DeviceWindow::write(const HostWindow& window) {
  const size_t rows = window.cells.size();
  if (Status s = copy(books_.as<void>(), window.books.data(), books_.size()); !s.ok()) return s;
  if (Status s = copy(cells_.as<void>(), window.cells.data(), rows * sizeof(int32_t)); !s.ok()) return s;
  if (Status s = copy(order_.as<void>(), window.order.data(), rows * sizeof(uint32_t)); !s.ok()) return s;
  if (Status s = copy(sequence_.as<void>(), window.sequence.data(), rows * sizeof(uint32_t)); !s.ok()) return s;
  if (Status s = copy(hidden_.as<void>(), window.hidden.data(), hidden_.size()); !s.ok()) return s;
  return Status::from(cudaDeviceSynchronize());
}

WindowArgs DeviceWindow::begin_batch(const int64_t* cells, int n_tokens, const BatchMask& mask) {
  batch_++;
  WindowArgs args;
  args.n_streams = shape_.n_streams;
  args.n_tokens = n_tokens;
  args.cells = cells;
  args.cells_per_stream = int(shape_.cells_per_stream);
  args.mask = mask.data;
  args.mask_token_stride = mask.token_stride;
  args.mask_stream_stride = mask.stream_stride;
  args.mask_tokens = mask.n_tokens;
  args.mask_cells = mask.n_cells;
  args.n_batch_streams = mask.n_streams;
  args.last = size_.last;
  args.pool = size_.pool;
  args.spare = size_.spare;
  args.slots = capacity_ - kMaxTokens;
  args.capacity = capacity_;
  args.books = books_.as<WindowBooks>();
  args.window_cells = cells_.as<int32_t>();
  args.order = order_.as<uint32_t>();
  args.sequence = sequence_.as<uint32_t>();
  args.marks = marks_.as<uint32_t>();
  args.token_slots = slots_.as<int32_t>();
  args.tokens = tokens_.as<int32_t>();
  args.leaving_cells = leaving_cells_.as<int64_t>();
  args.leaving_slots = leaving_slots_.as<int32_t>();
  args.n_leaving = n_leaving_.as<int>();
  args.hidden = hidden_.as<uint32_t>();
  args.hidden_stream_stride = hidden_stride();
  return args;
}

void DeviceWindow::fill(LeaveArgs& args) const {
  args.cells = leaving_cells_.as<int64_t>();
  args.slots = leaving_slots_.as<int32_t>();
  args.n_leaving = n_leaving_.as<int>();
  args.books = books_.as<WindowBooks>();
}

Status DeviceLayer::init(const CacheShape& shape, const std::vector<HeadCodec>& keys,
                         const std::vector<HeadCodec>& values, int capacity, uint8_t* const memory[2],
                         bool values_coded) {
  shape_ = shape;
  capacity_ = capacity;
  values_coded_ = values_coded;
  for (Kind kind : {Kind::key, Kind::value}) {
    memory_[int(kind)] = memory[int(kind)];
    if (Status s = tables_[int(kind)].upload(pack_tables(kind == Kind::key ? keys : values)); !s.ok()) return s;
  }
  return {};
}

CacheView DeviceLayer::view(Kind kind, int stream) const {
  if (!coded(kind)) return {};
  const size_t bytes = stream_bytes(kind);
  return {memory_[int(kind)] + stream * bytes, bytes, bytes * shape_.n_streams, codec(kind).block_bytes()};
}

uint16_t* DeviceLayer::rows(Kind kind, int stream) const {
  uint8_t* all = memory_[int(kind)] + stream_bytes(kind) * shape_.n_streams * shape_.n_kv_heads;
  return reinterpret_cast<uint16_t*>(all) + size_t(stream) * shape_.n_kv_heads * capacity_ * head_dim();
}

ExactRows DeviceLayer::window_rows(const DeviceWindow& window, int stream) const {
  return {rows(Kind::key, stream), rows(Kind::value, stream), window.cells(stream), capacity_, false};
}

WindowRows DeviceLayer::window_slots(const DeviceWindow& window) const {
  return {rows(Kind::key, 0), rows(Kind::value, 0), window.slots(), capacity_};
}

EncodeArgs DeviceLayer::encode_args(const DeviceWindow& window) const {
  EncodeArgs args;
  args.n_kv_heads = shape_.n_kv_heads;
  args.head_dim = head_dim();
  args.key_codec = codec(Kind::key);
  args.value_codec = codec(Kind::value);
  args.key_cache = view(Kind::key);
  args.value_cache = view(Kind::value);
  args.cells_per_stream = int(shape_.cells_per_stream);
  args.window = window_slots(window);
  args.store = store_rows();
  return args;
}

Status DeviceLayer::copy_stream(Kind kind, int from, int to) {
  const CacheView all = view(kind);
  for (int head = 0; coded(kind) && head < shape_.n_kv_heads; head++) {
    uint8_t* data = all.data + head * all.head_stride;
    if (Status s = copy(data + to * all.stream_stride, data + from * all.stream_stride, all.stream_stride); !s.ok()) {
      return s;
    }
  }
  const size_t window_bytes = size_t(shape_.n_kv_heads) * capacity_ * head_dim() * sizeof(uint16_t);
  if (Status s = copy(rows(kind, to), rows(kind, from), window_bytes); !s.ok() || !has_store()) return s;
  uint16_t* stored = store_[int(kind)].as<uint16_t>();
  return copy(stored + to * stored_stream(), stored + from * stored_stream(), stored_stream() * sizeof(uint16_t));
}

Status DeviceLayer::add_store() {
  for (PinnedMemory& side : store_) {
    if (Status s = side.allocate(shape_.n_streams * stored_stream() * sizeof(uint16_t)); !s.ok()) return s;
  }
  return {};
}

DenseRows DeviceLayer::store_rows(int stream) const {
  if (!has_store()) return {};
  const size_t first = stream * stored_stream();
  return {store_[int(Kind::key)].as<uint16_t>() + first, store_[int(Kind::value)].as<uint16_t>() + first, stream,
          shape_.n_streams - stream, int(shape_.cells_per_stream)};
}

Status DeviceLayer::clear() {
  for (PinnedMemory& side : store_) {
    if (Status s = side.clear(); !s.ok()) return s;
  }
  return {};
}

}  // namespace thimble::cuda
