#include "attention/attention.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>

namespace thimble {
namespace {

constexpr float kUnseen = -std::numeric_limits<float>::infinity();
constexpr int kPrefillTokens = 64;  // query tokens to an item, where they share decoded tiles

inline float greater(float a, float b) {
  return a > b ? a : b;
}

}  // namespace

float alibi_slope(float max_bias, int n_heads, int head) {
  if (max_bias <= 0) return 1.0f;
  const int n = 1 << int(std::floor(std::log2(float(n_heads))));
  const float m0 = std::pow(2.0f, -max_bias / float(n));
  const float m1 = std::pow(2.0f, -(max_bias / 2.0f) / float(n));
  return head < n ? std::pow(m0, float(head + 1)) : std::pow(m1, float(2 * (head - n) + 1));
}

void Attention::prepare(const CacheLayer& layer, const AttentionProblem& problem, const Retrieval& retrieval,
                        int n_threads, const Kernels& kernels) {
  layer_ = &layer;
  p_ = problem;
  retrieval_ = retrieval;
  kernels_ = &kernels;
  n_threads_ = n_threads;
  group_ = p_.n_heads / layer_->keys().shape().n_kv_heads;
  memory_.resize(n_threads);
  n_blocks_ = int((p_.n_cells + kBlockCells - 1) / kBlockCells);
  staged_ = !layer.window().stages().empty() && int64_t(layer.window().batch().size()) == p_.n_tokens * p_.n_streams;
  prefills_ = p_.n_tokens > kMaxCodeTokens && !staged_;
  prepare_views();
  leave_out_blocks();
  prepare_parts();
}

void Attention::prepare_views() {
  views_.clear();
  if (staged_) {
    for (const Window::Stage& stage : layer_->window().stages()) {
      views_.push_back({stage.first / p_.n_tokens, stage.first % p_.n_tokens, stage.n});
    }
  } else {
    for (int stream = 0; stream < p_.n_streams; stream++) views_.push_back({stream, 0, p_.n_tokens});
  }
  for (View& view : views_) {
    view.hidden.assign(n_blocks_, 0);
    // A prefill attends to all cells exactly from the store, block by block, where there is one.
    if (!from_store()) list_exact(view);
  }
}

// Lists the cells that a view attends to exactly, with their rows.
void Attention::list_exact(View& view) const {
  const std::vector<Window::Row>& rows = layer_->window().rows();  // in order of cells
  const int64_t cell0 = (p_.first_stream + view.stream) * layer_->keys().shape().cells_per_stream;
  const int first_row = view.stream * p_.n_tokens + view.first_token;
  const Item all = all_tokens(int(&view - views_.data()));
  int block = -1;
  uint64_t seen = ~uint64_t{0};
  const auto take = [&](int cell, const uint16_t* key, const uint16_t* value) {
    // Rows that no query sees, those of idle and of removed sequences, are left out. In a prefill, to find them would
    // cost more than to attend to them.
    if (!prefills() && block != cell / kBlockCells) {
      block = cell / kBlockCells;
      const int first = block * kBlockCells;
      seen = seen_by(all, mask_of(all).at(first), int(std::min<int64_t>(kBlockCells, p_.n_cells - first)));
    }
    const uint64_t bit = uint64_t{1} << (cell % kBlockCells);
    view.hidden[cell / kBlockCells] |= bit;
    if (seen & bit) add_row(view.exact, cell, key, value);
  };
  auto row = std::partition_point(rows.begin(), rows.end(), [&](const Window::Row& r) { return r.cell < cell0; });
  for (; row != rows.end() && row->cell - cell0 < p_.n_cells; ++row) {
    if (staged_ && row->exact_to < first_row) continue;
    take(int(row->cell - cell0), layer_->keys().row_data(*row), layer_->values().row_data(*row));
  }
  for (const ExactCell& exact : p_.exact) take(exact.cell, exact.key, exact.value);
}

// Leaves out the last blocks of which no query sees a coded cell: llama.cpp pads the number of cells, and a short
// context has all its cells in the window. Otherwise these blocks would count as work when threads get their shares.
void Attention::leave_out_blocks() {
  const int n_blocks = std::exchange(n_blocks_, 0);
  for (View& view : views_) {
    const Item all = all_tokens(int(&view - views_.data()));
    view.n_blocks = n_blocks;
    while (view.n_blocks > 0 && !sees_codes(all, view.hidden.data(), view.n_blocks - 1, view.n_blocks)) view.n_blocks--;
    n_blocks_ = std::max(n_blocks_, view.n_blocks);
  }
}

void Attention::add_row(std::vector<ExactTile>& tiles, int cell, const uint16_t* key, const uint16_t* value) {
  if (tiles.empty() || tiles.back().n_cells == kBlockCells) tiles.emplace_back();
  ExactTile& tile = tiles.back();
  tile.cells[tile.n_cells] = cell;
  tile.rows[int(Kind::key)][tile.n_cells] = key;
  tile.rows[int(Kind::value)][tile.n_cells] = value;
  tile.n_cells++;
}

// Tokens that are treated as if they had come one by one are dealt to the threads as one token alone would be. Where a
// cut lies decides which blocks share a scale of their weights (attend_codes).
void Attention::prepare_parts() {
  items_.clear();
  parts_.clear();
  size_t result = 0;
  const int tokens_per_item = prefills() ? kPrefillTokens : retrieves() ? 1 : kMaxCodeTokens;
  for (int view = 0; view < int(views_.size()); view++) {
    const int end = views_[view].first_token + views_[view].n_tokens;
    if (!staged_) add_items(view, views_[view].first_token, end, tokens_per_item);
    for (int t = views_[view].first_token; staged_ && t < end; t += tokens_per_item) {
      const size_t first = items_.size();
      add_items(view, t, std::min(t + tokens_per_item, end), tokens_per_item);
      deal_items(first, &result);
    }
  }
  if (!staged_) deal_items(0, &result);
  results_ = reinterpret_cast<float*>(results_memory_.room(result * sizeof(float)));
  if (retrieves()) prepare_retrieval();
}

void Attention::add_items(int view, int first_token, int end_token, int tokens_per_item) {
  const int n_units =
      block_units(views_[view]) + units_of_tile() * (int(views_[view].exact.size()) + retrieved_tiles());
  for (int head = 0; head < layer_->keys().shape().n_kv_heads; head++) {
    for (int t = first_token; t < end_token; t += tokens_per_item) {
      items_.push_back({view, head, t, std::min(tokens_per_item, end_token - t), n_units, 0, 0, 0, 0});
    }
  }
}

// Cuts the units of the items from `first` on, laid end to end, into one stretch a thread, so that one long sequence
// keeps all threads busy, however many heads there are.
void Attention::deal_items(size_t first, size_t* result) {
  int64_t total = 0;
  for (size_t i = first; i < items_.size(); i++) total += items_[i].n_units;
  int64_t begin = 0;  // of the item, in all units
  int thread = 0;
  for (size_t i = first; i < items_.size(); i++) {
    Item& item = items_[i];
    item.first_part = int(parts_.size());
    const auto add_part = [&](int first_unit, int last_unit) {
      parts_.push_back({int(i), thread, first_unit, last_unit, *result});
      *result += 2 * softmax_size(item.n_tokens * group_);
    };
    if (item.n_units == 0) add_part(0, 0);  // without a visible cell, combine_token writes zeros
    for (int unit = 0; unit < item.n_units;) {
      int64_t end = total * (thread + 1) / n_threads_ - begin;  // of the thread's stretch, from the item's first unit
      if (end <= unit) {
        thread++;
        continue;
      }
      end = std::min<int64_t>(end, item.n_units);
      add_part(unit, int(end));
      unit = int(end);
    }
    item.n_parts = item.parts_left = int(parts_.size()) - item.first_part;
    begin += item.n_units;
  }
}

// Cuts the blocks of all items, laid end to end, into one stretch a thread, as prepare_parts does: a thread then
// attends to nearly the same cells that it has scored, which are still in its processor's cache.
void Attention::prepare_retrieval() {
  scores_.resize(items_.size() * n_blocks_ * kBlockCells);
  const size_t n_kept = keeps_scores() ? scores_.size() * group_ : 0;
  kept_scores_ = reinterpret_cast<float*>(kept_scores_memory_.room(n_kept * sizeof(float)));
  retrieved_.resize(items_.size());
  for (Retrieved& retrieved : retrieved_) retrieved.tiles.clear();
  for (Item& item : items_) item.scorers_left = 0;
  for (int thread = 0; thread < n_threads_; thread++) {
    for_stretch(thread, [&](int item, int, int) { items_[item].scorers_left++; });
  }
}

Mask Attention::mask_of(const Item& item) const {
  if (!p_.mask) return {};
  return {p_.mask + size_t(stream_of(item)) * p_.mask_stream + size_t(item.first_token) * p_.mask_token,
          ptrdiff_t(p_.mask_token)};
}

// The cells that some token of the item sees, a bit each.
uint64_t Attention::seen_by(const Item& item, const Mask& mask, int n_cells) const {
  const uint64_t all = n_cells == 64 ? ~uint64_t{0} : (uint64_t{1} << n_cells) - 1;
  uint64_t seen = mask.data ? 0 : all;
  for (int t = 0; t < item.n_tokens && seen != all; t++) {
    seen |= kernels_->visible(mask.data + t * mask.stride, n_cells);
  }
  return seen;
}

// Whether some token of the item sees a coded cell of these blocks.
bool Attention::sees_codes(const Item& item, const uint64_t* hidden, int first_block, int last_block) const {
  const Mask mask = mask_of(item);
  for (int b = first_block; b < last_block; b++) {
    if (seen_by(item, mask.at(ptrdiff_t(b) * kBlockCells), cells_of_block(b)) & ~hidden[b]) return true;
  }
  return false;
}

const uint64_t* Attention::hidden_of(const Item& item) const {
  return (retrieves() ? retrieved_[index_of(item)].hidden : views_[item.view].hidden).data();
}

void Attention::load_queries(const Item& item, ThreadMemory& memory, Queries& plain, Queries* coded) const {
  const int dim = layer_->key_dim(), n_rows = item.n_tokens * group_;
  memory.q.resize(size_t(n_rows) * dim);
  memory.q_coded.resize(size_t(n_rows) * dim);
  memory.bias.resize(n_rows);
  memory.slope.resize(n_rows);
  for (int row = 0; row < n_rows; row++) {
    const int head = item.kv_head * group_ + row % group_;
    const float* q = p_.q + size_t(stream_of(item)) * p_.q_stream +
                     size_t(item.first_token + row / group_) * p_.q_token + size_t(head) * p_.q_head;
    float* scaled = &memory.q[size_t(row) * dim];
    for (int d = 0; d < dim; d++) scaled[d] = q[d] * p_.scale;
    memory.slope[row] = row < group_ ? alibi_slope(p_.max_bias, p_.n_heads, head) : memory.slope[row - group_];
  }
  const int of_values = layer_->is_latent() ? p_.value_dim : 0;
  plain = {n_rows, group_, dim, memory.q.data(), nullptr, memory.slope.data(), p_.softcap, of_values};
  if (!coded) return;
  code_queries(item, n_rows, memory);
  *coded = {n_rows, group_, dim, memory.q_coded.data(), memory.bias.data(), memory.slope.data(), p_.softcap, of_values};
}

// Transforms memory.q to memory.q_coded, for the codes of the keys and, of a latent layer, of the values; and what the
// means and the score correction add to scores to memory.bias.
void Attention::code_queries(const Item& item, int n_rows, ThreadMemory& memory) const {
  std::fill(memory.bias.begin(), memory.bias.end(), 0.0f);
  const auto code = [&](const HeadCodec& codec, const float* q, float* y) {
    const int dim = codec.format.head_dim;
    codec.transform.query(q, y, n_rows, kernels_->transform);
    for (int row = 0; row < n_rows; row++) {
      memory.bias[row] += codec.transform.query_bias(q + size_t(row) * dim) + codec.score_bias(y + size_t(row) * dim);
    }
  };
  if (!layer_->is_latent()) {
    return code(layer_->keys().codec(item.kv_head), memory.q.data(), memory.q_coded.data());
  }
  const size_t dim = layer_->key_dim();
  size_t first = 0;
  for (Kind kind : {Kind::value, Kind::key}) {
    const HeadCodec& codec = layer_->side(kind).codec(item.kv_head);
    const size_t n = codec.format.head_dim;
    memory.q_part.resize(n_rows * n);
    memory.q_part_coded.resize(n_rows * n);
    for (int row = 0; row < n_rows; row++) std::copy_n(&memory.q[row * dim + first], n, &memory.q_part[row * n]);
    code(codec, memory.q_part.data(), memory.q_part_coded.data());
    for (int row = 0; row < n_rows; row++) {
      std::copy_n(&memory.q_part_coded[row * n], n, &memory.q_coded[row * dim + first]);
    }
    first += n;
  }
}

CodedCells Attention::coded_cells(const Item& item, const uint64_t* hidden, int first_block, int last_block) const {
  const CacheSide &keys = layer_->keys(), &values = layer_->values();
  const int64_t block0 = (p_.first_stream + stream_of(item)) * keys.shape().blocks_per_stream();
  const int32_t* table = keys.places().table;  // which is the values', too
  return {&keys.codec(item.kv_head),
          &values.codec(item.kv_head),
          keys.page(item.kv_head, table ? 0 : block0),
          values.page(item.kv_head, table ? 0 : block0),
          hidden,
          first_block,
          last_block,
          int(p_.n_cells),
          kept_scores(item),
          table ? table + block0 : nullptr,
          keys.places().block_stride,
          values.places().block_stride};
}

// Scores the thread's stretch of blocks. The thread that scores the last of an item's blocks also chooses the item's
// cells and asks the store for their rows, which are then read while other items are scored.
void Attention::retrieve(int thread) {
  for_stretch(thread, [&](int index, int first_block, int last_block) {
    Item& item = items_[index];
    score(item, first_block, last_block, memory_[thread]);
    if (std::atomic_ref(item.scorers_left).fetch_sub(1, std::memory_order_acq_rel) == 1) fetch(item, memory_[thread]);
  });
}

void Attention::score(const Item& item, int first_block, int last_block, ThreadMemory& memory) {
  Queries plain, coded;
  load_queries(item, memory, plain, &coded);
  kernels_->score_codes(coded, coded_cells(item, views_[item.view].hidden.data(), first_block, last_block),
                        mask_of(item), scores_of(item), memory.scratch);
}

// Sets the bits of memory.chosen (a word for each block) of the retrieval_.top cells with the greatest scores.
//
// Most scores need not be compared. Let b be the greatest score of the block that is number retrieval_.top by greatest
// score. Each block up to that one has a cell that scores b or more, so retrieval_.top cells do, and no cell below b is
// chosen. Where so many cells are left that another bound is worth its time, it is the least of the best of these.
void Attention::choose(const float* scores, ThreadMemory& memory) const {
  const size_t top = size_t(retrieval_.top);
  std::vector<float>&maxima = memory.maxima, &ordered = memory.ordered_maxima;
  std::vector<Scored>& cells = memory.cells;
  maxima.resize(n_blocks_);
  kernels_->block_maxima(scores, n_blocks_, maxima.data());
  float bound = std::numeric_limits<float>::lowest();  // above kUnseen
  if (maxima.size() > top) {
    ordered = maxima;
    std::nth_element(ordered.begin(), ordered.begin() + ptrdiff_t(top - 1), ordered.end(), std::greater<>());
    bound = greater(bound, ordered[top - 1]);
  }
  const auto keep_top = [&] {
    if (cells.size() <= top) return;
    std::nth_element(
        cells.begin(), cells.begin() + ptrdiff_t(top - 1), cells.end(),
        [](const Scored& a, const Scored& b) { return a.score != b.score ? a.score > b.score : a.cell < b.cell; });
    bound = greater(bound, cells[top - 1].score);
    cells.resize(top);
  };
  cells.clear();
  for (int b = 0; b < n_blocks_; b++) {
    if (maxima[b] < bound) continue;
    const int first = b * kBlockCells;
    for (uint64_t left = kernels_->at_least(scores + first, bound); left; left &= left - 1) {
      const int cell = first + std::countr_zero(left);
      cells.push_back({scores[cell], cell});
    }
    if (cells.size() >= 4 * top) keep_top();
  }
  keep_top();
  memory.chosen.assign(n_blocks_, 0);
  for (const Scored& cell : cells) memory.chosen[cell.cell / kBlockCells] |= uint64_t{1} << (cell.cell % kBlockCells);
}

// Chooses the item's cells and starts reading their rows.
void Attention::fetch(const Item& item, ThreadMemory& memory) {
  const CacheSide &keys = layer_->keys(), &values = layer_->values();
  const int64_t cell0 = (p_.first_stream + stream_of(item)) * keys.shape().cells_per_stream;
  choose(scores_of(item), memory);
  Retrieved& retrieved = retrieved_[index_of(item)];
  retrieved.hidden = views_[item.view].hidden;
  retrieved.tiles.clear();
  memory.rows.clear();
  for (int b = 0; b < n_blocks_; b++) {
    for (uint64_t left = memory.chosen[b]; left; left &= left - 1) {
      const int cell = b * kBlockCells + std::countr_zero(left);
      const uint16_t *key = keys.store()->row(cell0 + cell), *value = values.store()->row(cell0 + cell);
      if (!key || !value) continue;  // the store was full, or the mask shows a cell that was never written
      memory.rows.push_back(cell0 + cell);
      retrieved.hidden[b] |= left & -left;
      add_row(retrieved.tiles, cell, key, value);
    }
  }
  for (const CacheSide* side : {&keys, &values}) {
    const size_t head_dim = side->format().head_dim;
    side->store()->will_need(memory.rows, item.kv_head * head_dim, head_dim);
  }
}

void Attention::attend_coded(const Item& item, const uint64_t* hidden, int first_block, int last_block,
                             const Queries& queries, ThreadMemory& memory, Softmax& softmax) const {
  kernels_->attend_codes(queries, coded_cells(item, hidden, first_block, last_block), mask_of(item), softmax,
                         memory.scratch);
}

// Attends to a block's cells from their exact rows in the store. Returns the cells that a token sees and that have no
// row: a full store had no room for them, or they were never written.
uint64_t Attention::attend_stored(const Item& item, int block, const Queries& queries, ThreadMemory& memory,
                                  Softmax& softmax) const {
  const CacheSide &keys = layer_->keys(), &values = layer_->values();
  const int64_t cell0 = (p_.first_stream + stream_of(item)) * keys.shape().cells_per_stream;
  const int first = block * kBlockCells;
  std::vector<ExactTile>& tile = memory.stored;
  tile.clear();
  uint64_t without = 0;
  for (uint64_t seen = seen_by(item, mask_of(item).at(first), cells_of_block(block)); seen; seen &= seen - 1) {
    const int cell = first + std::countr_zero(seen);
    const uint16_t *key = keys.stored_row(cell0 + cell), *value = values.stored_row(cell0 + cell);
    if (key && value) {
      add_row(tile, cell, key, value);
    } else {
      without |= seen & -seen;
    }
  }
  if (!tile.empty()) attend_exact(item, tile.front(), queries, memory, softmax);
  return without;
}

void Attention::attend_exact(const Item& item, const ExactTile& exact, const Queries& queries, ThreadMemory& memory,
                             Softmax& softmax) const {
  const int n = exact.n_cells;
  Mask mask = mask_of(item);
  if (mask.data && exact.adjacent()) {
    mask = mask.at(exact.cells[0]);
  } else if (mask.data) {
    memory.exact_mask.resize(size_t(item.n_tokens) * kBlockCells);
    for (int t = 0; t < item.n_tokens; t++) {
      for (int i = 0; i < n; i++) {
        memory.exact_mask[t * kBlockCells + i] = mask.data[t * mask.stride + exact.cells[i]];
      }
    }
    mask = {memory.exact_mask.data(), kBlockCells};
  }
  if (!seen_by(item, mask, n)) return;
  float* k_tile = tile(memory, Kind::key);
  for (Kind kind : {Kind::key, Kind::value}) {
    const CacheSide& side = layer_->side(kind);
    const int dim = side.format().head_dim;
    const uint8_t* rows[kBlockCells];
    for (int i = 0; i < n; i++) {
      rows[i] = reinterpret_cast<const uint8_t*>(exact.rows[int(kind)][i] + size_t(item.kv_head) * dim);
    }
    if (kind == Kind::key) {
      kernels_->load_rows(kind, rows, n, dim, k_tile + size_t(queries.of_values) * kBlockCells);
    } else {
      kernels_->load_rows(kind, rows, n, dim, tile(memory, kind));
      if (queries.of_values > 0) kernels_->load_rows(Kind::key, rows, n, dim, k_tile);
    }
  }
  kernels_->attend_tile(queries, {n, tile(memory, Kind::key), tile(memory, Kind::value), 0}, mask, softmax,
                        memory.scratch);
}

void Attention::attend_part(const Part& part, ThreadMemory& memory) {
  const Item& item = items_[part.item];
  const int n_rows = item.n_tokens * group_, n_blocks = block_units(views_[item.view]);
  const int last_block = std::min(part.last_unit, n_blocks);
  const bool lacks_rows = from_store() && (layer_->keys().store()->is_full() || layer_->values().store()->is_full()) &&
                          layer_->values().coded();
  const bool codes = !from_store() && sees_codes(item, hidden_of(item), part.first_unit, last_block);
  Queries plain, coded;
  load_queries(item, memory, plain, codes || lacks_rows ? &coded : nullptr);
  Softmax softmax[2];
  for (int i = 0; i < 2; i++) {
    float* at = &results_[part.result + i * softmax_size(n_rows)];
    std::fill_n(at, softmax_size(n_rows), 0.0f);
    softmax[i] = softmax_at(at, n_rows);
    std::fill_n(softmax[i].max, n_rows, kUnseen);
  }
  if (from_store()) {
    for (int block = part.first_unit; block < last_block; block++) {
      const uint64_t without = attend_stored(item, block, plain, memory, softmax[1]);
      if (!lacks_rows || !without) continue;
      memory.chosen.resize(n_blocks_);
      memory.chosen[block] = ~without;
      attend_coded(item, memory.chosen.data(), block, block + 1, coded, memory, softmax[0]);
    }
  } else if (codes) {
    attend_coded(item, hidden_of(item), part.first_unit, last_block, coded, memory, softmax[0]);
  }
  const std::vector<ExactTile>& exact = views_[item.view].exact;
  for (int unit = std::max(part.first_unit, n_blocks); unit < part.last_unit; unit++) {
    // A tile counts as several units; the part that has the first of them attends to the whole tile.
    if ((unit - n_blocks) % units_of_tile() != 0) continue;
    const size_t at = (unit - n_blocks) / units_of_tile();
    if (at < exact.size()) {
      attend_exact(item, exact[at], plain, memory, softmax[1]);
      continue;
    }
    const std::vector<ExactTile>& retrieved = retrieved_[part.item].tiles;
    if (at - exact.size() < retrieved.size()) {
      attend_exact(item, retrieved[at - exact.size()], plain, memory, softmax[1]);
    }
  }
}

void Attention::attend(int thread) {
  for (const Part& part : parts_) {
    if (part.thread != thread) continue;
    attend_part(part, memory_[thread]);
    Item& item = items_[part.item];
    if (std::atomic_ref(item.parts_left).fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
    for (int t = 0; t < item.n_tokens; t++) combine_token(item, t, memory_[thread]);
  }
}

// Writes the output of one token's heads. Brings the parts of each head to a common maximum and adds them up; the sum
// over coded cells is in the transformed domain, and is transformed back.
void Attention::combine_token(const Item& item, int token, ThreadMemory& memory) {
  const int dim = p_.value_dim, n_rows = item.n_tokens * group_;
  memory.sums.assign(size_t(group_) * dim, 0.0f);
  memory.out.resize(size_t(group_) * dim);
  memory.weights.assign(group_, 0.0f);
  std::vector<float>& totals = memory.slope;
  totals.assign(group_, 0.0f);
  float* results = p_.out + size_t(stream_of(item)) * p_.out_stream + size_t(item.first_token + token) * p_.out_token;
  for (int g = 0; g < group_; g++) {
    const int row = token * group_ + g, head = item.kv_head * group_ + g;
    float* result = results + size_t(head) * p_.out_head;
    std::fill_n(result, dim, 0.0f);
    float greatest = p_.sinks ? p_.sinks[head] : kUnseen;
    const auto for_each = [&](const auto& visit) {
      for (int i = item.first_part; i < item.first_part + item.n_parts; i++) {
        for (bool exact : {false, true}) {
          const Softmax part = softmax_at(&results_[parts_[i].result + (exact ? softmax_size(n_rows) : 0)], n_rows);
          visit(part, exact);
        }
      }
    };
    for_each([&](const Softmax& part, bool) { greatest = std::max(greatest, part.max[row]); });
    if (greatest == kUnseen) continue;  // no visible cell: zeros, as in ggml
    for_each([&](const Softmax& part, bool exact) {
      if (part.max[row] == kUnseen && !std::isnan(part.sum[row])) return;
      const float weight = weight_of(part.max[row] - greatest);
      const float* acc = part.acc + size_t(row) * dim;
      float* to = exact ? result : &memory.sums[size_t(g) * dim];
      (exact ? totals : memory.weights)[g] += weight * part.sum[row];
      for (int d = 0; d < dim; d++) to[d] += weight * acc[d];
    });
    totals[g] += memory.weights[g] + (p_.sinks ? std::exp(p_.sinks[head] - greatest) : 0.0f);
  }
  // A short context has no coded cells yet: nothing to transform.
  if (std::any_of(memory.weights.begin(), memory.weights.end(), [](float w) { return w != 0; })) {
    layer_->values()
        .codec(item.kv_head)
        .transform.output(memory.sums.data(), memory.weights.data(), memory.out.data(), group_, kernels_->transform);
  } else {
    memory.out.assign(memory.sums.size(), 0.0f);
  }
  for (int g = 0; g < group_; g++) {
    float* result = results + size_t(item.kv_head * group_ + g) * p_.out_head;
    const float inverse = totals[g] != 0 ? 1.0f / totals[g] : 0.0f;
    for (int d = 0; d < dim; d++) result[d] = (result[d] + memory.out[size_t(g) * dim + d]) * inverse;
  }
}

}  // namespace thimble
