#include "cache/layer.h"

#include <algorithm>
#include <cstring>

#include "codec/half.h"
#include "kernels/kernels.h"

namespace thimble {

size_t CacheSide::memory_bytes(const CacheShape& shape, const Format& format, int n_slots, bool coded) {
  const size_t blocks = coded ? size_t(shape.n_kv_heads) * shape.n_streams * shape.blocks_per_stream() : 0;
  return blocks * format.block_bytes() + size_t(n_slots) * shape.n_kv_heads * format.head_dim * sizeof(uint16_t);
}

CacheSide::CacheSide(const CacheShape& shape, std::shared_ptr<const std::vector<HeadCodec>> codecs, int n_slots,
                     uint8_t* memory, std::unique_ptr<ExactStore> store, bool coded)
    : shape_(shape), codecs_(std::move(codecs)), blocks_(memory), coded_(coded) {
  places_.block_stride = format().block_bytes();
  places_.head_stride = size_t(shape.n_streams) * shape.blocks_per_stream() * places_.block_stride;
  uint8_t* slots = memory + memory_bytes(shape, format(), 0, coded);
  rows_ = store ? stored_rows(std::move(store), row_size())
                : window_rows(row_size(), n_slots, reinterpret_cast<uint16_t*>(slots));
}

CacheSide::CacheSide(const CacheShape& shape, std::shared_ptr<const std::vector<HeadCodec>> codecs, uint8_t* blocks,
                     const BlockPlaces& places)
    : shape_(shape),
      codecs_(std::move(codecs)),
      blocks_(blocks),
      places_(places),
      coded_(true),
      rows_(window_rows(row_size(), 0, nullptr)) {}

void CacheSide::encode_row(const uint16_t* row, int64_t cell) const {
  for (int head = 0; head < shape_.n_kv_heads; head++) encode_head(head, row, cell);
}

void CacheSide::encode_head(int head, const uint16_t* row, int64_t cell) const {
  if (!coded_) return;
  const int head_dim = format().head_dim;
  float x[kMaxHeadDim];
  const uint8_t* exact = reinterpret_cast<const uint8_t*>(row + size_t(head) * head_dim);
  kernels().load_rows(Kind::value, &exact, 1, head_dim, x);
  encode_head(head, x, cell);
}

void CacheSide::encode_head(int head, const float* x, int64_t cell) const {
  const Kernels& k = kernels();
  float y[kMaxHeadDim];
  codec(head).transform.forward(x, y, 1, k.transform);
  if (format().f16) return encode_cell(codec(head), y, block(head, cell), in_block(cell));
  uint8_t coded[kMaxHeadDim];  // codes, then the scale
  const uint16_t scale = k.encode(codec(head), y, coded);
  std::memcpy(coded + format().n_subspaces(), &scale, sizeof(scale));
  copy_cell_in(format(), kind(), coded, block(head, cell), in_block(cell));
}

void CacheSide::decode_row(int64_t cell, float* row) const {
  for (int head = 0; head < shape_.n_kv_heads; head++) {
    decode_head(head, cell, row + size_t(head) * format().head_dim);
  }
}

void CacheSide::decode_head(int head, int64_t cell, float* x) const {
  float y[kMaxHeadDim];
  decode_cell(codec(head), block(head, cell), in_block(cell), y);
  codec(head).transform.inverse(y, x);
}

void CacheSide::copy_stream(int from, int to) {
  for (int head = 0; coded_ && head < shape_.n_kv_heads; head++) {
    for (int64_t cell = 0; cell < shape_.cells_per_stream; cell += kBlockCells) {
      std::memcpy(block(head, to * shape_.cells_per_stream + cell), block(head, from * shape_.cells_per_stream + cell),
                  format().block_bytes());
    }
  }
  rows_->copy_cells(from * shape_.cells_per_stream, to * shape_.cells_per_stream, shape_.cells_per_stream);
  if (!store() || !store()->is_full() || !coded_) return;
  // Cells that found no room in one stream may have a place in the other: what their codes decode to.
  std::vector<float> decoded(row_size());
  for (int64_t i = 0; i < shape_.cells_per_stream; i++) {
    uint16_t* row = rows_->at(to * shape_.cells_per_stream + i, -1);
    if (!row || rows_->at(from * shape_.cells_per_stream + i, -1)) continue;
    decode_row(to * shape_.cells_per_stream + i, decoded.data());
    std::transform(decoded.begin(), decoded.end(), row, float_to_half);
  }
}

void CacheLayer::begin_write(Kind kind, std::span<const int64_t> cells) {
  bool& mine = kind == Kind::key ? has_keys_ : has_values_;
  bool& other = kind == Kind::key ? has_values_ : has_keys_;
  const auto batch = window_.batch();
  const bool joins = other && !mine && std::equal(batch.begin(), batch.end(), cells.begin(), cells.end());
  if (!joins) code_abandoned();
  side(kind).rows().begin_batch(cells);
  if (!joins) {
    has_keys_ = has_values_ = false;
    window_.begin_batch(cells);
  }
  mine = true;
  // A layer with keys alone has values of no numbers, which come with the keys.
  if (values_.row_size() == 0 && !has_values_) {
    values_.rows().begin_batch(cells);
    has_values_ = true;
  }
}

// Encodes the rows of a batch that was written but never attended to, and so never committed: they have no slots.
void CacheLayer::code_abandoned() {
  const auto batch = window_.batch();
  for (Kind kind : {Kind::key, Kind::value}) {
    if (!(kind == Kind::key ? has_keys_ : has_values_)) continue;
    for (size_t i = 0; i < batch.size(); i++) {
      side(kind).encode_row(side(kind).row_data({int32_t(batch[i]), true, int32_t(i)}), batch[i]);
    }
  }
}

void CacheLayer::write_row(Kind kind, int row, const uint16_t* data) {
  CacheSide& s = side(kind);
  std::copy_n(data, s.row_size(), s.rows().row({int32_t(window_.batch()[row]), true, row}));
}

Window::Judge CacheLayer::judge(const BatchQueries& queries) const {
  if (!queries.data) return nullptr;
  return [this, queries](std::span<const int> batch_rows, std::span<const Window::Row> rows,
                         std::span<const Window::Row> recent, std::span<float> scores) {
    std::vector<const uint16_t*> keys[2];
    const size_t row_size = keys_.row_size() + (is_latent_ ? values_.row_size() : 0);
    std::vector<uint16_t> whole(is_latent_ ? (rows.size() + recent.size()) * row_size : 0);
    uint16_t* to = whole.data();
    const auto key_of = [&](const Window::Row& row) -> const uint16_t* {
      if (!is_latent_) return keys_.row_data(row);
      const uint16_t* begin = to;
      to = std::copy_n(values_.row_data(row), values_.row_size(), to);
      to = std::copy_n(keys_.row_data(row), keys_.row_size(), to);
      return begin;
    };
    for (const Window::Row& row : rows) keys[0].push_back(key_of(row));
    for (const Window::Row& row : recent) keys[1].push_back(key_of(row));
    score_cells(mean_query(queries, batch_rows), queries.n_heads, int(row_size) / queries.dim, queries.dim, keys[0],
                keys[1], scores);
  };
}

void CacheLayer::settle(const Window::Visible& visible) {
  if (has_keys_ && has_values_) window_.settle(visible);
}

void CacheLayer::begin_commit(const Window::Visible& visible, const BatchQueries& queries) {
  changes_ = {};
  if (has_keys_ && has_values_) changes_ = window_.begin_commit(visible, judge(queries));
}

// Goes head by head, as each has its own codebook, which is then read once for many rows.
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
  if (has_keys_ && has_values_) window_.end_commit();
  for (CacheSide* s : {&keys_, &values_}) {
    s->rows().end_batch(changes_.moves);
    s->rows().end_loans([this](int64_t cell) { return window_.find(cell) >= 0; });
  }
  changes_ = {};
  has_keys_ = has_values_ = false;
}

