#include "cuda/host/window.h"

#include <algorithm>
#include <initializer_list>
#include <utility>

namespace thimble::cuda {
namespace {

constexpr size_t kAlignment = 256;

Status copy(void* to, const void* from, size_t size) {
  return Status::from(cudaMemcpy(to, from, size, cudaMemcpyDefault));
}

}  // namespace

int DeviceWindow::rows_of_stream(WindowSize size, int64_t cells_per_stream, int n_streams) {
  return std::min(Window::slots_of_stream(size, cells_per_stream, n_streams) + kMaxTokens, kMaxWindowRows);
}

// Books, cells, order and sequence are adjacent: read and write copy them at once.
size_t DeviceWindow::place(const CacheShape& shape, int capacity, uint8_t* memory, LayerWindow* window) {
  const size_t n = size_t(shape.n_streams), rows = n * capacity;
  size_t at = 0;
  const auto array = [&]<typename T>(T*& to, size_t size) {
    to = reinterpret_cast<T*>(memory + at);
    at += size * sizeof(T);
  };
  array(window->leaving_cells, rows);
  array(window->books, n);
  array(window->cells, rows);
  array(window->order, rows);
  array(window->sequence, rows);
  array(window->tokens, rows);
  array(window->leaving_slots, rows);
  array(window->judges, n * judges_of_stream(shape.n_streams));
  array(window->token_slots, n * kMaxTokens);
  array(window->marks, n * kMaxTokens);
  array(window->n_leaving, 2);
  array(window->hidden, n * size_t(shape.blocks_per_stream()) * kBlockCells / 32);
  return (at + kAlignment - 1) / kAlignment * kAlignment;
}

size_t DeviceWindow::bytes(const CacheShape& shape, int capacity) {
  LayerWindow window;
  return place(shape, capacity, nullptr, &window);
}

Status DeviceWindow::init(const CacheShape& shape, WindowSize size, int capacity, uint8_t* memory, const uint16_t* keys,
                          int head_dim) {
  shape_ = shape;
  capacity_ = capacity;
  view_.last = size.last;
  view_.pool = size.pool;
  view_.spare = size.spare;
  view_.n_kv_heads = shape.n_kv_heads;
  view_.head_dim = head_dim;
  view_.keys = keys;
  place(shape, capacity, memory, &view_);
  return clear();
}

Status DeviceWindow::clear() {
  if (Status s = fill_memory(view_.leaving_cells, 0, bytes(shape_, capacity_)); !s.ok()) return s;
  for (int32_t* unused : {view_.cells, view_.tokens}) {
    if (Status s = fill_memory(unused, 0xff, rows() * sizeof(int32_t)); !s.ok()) return s;  // -1
  }
  return fill_memory(view_.judges, 0xff, size_t(shape_.n_streams) * n_judges() * sizeof(int32_t));
}

Status DeviceWindow::keep_queries(int n_heads, bool* changed) {
  *changed = false;
  const int group = n_heads / view_.n_kv_heads;
  if ((view_.queries && view_.group == group) || view_.pool == 0) return {};
  view_.group = group;
  if (Status s = queries_.reserve(shape_.n_streams * stream_queries() * sizeof(float)); !s.ok()) return s;
  view_.queries = queries_.as<float>();
  *changed = true;
  return {};
}

Status DeviceWindow::copy_stream(int from, int to) {
  const auto copy_share = [&](auto* all, size_t n) { return copy(all + to * n, all + from * n, n * sizeof(*all)); };
  // Streams count batches alike, so that is the same in both.
  if (Status s = copy_share(view_.books, 1); !s.ok()) return s;
  if (Status s = copy_share(view_.cells, capacity_); !s.ok()) return s;
  if (Status s = copy_share(view_.order, capacity_); !s.ok()) return s;
  if (Status s = copy_share(view_.sequence, capacity_); !s.ok()) return s;
  if (Status s = copy_share(view_.hidden, hidden_stride()); !s.ok() || !view_.queries) return s;
  return copy_share(view_.queries, stream_queries());
}

Status DeviceWindow::read(HostWindow* window) const {
  window->n_streams = shape_.n_streams;
  window->cells_per_stream = int(shape_.cells_per_stream);
  window->last = view_.last;
  window->pool = view_.pool;
  window->spare = view_.spare;
  window->slots = capacity_ - kMaxTokens;
  window->capacity = capacity_;
  const WindowBooks* end = reinterpret_cast<const WindowBooks*>(view_.tokens);
  std::vector<uint8_t> all(reinterpret_cast<const uint8_t*>(end) - reinterpret_cast<const uint8_t*>(view_.books));
  if (const cudaError_t e = cudaDeviceSynchronize(); e != cudaSuccess) return Status::from(e);
  if (Status s = copy(all.data(), view_.books, all.size()); !s.ok()) return s;
  const uint8_t* from = all.data();
  const auto take = [&](auto& to, size_t n) {
    to.resize(n);
    std::copy_n(from, n * sizeof(to[0]), reinterpret_cast<uint8_t*>(to.data()));
    from += n * sizeof(to[0]);
  };
  take(window->books, shape_.n_streams);
  take(window->cells, rows());
  take(window->order, rows());
  take(window->sequence, rows());
  window->list_hidden(hidden_stride());
  return {};
}

Status DeviceWindow::write(const HostWindow& window) {
  std::vector<uint8_t> all;
  const auto add = [&](const auto& from) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(from.data());
    all.insert(all.end(), bytes, bytes + from.size() * sizeof(from[0]));
  };
  add(window.books);
  add(window.cells);
  add(window.order);
  add(window.sequence);
  if (Status s = copy(view_.books, all.data(), all.size()); !s.ok()) return s;
  if (Status s = copy(view_.hidden, window.hidden.data(), window.hidden.size() * sizeof(uint32_t)); !s.ok()) return s;
  return Status::from(cudaDeviceSynchronize());
}

