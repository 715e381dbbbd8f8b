#include "cuda/cache.h"

namespace thimble::cuda {
namespace {

Status copy(void* to, const void* from, size_t size) {
  return Status::from(cudaMemcpy(to, from, size, cudaMemcpyDefault));
}

}  // namespace

Status DeviceWindow::init(const CacheShape& shape, WindowSize size) {
  shape_ = shape;
  size_ = size;
  const size_t n = size_t(shape.n_streams);
  if (Status s = written_.reserve(n * sizeof(int32_t)); !s.ok()) return s;
  if (Status s = cells_.reserve(n * capacity() * sizeof(int32_t)); !s.ok()) return s;
  if (Status s = kept_cells_.reserve(cells_.size()); !s.ok()) return s;
  if (Status s = hidden_.reserve(n * hidden_stride() * sizeof(uint32_t)); !s.ok()) return s;
  if (Status s = tokens_.reserve(cells_.size()); !s.ok()) return s;
  if (Status s = slots_.reserve(size_t(shape.n_cells()) * sizeof(int32_t)); !s.ok()) return s;  // no batch has more
  if (Status s = displaced_.reserve(size_t(shape.n_cells()) * sizeof(int64_t)); !s.ok()) return s;
  return clear();
}

Status DeviceWindow::clear() {
  if (Status s = written_.fill(0); !s.ok()) return s;
  if (Status s = cells_.fill(0xff); !s.ok()) return s;  // -1
  if (Status s = tokens_.fill(0xff); !s.ok()) return s;
  return hidden_.fill(0);
}

Status DeviceWindow::keep_cells(cudaStream_t stream) {
  return Status::from(cudaMemcpyAsync(kept_cells_.as<int32_t>(), cells_.as<int32_t>(), cells_.size(),
                                      cudaMemcpyDeviceToDevice, stream));
}

Status DeviceWindow::copy_stream(int from, int to) {
  int32_t* written = written_.as<int32_t>();
  if (Status s = copy(written + to, written + from, sizeof(int32_t)); !s.ok()) return s;
  if (Status s = copy(cells_.as<int32_t>() + size_t(to) * capacity(), cells(from), capacity() * sizeof(int32_t));
      !s.ok()) {
    return s;
  }
  return copy(hidden_.as<uint32_t>() + to * hidden_stride(), hidden(from), hidden_stride() * sizeof(uint32_t));
}

Status DeviceWindow::read_books(WindowBooks* books) const {
  books->n_streams = shape_.n_streams;
  books->cells_per_stream = int(shape_.cells_per_stream);
  books->capacity = capacity();
  books->n_first = size_.first;
  books->written.resize(shape_.n_streams);
  books->cells.resize(size_t(shape_.n_streams) * capacity());
  if (const cudaError_t e = cudaDeviceSynchronize(); e != cudaSuccess) return Status::from(e);
  if (Status s = copy(books->written.data(), written_.as<void>(), books->written.size() * sizeof(int32_t)); !s.ok()) {
    return s;
  }
  if (Status s = copy(books->cells.data(), cells_.as<void>(), books->cells.size() * sizeof(int32_t)); !s.ok()) return s;
  books->list_hidden(hidden_stride());
  return {};
}

Status DeviceWindow::write_books(const WindowBooks& books) {
  if (Status s = copy(written_.as<void>(), books.written.data(), books.written.size() * sizeof(int32_t)); !s.ok()) {
    return s;
  }
  if (Status s = copy(cells_.as<void>(), books.cells.data(), books.cells.size() * sizeof(int32_t)); !s.ok()) return s;
  if (Status s = copy(hidden_.as<void>(), books.hidden.data(), books.hidden.size() * sizeof(uint32_t)); !s.ok())
    return s;
  return Status::from(cudaDeviceSynchronize());
}

WindowArgs DeviceWindow::begin_batch(const int64_t* cells, int n_tokens) {
  batch_++;
  WindowArgs args;
  args.n_streams = shape_.n_streams;
  args.n_tokens = n_tokens;
  args.cells = cells;
  args.cells_per_stream = int(shape_.cells_per_stream);
  args.capacity = capacity();
  args.n_first = size_.first;
  args.written = written_.as<int32_t>();
  args.window_cells = cells_.as<int32_t>();
  args.slots = slots_.as<int32_t>();
  args.tokens = tokens_.as<int32_t>();
  args.displaced = displaced_.as<int64_t>();
  args.hidden = hidden_.as<uint32_t>();
  args.hidden_stream_stride = hidden_stride();
  return args;
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

PrepareArgs DeviceLayer::prepare_args(const DeviceWindow& window) const {
  PrepareArgs args;
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
