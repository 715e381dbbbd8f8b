#include "engine/cpu/cpu_cache.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cache/state_row.h"
#include "codec/half.h"
#include "kernels/kernels.h"

namespace thimble {
namespace {

// With an exact store the window is the last cells alone. It needs no pool, since the cells that matter most are
// retrieved, and has no spare cells, since a saved state, all exact rows then, would not tell which cells were coded.
WindowSize window_size(const LayerPlan& plan) {
  WindowSize size = plan.window;
  if (plan.top > 0 && size.total() > 0) size = {.last = size.last, .pool = 0, .spare = 0, .drafts = size.one_by_one()};
  return size;
}

}  // namespace

int CpuCache::n_slots(const LayerPlan& plan) {
  return plan.top > 0 ? 0 : plan.window.slots() * plan.shape.n_streams;
}

int CpuCache::max_slots(const LayerPlan& plan) {
  const WindowSize size = window_size(plan);
  if (size.total() == 0) return 0;
  return Window::slots_of_stream(size, plan.shape.cells_per_stream, plan.shape.n_streams) * plan.shape.n_streams;
}

void CpuCache::add_layer(const LayerPlan& plan, const LayerCodecs& codecs, uint8_t* const memory[2]) {
  const auto side = [&](Kind kind) {
    std::unique_ptr<ExactStore> store;
    if (plan.top > 0) {
      const int64_t n_rows = plan.shape.n_cells();
      const size_t row_size = size_t(plan.shape.n_kv_heads) * plan.side(kind).head_dim;
      store = settings_.store == Settings::Store::file ? ExactStore::file(settings_.path, n_rows, row_size)
                                                       : ExactStore::ram(n_rows, row_size);
    }
    return CacheSide(plan.shape, codecs.sides[int(kind)], n_slots(plan), memory[int(kind)], std::move(store),
                     plan.has_codes[int(kind)]);
  };
  const WindowSize size = window_size(plan);
  const int n_streams = plan.shape.n_streams;
  Layer layer;
  layer.cache = std::make_unique<CacheLayer>(side(Kind::key), side(Kind::value),
                                             Window(size, max_slots(plan), plan.shape.cells_per_stream, n_streams),
                                             plan.latent > 0);
  layer.retrieval = {plan.top, plan.drop_tail};
  layer.hashes = plan.hashes;
  layers_[plan.layer] = std::move(layer);
}

void CpuCache::write(const Lane& lane, const WriteTask& task) {
  Layer& layer = layers_.at(task.layer);
  const Team& team = *lane.team;
  if (task.n_rows <= kMaxCodeTokens) {  // the threads would wait for one another longer than it takes to copy the rows
    team.leave_to_first([&] {
      begin_write(layer, task);
      write_rows(layer, task, 0, 1);
    });
  } else if (team.lead([&] { begin_write(layer, task); })) {
    write_rows(layer, task, team.thread(), team.size());
  }
}

void CpuCache::begin_write(Layer& layer, const WriteTask& task) {
  std::vector<int64_t>& cells = layer.cells[int(task.kind)];
  cells.resize(task.n_rows);
  for (int64_t i = 0; i < task.n_rows; i++) cells[i] = task.cell(i);
  layer.cache->begin_write(task.kind, cells);
}

void CpuCache::write_rows(Layer& layer, const WriteTask& task, int thread, int n_threads) {
  const int row_size = layer.cache->side(task.kind).row_size();
  std::vector<uint16_t> row(row_size);
  for (int64_t i = thread; i < task.n_rows; i += n_threads) {
    const char* at = static_cast<const char*>(task.rows) + i * task.row_bytes;
    if (task.is_f16) {
      std::memcpy(row.data(), at, row_size * sizeof(uint16_t));
    } else {
      std::transform(reinterpret_cast<const float*>(at), reinterpret_cast<const float*>(at) + row_size, row.begin(),
                     float_to_half);
    }
    layer.cache->write_row(task.kind, int(i), row.data());
  }
}

bool CpuCache::attend(const Lane& lane, const AttendTask& task, DenseAttention*) {
  Layer& layer = layers_.at(task.layer);
  const Team& team = *lane.team;
  if (!team.lead([&] { begin_attend(layer, task, team.size()); })) return true;
  if (task.ends_batch) code_leaving(*layer.cache, team);
  if (attention_.retrieves()) {
    attention_.retrieve(team.thread());
    team.wait();
  }
  attention_.attend(team.thread());
  if (task.ends_batch && team.is_last()) layer.cache->end_commit();
  return true;
}

void CpuCache::begin_attend(Layer& layer, const AttendTask& task, int n_threads) {
  CacheLayer& cache = *layer.cache;
  const AttentionProblem& problem = task.problem;
  settle(cache, task.sight());
  if (task.ends_batch) {
    begin_commit(cache, task.sight(),
                 {problem.q, problem.n_heads, task.key_dim, problem.n_tokens, problem.q_token, problem.q_head,
                  problem.q_stream});
  }
  attention_.prepare(cache, problem, layer.retrieval, n_threads, kernels());
}

void CpuCache::read(const Lane& lane, const ReadTask& task) {
  Layer& layer = layers_.at(task.layer);
  const Team& team = *lane.team;
  if (!team.lead([&] { begin_read(layer, task); })) return;
  if (task.ends_batch) code_leaving(*layer.cache, team);
  read_rows(layer, task, team.thread(), team.size());
  if (task.ends_batch && team.is_last()) layer.cache->end_commit();
}

void CpuCache::begin_read(Layer& layer, const ReadTask& task) {
  CacheLayer& cache = *layer.cache;
  const CacheSide& side = cache.side(task.kind);
  const int64_t per_stream = side.shape().cells_per_stream;
  settle(cache, task.sight);
  layer.exact.assign(size_t(task.n_streams) * task.n_cells, nullptr);
  const auto keep = [&](int64_t cell, const uint16_t* row) {
    const int64_t stream = cell / per_stream - task.first_stream, in_stream = cell % per_stream;
    if (stream < 0 || stream >= task.n_streams || in_stream >= task.n_cells) return;
    layer.exact[stream * task.n_cells + in_stream] = row;
  };
  for (int64_t i = 0; side.store() && i < task.n_streams * task.n_cells; i++) {
    const int64_t cell = (task.first_stream + i / task.n_cells) * per_stream + i % task.n_cells;
    keep(cell, side.stored_row(cell));
  }
  for (const Window::Row& row : cache.window().rows()) keep(row.cell, side.row_data(row));
  if (task.ends_batch) begin_commit(cache, task.sight, task.queries);
}

void CpuCache::read_rows(const Layer& layer, const ReadTask& task, int thread, int n_threads) {
  const CacheSide& side = layer.cache->side(task.kind);
  const size_t row_size = side.row_size(), n_cells = task.n_cells;
  std::vector<float> decoded(row_size);
  std::vector<uint16_t> row(row_size);
  const size_t total = task.n_streams * n_cells;
  for (size_t i = total * thread / n_threads; i < total * (thread + 1) / n_threads; i++) {
    const size_t stream = i / n_cells, in_stream = i % n_cells;
    if (layer.exact[i]) {
      std::copy_n(layer.exact[i], row_size, row.begin());
    } else if (side.coded()) {
      side.decode_row((task.first_stream + stream) * side.shape().cells_per_stream + in_stream, decoded.data());
      std::transform(decoded.begin(), decoded.end(), row.begin(), float_to_half);
    } else {
      std::fill(row.begin(), row.end(), 0);  // never written
    }
    const size_t stride = task.row_stride ? task.row_stride : row_size;
    uint16_t* to = task.rows + stream * n_cells * stride + in_stream * (task.transposed ? 1 : stride);
    for (size_t k = 0; k < row_size; k++) to[task.transposed ? k * n_cells : k] = row[k];
  }
}

// Whether the batch that was written is the one that attends now.
static bool is_of_batch(const CacheLayer& cache, const BatchSight& sight) {
  return int64_t(cache.window().batch().size()) == sight.n_tokens * sight.n_streams;
}

// Lets cells leave that wait to.
void CpuCache::settle(CacheLayer& cache, const BatchSight& sight) {
  if (!is_of_batch(cache, sight)) return;
  const int64_t per_stream = cache.keys().shape().cells_per_stream;
  cache.settle([&](int row, int64_t cell) { return sight.sees(row, cell, per_stream); });
}

void CpuCache::begin_commit(CacheLayer& cache, const BatchSight& sight, const BatchQueries& queries) {
  const bool matches = is_of_batch(cache, sight);
  const int64_t per_stream = cache.keys().shape().cells_per_stream;
  cache.begin_commit([&](int row, int64_t cell) { return !matches || sight.sees(row, cell, per_stream); },
                     matches ? queries : BatchQueries{});
}

// Codes are written before they are read: tokens of this batch may attend to cells that left with earlier ones.
void CpuCache::code_leaving(CacheLayer& cache, const Team& team) {
  if (!cache.codes_leaving()) return;
  cache.code_leaving(team.thread(), team.size());
  team.wait();
}

void CpuCache::read_cells(int layer, Kind kind, int64_t first, int64_t n, uint8_t* rows) {
  const Layer& from = layers_.at(layer);
  const size_t row_bytes = size_t(from.cache->side(kind).row_size()) * sizeof(uint16_t);
  for (int64_t i = 0; i < n; i++) save_cell(*from.cache, kind, first + i, from.hashes, rows + i * row_bytes);
}

RefusedRows CpuCache::write_cells(int layer, Kind kind, std::span<const int64_t> cells, const uint8_t* rows) {
  const Layer& to = layers_.at(layer);
  const size_t row_bytes = size_t(to.cache->side(kind).row_size()) * sizeof(uint16_t);
  RefusedRows refused;
  for (size_t i = 0; i < cells.size(); i++) {
    try {
      load_cell(*to.cache, kind, cells[i], to.hashes, rows + i * row_bytes);
    } catch (const std::runtime_error& error) {
      if (refused.entries.empty()) refused.why = error.what();
      refused.entries.push_back(i);
    }
  }
  return refused;
}

KeyRows CpuCache::read_keys(int layer, std::span<const int64_t> cells, std::span<const int32_t> shifts) {
  const CacheLayer& cache = cache_of(layer);
  const CacheSide& side = cache.keys();
  const int row_size = side.row_size();
  keys_.resize(cells.size() * row_size);
  shifts_.assign(shifts.begin(), shifts.end());
  for (size_t i = 0; i < cells.size(); i++) {
    float* row = keys_.data() + i * row_size;
    if (const uint16_t* exact = cache.exact_row(Kind::key, cells[i])) {
      std::transform(exact, exact + row_size, row, half_to_float);
    } else {
      side.decode_row(cells[i], row);
    }
  }
  return {keys_.data(), shifts_.data()};
}

void CpuCache::write_keys(int layer, std::span<const int64_t> cells) {
  CacheLayer& cache = cache_of(layer);
  const CacheSide& side = cache.keys();
  const int row_size = side.row_size();
  std::vector<uint16_t> row(row_size);
  for (size_t i = 0; i < cells.size(); i++) {
    std::transform(keys_.begin() + i * row_size, keys_.begin() + (i + 1) * row_size, row.begin(), float_to_half);
    if (uint16_t* exact = cache.exact_row(Kind::key, cells[i])) std::copy(row.begin(), row.end(), exact);
    if (cache.needs_codes(cells[i])) side.encode_row(row.data(), cells[i]);
  }
}

void CpuCache::copy_stream(int layer, Kind kind, int from, int to) {
  cache_of(layer).copy_stream(kind, from, to);
}

void CpuCache::clear() {
  for (auto& [index, layer] : layers_) layer.cache->clear();
}

std::string CpuCache::take_warning() {
  if (told_of_full_store_) return {};
  for (const auto& [index, layer] : layers_) {
    const ExactStore *keys = layer.cache->keys().store(), *values = layer.cache->values().store();
    if (!keys || (!keys->is_full() && !values->is_full())) continue;
    told_of_full_store_ = true;
    return "the disk of the exact store, " + settings_.path +
           ", is full: cells that find no room there are read from " +
           (settings_.drop_tail ? "their codes while they are the last ones, and not after" : "their codes") +
           ". Free some room, choose another directory (path=) or a smaller context";
  }
  return {};
}

}  // namespace thimble