Status WindowScratch::init(const CacheShape& shape, int capacity) {
  shape_ = shape;
  capacity_ = capacity;
  const size_t n = size_t(shape.n_streams), rows = n * capacity, cells = size_t(shape.n_cells());
  for (const auto& [memory, bytes] : std::initializer_list<std::pair<DeviceMemory*, size_t>>{
           {&marks_, cells * sizeof(uint32_t)},  // no batch has more tokens
           {&slots_, cells * sizeof(int32_t)},
           {&kept_cells_, rows * sizeof(int32_t)},
           {&flags_, rows},
           {&jobs_, n * kMaxJudgeJobs * sizeof(JudgeJob)},
           {&n_jobs_, n * sizeof(int)}}) {
    if (Status s = memory->reserve(bytes); !s.ok()) return s;
  }
  return {};
}

WindowArgs WindowScratch::finish() const {
  WindowArgs args;
  args.part = WindowArgs::finish;
  args.n_streams = shape_.n_streams;
  args.cells_per_stream = int(shape_.cells_per_stream);
  args.slots = capacity_ - kMaxTokens;
  args.capacity = capacity_;
  args.n_judges = DeviceWindow::judges_of_stream(shape_.n_streams);
  args.hidden_stream_stride = size_t(shape_.blocks_per_stream()) * kBlockCells / 32;
  return args;
}

WindowArgs WindowScratch::batch(const int64_t* cells, int n_tokens, const BatchMask& mask) const {
  WindowArgs args = finish();
  args.part = WindowArgs::whole;
  args.n_tokens = n_tokens;
  args.cells = cells;
  args.mask = mask.data;
  args.mask_token_stride = mask.token_stride;
  args.mask_stream_stride = mask.stream_stride;
  args.mask_tokens = mask.n_tokens;
  args.mask_cells = mask.n_cells;
  args.n_batch_streams = mask.n_streams;
  return args;
}

void WindowScratch::add_prompt(WindowArgs* args) const {
  args->token_slots = slots_.as<int32_t>();
  args->marks = marks_.as<uint32_t>();
  args->kept_cells = kept_cells_.as<int32_t>();
  args->flags = flags_.as<uint8_t>();
}

size_t WindowScratch::place_prompt(WindowArgs* args, char* memory) const {
  const size_t layers = size_t(args->n_layers), streams = layers * shape_.n_streams;
  size_t at = 0;
  const auto array = [&]<typename T>(T*& to, size_t size) {
    to = reinterpret_cast<T*>(memory + at);
    at += (size * sizeof(T) + 15) / 16 * 16;
  };
  JudgeList& judge = args->judge;
  judge.max_entries = judge_entries(args->mask_tokens);
  array(args->token_slots, layers * args->n_tokens);
  array(args->marks, layers * args->n_tokens);
  array(args->flags, streams * capacity_);
  array(judge.jobs, streams * kMaxJudgeJobs);
  array(judge.n_jobs, streams);
  array(judge.entries, streams * judge.max_entries);
  array(judge.scores, streams * judge.max_entries);
  return at;
}

size_t WindowScratch::prompt_bytes(const WindowArgs& args) const {
  WindowArgs placed = args;
  return place_prompt(&placed, nullptr);
}

void WindowScratch::add_prompt(WindowArgs* args, char* memory) const {
  place_prompt(args, memory);
  args->by_layer = true;
}

WindowArgs WindowScratch::from_layer(WindowArgs args, size_t first, size_t n) {
  args.judge = args.judge_of(int(first));
  args.layers += first;
  args.n_layers = int(n);
  args.token_slots += first * args.layer_tokens();
  args.marks += first * args.layer_tokens();
  args.flags += first * args.layer_rows();
  return args;
}

// Sequences of one stream may share cells, which are then entries of several jobs.
int WindowScratch::judge_entries(int stream_tokens) const {
  const int tiles = (capacity_ + stream_tokens + kJudgeTile - 1) / kJudgeTile;
  return (2 * tiles + 8) * kJudgeTile;
}

size_t WindowScratch::judge_bytes(int stream_tokens) const {
  return size_t(shape_.n_streams) * judge_entries(stream_tokens) * (sizeof(int32_t) + sizeof(uint32_t));
}

JudgeList WindowScratch::judge_list(int stream_tokens, char* memory) const {
  const int n = judge_entries(stream_tokens);
  int32_t* entries = reinterpret_cast<int32_t*>(memory);
  uint32_t* scores = reinterpret_cast<uint32_t*>(entries + size_t(shape_.n_streams) * n);
  return {jobs_.as<JudgeJob>(), n_jobs_.as<int>(), entries, scores, n};
}

}  // namespace thimble::cuda
