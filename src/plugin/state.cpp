// Saves, loads, copies and clears a buffer's cells for llama.cpp, which reads and writes whole rows of views of a
// stream. Offsets and sizes are those of a plain f16 cache. Of values that are transposed (flash attention is off) it
// reads and writes one number of many rows at a time; the rows are the same.
#include <algorithm>
#include <numeric>
#include <set>
#include <stdexcept>
#include <utility>

#include "cache/state_row.h"
#include "ggml-impl.h"
#include "plugin/kv_buffer.h"

namespace thimble {

void KvBuffer::clear(uint8_t value) {
  if (reserved_) {
    if (value != 0) reserved_->back(reserved_->base(), size_);
    for (const ReservedMemory::Range& range : reserved_->backed()) fill(range.data, range.size, value);
  } else if (inner_->size > 0) {
    if (value != 0 || !device_.engine().release(base(), inner_->size)) ggml_backend_buffer_clear(inner_, value);
    // A far end of ggml's RPC has codes at the front of f16's memory alone, where large pages would take the memory
    // that coding saves.
    if (!caches_.empty() && far_.empty()) device_.engine().take_large_pages(base(), inner_->size);
  }
  for (const Buffer& buffer : more_) ggml_backend_buffer_clear(buffer.get(), value);
  waiting_ = {};
  saved_ = {};
  far_.take_early();
  if (cache_) cache_->clear();
  for (auto& [index, layer] : layers_) layer.refused.clear();
}

void KvBuffer::back(const void* data, size_t size) {
  if (!reserved_) return;
  for (const ReservedMemory::Range& range : reserved_->back(data, size)) fill(range.data, range.size, 0);
}

void KvBuffer::back(const ggml_tensor* tensor) {
  if (!reserved_ || !tensor->data) return;
  // Some types take more than their numbers do.
  back(tensor->data, tensor->view_src ? ggml_nbytes(tensor) : ggml_backend_buft_get_alloc_size(inner_->buft, tensor));
}

void KvBuffer::zero(void* data, size_t size) {
  if (size > 0 && !device_.engine().release(data, size)) fill(data, size, 0);
}

void KvBuffer::fill(void* data, size_t size, uint8_t value) {
  ggml_tensor bytes{};
  bytes.type = GGML_TYPE_I8;
  bytes.data = data;
  bytes.buffer = inner_;
  bytes.ne[0] = int64_t(size);
  bytes.ne[1] = bytes.ne[2] = bytes.ne[3] = 1;
  bytes.nb[0] = 1;
  bytes.nb[1] = bytes.nb[2] = bytes.nb[3] = size;
  ggml_backend_tensor_memset(&bytes, value, 0, size);
}

KvBuffer::Rows KvBuffer::rows_of(const ggml_tensor* tensor, size_t offset, size_t size) const {
  Rows rows{};
  rows.layer = layer_of(tensor, &rows.kind);
  const ggml_tensor* cache = cache_of(tensor);
  const size_t row_bytes = cache->nb[1], stream_bytes = cache->nb[2];
  // Over RPC a view comes without the cache tensor and its place there.
  const size_t view =
      far_.empty() ? tensor->view_offs : static_cast<const char*>(tensor->data) - static_cast<const char*>(cache->data);
  const size_t from = view + offset;
  if (!rows.layer || !rows.layer->plan) {
    throw std::runtime_error(std::string("tensor ") + tensor->name + ": the cache was not used yet");
  }
  const bool is_whole = from % stream_bytes == 0 && size % stream_bytes == 0;
  if (rows.layer->transposed && rows.kind == Kind::value && !is_whole) {
    const int64_t n_cells = cache->ne[1], place = int64_t(from % stream_bytes / sizeof(uint16_t));
    if (from % sizeof(uint16_t) == 0 && size % sizeof(uint16_t) == 0 &&
        place % n_cells + int64_t(size / sizeof(uint16_t)) <= n_cells) {
      rows.number = place / n_cells;
      rows.first = int64_t(from / stream_bytes) * n_cells + place % n_cells;
      rows.count = int64_t(size / sizeof(uint16_t));
      return rows;
    }
  }
  if (from % row_bytes != 0 || size % row_bytes != 0) {
    throw std::runtime_error(std::string("tensor ") + tensor->name +
                             ": a coded cache can be read and written by whole rows only");
  }
  rows.first = int64_t(from / row_bytes);
  rows.count = int64_t(size / row_bytes);
  return rows;
}

// Whether graphs have run, and none touches this layer: that of an indexer, where llama.cpp attends to all cells
// instead. Before any graph the layer may only wait to be bound, and then a state must not be lost in silence.
bool KvBuffer::is_unused(const ggml_tensor* tensor) {
  const ManagedLayer* layer = layer_of(tensor);
  return layer && !layer->plan && of(tensor)->device().in_use();
}

bool KvBuffer::is_never_written(const Rows& rows) {
  return rows.kind == Kind::value && (rows.layer->plan->keys_alone() || rows.layer->plan->latent > 0);
}

void KvBuffer::save(const ggml_tensor* tensor, uint8_t* data, size_t offset, size_t size) {
  settle();
  if (is_unused(tensor)) {
    std::fill_n(data, size, 0);
    return;
  }
  const Rows rows = rows_of(tensor, offset, size);
  return rows.number < 0 ? save_rows(rows, data) : save_numbers(rows, data);
}

void KvBuffer::save_rows(const Rows& rows, uint8_t* data) {
  const size_t row_bytes = rows.layer->tensors[int(rows.kind)]->nb[1];
  if (is_never_written(rows)) {
    std::fill_n(data, rows.count * row_bytes, 0);
    return;
  }
  try {
    read_cells(rows, data);
  } catch (const std::runtime_error& error) {
    // llama.cpp saves in a destructor, which no exception may leave. So the rows become such that no cache loads them.
    GGML_LOG_ERROR("thimble: %s\n", error.what());
    for (int64_t i = 0; i < rows.count; i++) write_refused_row(data + i * row_bytes, row_bytes);
  }
  if (rows.layer->refused.empty()) return;
  for (int64_t i = 0; i < rows.count; i++) {
    if (const auto* row = rows.layer->refused.find(rows.kind, rows.first + i)) {
      std::copy(row->begin(), row->end(), data + i * row_bytes);
    }
  }
}

// Reads saved rows. The two parts of a latent row are saved one behind the other.
void KvBuffer::read_cells(const Rows& rows, uint8_t* data) {
  const size_t row_bytes = rows.layer->tensors[int(rows.kind)]->nb[1];
  const std::vector<RowPart> parts = row_parts(*rows.layer->plan, rows.kind);
  if (parts.size() == 1) return cache_->read_cells(rows.layer->index, rows.kind, rows.first, rows.count, data);
  for (const RowPart& part : parts) {
    const size_t bytes = part.n * sizeof(uint16_t);
    std::vector<uint8_t> saved(rows.count * bytes);
    cache_->read_cells(rows.layer->index, part.kind, rows.first, rows.count, saved.data());
    for (int64_t i = 0; i < rows.count; i++) {
      std::copy_n(&saved[i * bytes], bytes, data + i * row_bytes + part.first * sizeof(uint16_t));
    }
  }
}

RefusedRows KvBuffer::write_cells(const ManagedLayer& layer, Kind kind, const std::vector<int64_t>& cells,
                                  const uint8_t* rows) {
  const size_t row_bytes = layer.tensors[int(kind)]->nb[1];
  const std::vector<RowPart> parts = row_parts(*layer.plan, kind);
  if (parts.size() == 1) return cache_->write_cells(layer.index, kind, cells, rows);
  RefusedRows all;
  std::set<size_t> entries;
  for (const RowPart& part : parts) {
    const size_t bytes = part.n * sizeof(uint16_t);
    std::vector<uint8_t> saved(cells.size() * bytes);
    for (size_t i = 0; i < cells.size(); i++) {
      std::copy_n(rows + i * row_bytes + part.first * sizeof(uint16_t), bytes, &saved[i * bytes]);
    }
    const RefusedRows refused = cache_->write_cells(layer.index, part.kind, cells, saved.data());
    entries.insert(refused.entries.begin(), refused.entries.end());
    if (!refused.entries.empty()) all.why = refused.why;
  }
  all.entries.assign(entries.begin(), entries.end());
  return all;
}

// llama.cpp asks for the first number of all rows, then for the second, and so on.
void KvBuffer::save_numbers(const Rows& rows, uint8_t* data) {
  const size_t row_bytes = rows.layer->tensors[int(rows.kind)]->nb[1];
  if (saved_.layer != rows.layer) saved_ = {rows.layer, {}};
  std::vector<uint8_t>& saved = saved_.rows[{rows.first, rows.count}];
  if (saved.empty()) {
    saved.resize(rows.count * row_bytes);
    save_rows(rows, saved.data());
  }
  for (int64_t i = 0; i < rows.count; i++) {
    std::copy_n(&saved[i * row_bytes + rows.number * sizeof(uint16_t)], sizeof(uint16_t), data + i * sizeof(uint16_t));
  }
}

void KvBuffer::load_numbers(const Rows& rows, const uint8_t* data, bool comes_again) {
  const size_t row_bytes = rows.layer->tensors[int(rows.kind)]->nb[1];
  if (rows.layer != waiting_.layer || rows.kind != waiting_.kind || rows.number < waiting_.number) settle();
  throw_of_refusal(comes_again);
  waiting_.layer = rows.layer;
  waiting_.kind = rows.kind;
  waiting_.number = rows.number;
  for (int64_t i = 0; i < rows.count; i++) {
    const auto [place, is_new] = waiting_.places.try_emplace(rows.first + i, waiting_.rows.size());
    if (is_new) {
      waiting_.cells.push_back(rows.first + i);
      waiting_.rows.resize(waiting_.rows.size() + row_bytes);
    }
    std::copy_n(data + i * sizeof(uint16_t), sizeof(uint16_t),
                &waiting_.rows[place->second + rows.number * sizeof(uint16_t)]);
  }
}

// llama.cpp reads the tensors of a file into one buffer, so their data are at the same address again. Those of a state
// in memory have different addresses; there an exception must not be thrown, nor to a program at the far end of RPC.
void KvBuffer::throw_of_refusal(bool comes_again) {
  if (std::exchange(has_new_refusal_, false) && comes_again && far_.empty()) throw std::runtime_error(kOtherSettings);
}

void KvBuffer::load(const ggml_tensor* tensor, const uint8_t* data, size_t offset, size_t size) {
  constexpr int64_t kFewRows = 64;
  constexpr size_t kManyBytes = size_t(64) << 20;
  saved_ = {};
  if (is_unused(tensor)) return;
  const Rows rows = rows_of(tensor, offset, size);
  const bool comes_again = data == std::exchange(last_data_, data);
  if (is_never_written(rows)) return;
  if (rows.number >= 0) return load_numbers(rows, data, comes_again);
  std::vector<int64_t> cells(rows.count);
  std::iota(cells.begin(), cells.end(), rows.first);
  const bool others = rows.layer != waiting_.layer || rows.kind != waiting_.kind;
  const bool again =  // some of these cells wait already
      std::find_first_of(cells.begin(), cells.end(), waiting_.cells.begin(), waiting_.cells.end()) != cells.end();
  if (others || again || rows.count >= kFewRows || waiting_.rows.size() > kManyBytes) settle();
  throw_of_refusal(comes_again);
  if (rows.count >= kFewRows) return load_rows(*rows.layer, rows.kind, cells, data);
  waiting_.layer = rows.layer;
  waiting_.kind = rows.kind;
  waiting_.cells.insert(waiting_.cells.end(), cells.begin(), cells.end());
  waiting_.rows.insert(waiting_.rows.end(), data, data + size);
}

void KvBuffer::settle() {
  const Waiting waiting = std::exchange(waiting_, {});
  if (waiting.layer) load_rows(*waiting.layer, waiting.kind, waiting.cells, waiting.rows.data());
}

void KvBuffer::load_rows(ManagedLayer& layer, Kind kind, const std::vector<int64_t>& cells, const uint8_t* rows) {
  RefusedRows refused;
  try {
    refused = write_cells(layer, kind, cells, rows);
  } catch (const std::runtime_error& error) {
    refused.why = error.what();
    refused.entries.resize(cells.size());
    std::iota(refused.entries.begin(), refused.entries.end(), size_t(0));
  }
  const size_t row_bytes = layer.tensors[int(kind)]->nb[1];
  layer.refused.erase(kind, cells);
  for (size_t i : refused.entries) layer.refused.add(kind, cells[i], {rows + i * row_bytes, row_bytes});
  if (refused.entries.empty()) return;
  has_new_refusal_ = true;
  if (!std::exchange(said_refusal_, true)) GGML_LOG_ERROR("thimble: %s\n", refused.why.c_str());
}

bool KvBuffer::has_refused() const {
  return std::any_of(layers_.begin(), layers_.end(), [](const auto& entry) { return !entry.second.refused.empty(); });
}

bool KvBuffer::copy(const ggml_tensor* from, ggml_tensor* to) {
  Kind kind;
  ManagedLayer* layer = layer_of(to, &kind);
  if (!layer || layer != layer_of(from)) return false;  // the caller then goes through save and load
  const size_t stream_bytes = cache_of(to)->nb[2];
  if (ggml_nbytes(from) != stream_bytes || ggml_nbytes(to) != stream_bytes || !layer->plan) return false;
  settle();
  saved_ = {};
  const Rows source = rows_of(from, 0, stream_bytes), target = rows_of(to, 0, stream_bytes);
  if (is_never_written(source)) return true;
  try {
    for (const RowPart& part : row_parts(*layer->plan, kind)) {
      cache_->copy_stream(layer->index, part.kind, int(source.first / source.count), int(target.first / target.count));
    }
  } catch (const std::runtime_error&) {
    return false;  // the exact store cannot be written to; the caller then goes through `load`, which reports it
  }
  layer->refused.copy(kind, source.first, target.first, source.count);
  return true;
}

}  // namespace thimble
