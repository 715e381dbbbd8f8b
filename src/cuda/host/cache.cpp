#include "cuda/host/cache.h"

#include <algorithm>
#include <initializer_list>
#include <utility>

namespace thimble::cuda {
namespace {

Status copy(void* to, const void* from, size_t size) {
  return Status::from(cudaMemcpy(to, from, size, cudaMemcpyDefault));
}

// Of blocks and rows; what follows is aligned.
size_t aligned_bytes(const CacheShape& shape, const Format& format, int capacity, bool coded) {
  return (CacheSide::memory_bytes(shape, format, capacity * shape.n_streams, coded) + 255) / 256 * 256;
}

}  // namespace

size_t DeviceLayer::side_bytes(Kind kind, const CacheShape& shape, const Format& format, int capacity, bool coded) {
  const size_t bytes = aligned_bytes(shape, format, capacity, coded);
  return kind == Kind::key ? bytes + DeviceWindow::bytes(shape, capacity) : bytes;
}

Status DeviceLayer::init(const CacheShape& shape, const std::vector<HeadCodec>& keys,
                         const std::vector<HeadCodec>& values, WindowSize window, int capacity,
                         uint8_t* const memory[2], bool values_coded, AttendBy by) {
  shape_ = shape;
  capacity_ = capacity;
  values_coded_ = values_coded;
  for (Kind kind : {Kind::key, Kind::value}) {
    memory_[int(kind)] = memory[int(kind)];
    const std::vector<HeadCodec>& codecs = kind == Kind::key ? keys : values;
    if (codecs.front().format.head_dim == 0) continue;  // keys alone
    const bool is_read = by == AttendBy::nothing;
    const HostTables tables = is_read ? pack_row_tables(codecs) : pack_tables(codecs, by == AttendBy::tiles);
    if (Status s = tables_[int(kind)].upload(tables); !s.ok()) return s;
    if (Status s = is_read ? Status() : add_shift(kind, codecs); !s.ok()) return s;
  }
  const size_t books = aligned_bytes(shape, keys.front().format, capacity, true);
  return window_.init(shape, window, capacity, memory[int(Kind::key)] + books, rows(Kind::key, 0), head_dim());
}

Status DeviceLayer::add_shift(Kind kind, const std::vector<HeadCodec>& codecs) {
  const std::vector<float> shift = transformed_means(codecs);
  const size_t bytes = shift.size() * sizeof(float);
  if (bytes == 0) return {};
  if (Status s = shift_[int(kind)].reserve(bytes); !s.ok()) return s;
  return copy(shift_[int(kind)].as<float>(), shift.data(), bytes);
}

CacheView DeviceLayer::view(Kind kind, int stream) const {
  if (!coded(kind)) return {};
  const size_t bytes = stream_bytes(kind);
  return {memory_[int(kind)] + stream * bytes, bytes, bytes * shape_.n_streams, codec(kind).block_bytes()};
}

uint16_t* DeviceLayer::rows(Kind kind, int stream) const {
  uint8_t* all = memory_[int(kind)] + stream_bytes(kind) * shape_.n_streams * shape_.n_kv_heads;
  return reinterpret_cast<uint16_t*>(all) + size_t(stream) * shape_.n_kv_heads * capacity_ * head_dim(kind);
}

ExactRows DeviceLayer::window_rows(int stream) const {
  return {rows(Kind::key, stream), rows(Kind::value, stream), window_.cells(stream), capacity_, false};
}

EncodeArgs DeviceLayer::encode_args() const {
  EncodeArgs args;
  args.n_kv_heads = shape_.n_kv_heads;
  args.head_dim = head_dim();
  args.key_codec = codec(Kind::key);
  args.value_codec = codec(Kind::value);
  args.key_cache = view(Kind::key);
  args.value_cache = view(Kind::value);
  args.cells_per_stream = int(shape_.cells_per_stream);
  args.window = {rows(Kind::key, 0), rows(Kind::value, 0), window_.view().token_slots, capacity_};
  args.store = store_rows();
  return args;
}

Status DeviceLayer::copy_stream(Kind kind, int from, int to) {
  if (kind == Kind::key) {
    if (Status s = window_.copy_stream(from, to); !s.ok()) return s;
  }
  const CacheView all = view(kind);
  for (int head = 0; coded(kind) && head < shape_.n_kv_heads; head++) {
    uint8_t* data = all.data + head * all.head_stride;
    if (Status s = copy(data + to * all.stream_stride, data + from * all.stream_stride, all.stream_stride); !s.ok()) {
      return s;
    }
  }
  const size_t window_bytes = capacity_ * row_bytes(kind);
  if (Status s = copy(rows(kind, to), rows(kind, from), window_bytes); !s.ok() || !has_store()) return s;
  uint16_t* stored = store_[int(kind)].as<uint16_t>();
  const size_t n = stored_stream(kind);
  return copy(stored + to * n, stored + from * n, n * sizeof(uint16_t));
}

Status DeviceLayer::add_store() {
  for (Kind kind : {Kind::key, Kind::value}) {
    const size_t bytes = shape_.n_streams * stored_stream(kind) * sizeof(uint16_t);
    if (Status s = bytes == 0 ? Status() : store_[int(kind)].allocate(bytes); !s.ok()) return s;
  }
  return {};
}

DenseRows DeviceLayer::store_rows(int stream) const {
  if (!has_store()) return {};
  const auto side = [&](Kind kind) -> uint16_t* {
    return head_dim(kind) == 0 ? nullptr : store_[int(kind)].as<uint16_t>() + stream * stored_stream(kind);
  };
  return {side(Kind::key), side(Kind::value), stream, shape_.n_streams - stream, int(shape_.cells_per_stream)};
}

Status DeviceLayer::clear() {
  if (Status s = window_.clear(); !s.ok()) return s;
  for (PinnedMemory& side : store_) {
    if (Status s = side.clear(); !s.ok()) return s;
  }
  return {};
}

}  // namespace thimble::cuda
