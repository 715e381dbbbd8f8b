#include "cache/layer.h"

#include <algorithm>
#include <cstring>

#include "attention/kernels.h"

namespace thimble {

size_t CacheSide::memory_bytes(const CacheShape& shape, const Format& format, int n_slots) {
  const size_t blocks = size_t(shape.n_kv_heads) * shape.n_streams * shape.blocks_per_stream();
  return blocks * format.block_bytes() + size_t(n_slots) * shape.n_kv_heads * format.head_dim * sizeof(uint16_t);
}

CacheSide::CacheSide(const CacheShape& shape, std::shared_ptr<const std::vector<HeadCodec>> codecs, int n_slots,
                     uint8_t* memory, std::unique_ptr<ExactStore> store)
    : shape_(shape),
      codecs_(std::move(codecs)),
      n_slots_(n_slots),
      blocks_(memory),
      slots_(reinterpret_cast<uint16_t*>(memory + memory_bytes(shape, codecs_->front().format, 0))),
      store_(std::move(store)) {}

void CacheSide::encode_row(const uint16_t* row, int64_t cell) const {
  for (int head = 0; head < shape_.n_kv_heads; head++) encode_head(head, row, cell);
}

void CacheSide::encode_head(int head, const uint16_t* row, int64_t cell) const {
  const Kernels& k = kernels();
  const int head_dim = format().head_dim;
  float x[kMaxHeadDim], y[kMaxHeadDim];
  const uint8_t* exact = reinterpret_cast<const uint8_t*>(row + size_t(head) * head_dim);
  k.load_rows(Kind::value, &exact, 1, head_dim, x);
  codec(head).transform.forward(x, y, 1, k.transform);
  if (format().f16) return store_cell(codec(head), y, block(head, cell), in_block(cell));
  uint8_t coded[kMaxHeadDim];  // codes, then the scale
  const uint16_t scale = k.encode(codec(head), y, coded);
  std::memcpy(coded + format().n_subspaces(), &scale, sizeof(scale));
  copy_cell_in(format(), kind(), coded, block(head, cell), in_block(cell));
}

void CacheSide::decode_row(int64_t cell, float* row) const {
  const int head_dim = format().head_dim;
  float y[kMaxHeadDim];
  for (int head = 0; head < shape_.n_kv_heads; head++) {
    load_cell(codec(head), block(head, cell), in_block(cell), y);
    codec(head).transform.inverse(y, row + size_t(head) * head_dim);
  }
}

uint16_t* CacheSide::exact_row(int slot) {
  if (slot < n_slots_) return slots_ + size_t(slot) * row_size();
  const size_t extra = size_t(slot - n_slots_);
  while (more_slots_.size() <= extra) more_slots_.push_back(std::make_unique<uint16_t[]>(row_size()));
  return more_slots_[extra].get();
}

void CacheSide::copy_stream(int from, int to) {
  for (int head = 0; head < shape_.n_kv_heads; head++) {
    std::memcpy(block(head, to * shape_.cells_per_stream), block(head, from * shape_.cells_per_stream),
                shape_.blocks_per_stream() * format().block_bytes());
  }
  if (store_) store_->copy(from * shape_.cells_per_stream, to * shape_.cells_per_stream, shape_.cells_per_stream);
}

uint16_t* CacheLayer::exact_row(Kind kind, int64_t cell) {
  CacheSide& s = side(kind);
  if (s.store()) return s.store()->row(cell);
  const int slot = window_.find(cell);
  return slot >= 0 ? s.exact_row(slot) : nullptr;
}

void CacheLayer::begin_write(Kind kind, std::span<const int64_t> cells) {
  CacheSide& s = side(kind);
  if (s.store()) {
    for (int64_t cell : cells) s.store()->reserve(cell);
  }
  bool& mine = kind == Kind::key ? has_keys_ : has_values_;
  bool& other = kind == Kind::key ? has_values_ : has_keys_;
  const auto batch = window_.batch();
  const bool joins = other && !mine && std::equal(batch.begin(), batch.end(), cells.begin(), cells.end());
  if (!joins) {
    // A batch that nothing attended to never became part of the window.
    for (Kind k : {Kind::key, Kind::value}) {
      if (!(k == Kind::key ? has_keys_ : has_values_)) continue;
      for (size_t i = 0; i < batch.size(); i++) {
        const Window::Row row{int32_t(batch[i]), true, int32_t(i)};
        side(k).encode_row(side(k).row_data(row), batch[i]);
      }
    }
    has_keys_ = has_values_ = false;
    window_.begin_batch(cells);
  }
  mine = true;
  if (!s.store()) s.in_flight().resize(cells.size() * s.row_size());
}

void CacheLayer::write_row(Kind kind, int row, const uint16_t* data) {
  CacheSide& s = side(kind);
  const int64_t cell = window_.batch()[row];
  uint16_t* exact = s.store() ? s.store()->row(cell) : &s.in_flight()[size_t(row) * s.row_size()];
  std::memcpy(exact, data, s.row_size() * sizeof(uint16_t));
}

void CacheLayer::begin_commit(const std::function<bool(int, int64_t)>& visible) {
  changes_ = has_keys_ && has_values_ ? window_.commit(visible) : Window::Changes{};
}

// By heads first: each has its own codebook, which then serves many rows.
void CacheLayer::code_leaving(int thread, int n_threads) {
  const int64_t n_rows = int64_t(changes_.leaving.size()), n_heads = keys_.shape().n_kv_heads;
  const int64_t total = 2 * n_heads * n_rows;
  for (int64_t i = total * thread / n_threads; i < total * (thread + 1) / n_threads; i++) {
    const CacheSide& s = i < n_heads * n_rows ? keys_ : values_;
    const Window::Row& row = changes_.leaving[i % n_rows];
    s.encode_head(int(i / n_rows % n_heads), s.row_data(row), row.cell);
  }
}

void CacheLayer::end_commit() {
  for (const Window::Move& move : changes_.moves) {
    for (CacheSide* s : {&keys_, &values_}) {
      if (s->store()) continue;
      std::memcpy(s->exact_row(move.slot), &s->in_flight()[size_t(move.batch_row) * s->row_size()],
                  s->row_size() * sizeof(uint16_t));
    }
  }
  changes_ = {};
  has_keys_ = has_values_ = false;
  for (CacheSide* s : {&keys_, &values_}) {
    s->in_flight().clear();
    s->in_flight().shrink_to_fit();
  }
}

void CacheLayer::take_row(Kind kind, int64_t cell, const uint16_t* row, bool in_window) {
  if (kind == Kind::key && in_window) {
    int64_t leaving;
    const int slot = window_.place(cell, &leaving);
    for (const CacheSide* s : {&keys_, &values_}) {
      if (leaving < 0) break;
      // Its values may be still to come.
      if (const uint16_t* left = s->row_data({int32_t(leaving), false, slot})) s->encode_row(left, leaving);
    }
  }
  CacheSide& s = side(kind);
  if (uint16_t* kept = exact_row(kind, cell)) std::memcpy(kept, row, s.row_size() * sizeof(uint16_t));
  if (window_.find(cell) < 0) s.encode_row(row, cell);
}

void CacheLayer::copy_stream(Kind kind, int from, int to) {
  const int64_t n = keys_.shape().cells_per_stream;
  CacheSide& s = side(kind);
  s.copy_stream(from, to);
  if (kind == Kind::key) {
    // llama.cpp copies keys first: they bring the slots, the values then fill them.
    for (int64_t cell = to * n; cell < (to + 1) * n; cell++) window_.forget(cell);
    const std::vector<Window::Row> rows = window_.rows();
    for (const Window::Row& row : rows) {
      if (row.in_flight || row.cell / n != from) continue;
      std::vector<uint16_t> data;
      if (!s.store()) data.assign(s.exact_row(row.index), s.exact_row(row.index) + s.row_size());
      int64_t leaving;  // none: a stream has as many slots as another
      const int slot = window_.place(row.cell - from * n + to * n, &leaving);
      if (slot >= 0 && !s.store()) std::copy(data.begin(), data.end(), s.exact_row(slot));
    }
    return;
  }
  if (s.store()) return;
  for (const Window::Row& row : window_.rows()) {
    if (row.in_flight || row.cell / n != to) continue;
    const int source = window_.find(row.cell - to * n + from * n);
    if (source >= 0) std::copy_n(s.exact_row(source), s.row_size(), s.exact_row(row.index));
  }
}

void CacheLayer::clear() {
  window_.clear();
  has_keys_ = has_values_ = false;
  for (CacheSide* s : {&keys_, &values_}) {
    if (s->store()) s->store()->clear();
  }
}

}  // namespace thimble