void CacheLayer::take_row(Kind kind, int64_t cell, const uint16_t* row) {
  if (kind == Kind::key) {
    // The rows of a latent layer are saved whole, so that its values come between keys.
    if (arrived_ == Kind::value && !is_latent_) window_.end_arrival();
    std::vector<Window::Row> leaving;
    window_.place(cell, leaving);
    for (const Window::Row& left : leaving) {
      for (const CacheSide* s : {&keys_, &values_}) {
        // All keys of a state come before its values, so this cell may have no values yet.
        if (const uint16_t* data = s->row_data(left)) s->encode_row(data, left.cell);
      }
    }
  }
  arrived_ = kind;
  CacheSide& s = side(kind);
  const bool in_window = window_.find(cell) >= 0;
  uint16_t* kept = exact_row(kind, cell);
  if (!kept && in_window) kept = s.rows().lend(cell);
  if (kept) std::copy_n(row, s.row_size(), kept);
  if (!in_window) s.encode_row(row, cell);
}

void CacheLayer::copy_stream(Kind kind, int from, int to) {
  const int64_t n = keys_.shape().cells_per_stream;
  CacheSide& s = side(kind);
  s.copy_stream(from, to);
  // llama.cpp copies keys before values: the copy of the keys makes the slots, that of the values only fills them.
  if (kind == Kind::key) window_.copy_stream(from, to);
  for (const Window::Row& row : window_.rows()) {
    if (row.in_flight || row.cell / n != to) continue;
    const int source = window_.find(row.cell - to * n + from * n);
    if (source < 0) continue;
    s.rows().copy_slot(source, row.index);
    if (!exact_row(kind, row.cell)) {  // the exact store is full
      std::copy_n(exact_row(kind, row.cell - to * n + from * n), s.row_size(), s.rows().lend(row.cell));
    }
  }
}

void CacheLayer::clear() {
  window_.clear();
  has_keys_ = has_values_ = false;
  for (CacheSide* s : {&keys_, &values_}) s->rows().clear();
}

}  // namespace thimble
