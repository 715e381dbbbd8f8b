// A layer on the CPU and its window on a device, emulated or there, which get the same keys, queries and masks: the
// same cells are exact while each batch is attended to.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "cache/layer.h"
#include "fixture.h"
#include "test_window.h"

namespace thimble::cuda {

struct PairShape {
  WindowSize size;
  int n_kv_heads = 2, group = 2, n_streams = 1, n_cells = 512;
  int sequences = 4;    // of a stream, that have slots
  bool staged = false;  // prompts' cells are scored behind the graph, by kept rows and means of queries
};

struct PairToken {
  int stream, sequence;
};

/// `Device`: as TestWindow's, judge_cells(args), prepare_prompt<head size>(args) and tables_of(HostTables).
template <typename Device>
class Pair {
  template <typename T>
  using Vector = typename Device::template Vector<T>;
  static constexpr int kDim = 64;

public:
  Pair(const PairShape& shape, unsigned seed)
      : s_(shape),
        random_(seed),
        window_(shape.size, shape.sequences * shape.size.slots(), shape.n_cells, shape.n_streams) {
    const CacheShape cache{s_.n_kv_heads, s_.n_cells, s_.n_streams};
    const int n_slots = window_.slots * s_.n_streams;
    std::vector<CacheSide> sides;
    for (Kind kind : {Kind::key, Kind::value}) {
      auto codecs = std::make_shared<std::vector<HeadCodec>>();
      for (int h = 0; h < s_.n_kv_heads; h++) codecs->push_back(make_uncalibrated_codec(kind, make_format(kDim, 2)));
      tables_.push_back(Device::tables_of(pack_tables(*codecs)));
      memory_[int(kind)].resize(CacheSide::memory_bytes(cache, codecs->front().format, n_slots));
      sides.emplace_back(cache, codecs, n_slots, memory_[int(kind)].data());
    }
    cpu_ = std::make_unique<CacheLayer>(std::move(sides[0]), std::move(sides[1]),
                                        Window(s_.size, n_slots, s_.n_cells, s_.n_streams));
    keys_.resize(size_t(s_.n_streams) * s_.n_kv_heads * window_.a.capacity * kDim, 0x7e00);
    queries_.resize(size_t(s_.n_streams) * window_.a.n_judges * n_heads() * kDim, NAN);
    window_.w.n_kv_heads = s_.n_kv_heads;
    window_.w.group = s_.group;
    window_.w.head_dim = kDim;
    window_.w.keys = keys_.data();
    window_.w.queries = queries_.data();
  }

  /// A batch. Sequences are numbered within their stream. Whether the same cells are exact on both.
  bool run(const std::vector<PairToken>& tokens) {
    const int n = int(tokens.size());
    Vector<int64_t> cells;
    for (const PairToken& token : tokens) {
      const int64_t cell = free_cell(token.stream);
      cells.push_back(cell);
      owner_[cell] = {token.sequence, length_[{token.stream, token.sequence}]++};
    }
    std::set<int> streams;
    for (const PairToken& token : tokens) streams.insert(token.stream);
    const int row = s_.n_kv_heads * kDim;
    const std::vector<float> values = random_.normals(size_t(n) * row);
    const std::vector<float> numbers = random_.normals(size_t(n) * n_heads() * kDim);
    Vector<float> keys, queries(numbers.begin(), numbers.end());
    for (size_t i = 0; i < queries.size(); i++)
      queries[i] += i % kDim < 4 ? 2.0f : 0.0f;  // queries resemble each other
    for (int i = 0; i < n; i++) {
      const float along = random_.below(8) == 0 ? 2.0f : 0.0f;  // and some keys them
      for (int d = 0; d < row; d++) keys.push_back(random_.normal() + (d % kDim < 4 ? along : 0));
    }
    const auto sees = [&](int token, int64_t cell) {
      const auto it = owner_.find(cell);
      const auto& [sequence, position] = owner_.at(cells[token]);
      return it != owner_.end() && cell / s_.n_cells == cells[token] / s_.n_cells && it->second.first == sequence &&
             it->second.second <= position;
    };

    for (Kind kind : {Kind::key, Kind::value}) {
      cpu_->begin_write(kind, cells);
      std::vector<uint16_t> rounded(row);
      for (int i = 0; i < n; i++) {
        const float* from = (kind == Kind::key ? keys.data() : values.data()) + size_t(i) * row;
        std::transform(from, from + row, rounded.begin(), float_to_half);
        cpu_->write_row(kind, i, rounded.data());
      }
    }
    cpu_->settle(sees);
    std::vector<int64_t> expected;
    // A device makes cells of other streams leave when these have a batch again.
    const auto is_of_batch = [&](int64_t cell) { return streams.count(int(cell / s_.n_cells)) > 0; };
    for (const Window::Row& r : cpu_->window().rows()) {
      if (is_of_batch(r.cell)) expected.push_back(r.cell);
    }

    Vector<uint16_t> mask;
    for (int i = 0; i < n; i++) {
      for (int64_t cell = 0, first = tokens[i].stream * s_.n_cells; cell < s_.n_cells; cell++) {
        mask.push_back(sees(i, first + cell) ? 0 : 0xfc00);
      }
    }
    window_.begin(cells, mask);
    WindowArgs& a = window_.a;
    a.n_batch_streams = int(streams.size());
    a.mask_tokens = n / a.n_batch_streams;
    a.mask_stream_stride = size_t(a.mask_tokens) * s_.n_cells;
    std::vector<int64_t> exact = n > kMaxTokens * a.n_batch_streams
                                     ? take_prompt(cells, keys, queries, *streams.begin())
                                     : take(queries, *streams.begin());
    std::erase_if(exact, [&](int64_t cell) { return !is_of_batch(cell); });
    if (exact != expected) return false;
    note_unlike_oldest(exact);
    for (int i = 0; i < n; i++) {
      if (window_.token_slots[i] < 0) continue;
      for (int h = 0; h < s_.n_kv_heads; h++) {
        const size_t at = (size_t(tokens[i].stream * s_.n_kv_heads + h) * a.capacity + window_.token_slots[i]) * kDim;
        for (int d = 0; d < kDim; d++) keys_[at + d] = float_to_half(keys[size_t(i) * row + h * kDim + d]);
      }
    }
    cpu_->begin_commit(sees, {queries.data(), n_heads(), kDim, n, size_t(n_heads()) * kDim, kDim, 0});
    cpu_->code_leaving(0, 1);
    cpu_->end_commit();
    return true;
  }

  /// A sequence's last n tokens are taken back.
  void remove(int stream, int sequence, int n) {
    const int end = length_[{stream, sequence}] -= n;
    std::erase_if(owner_, [&](const auto& entry) {
      return entry.first / s_.n_cells == stream && entry.second.first == sequence && entry.second.second >= end;
    });
  }
  /// The end of the last batch in a launch of its own, as states need it.
  void finish() { window_.finish(); }

  Random& random() { return random_; }
  int n_unlike_oldest() const { return n_unlike_oldest_; }

private:
  int n_heads() const { return s_.n_kv_heads * s_.group; }

  /// The stream's next cell that nobody has; states and chats leave holes.
  int64_t free_cell(int stream) {
    int64_t& next = next_[stream];
    for (;; next++) {
      if (next % 7 == 5 && next < s_.n_cells) continue;
      if (next >= s_.n_cells) next = 0;
      if (!owner_.count(stream * s_.n_cells + next)) return stream * s_.n_cells + next++;
    }
  }

  std::vector<int64_t> take(const Vector<float>& queries, int first_stream) {
    window_.run();
    // As attention does it.
    const size_t size = size_t(n_heads()) * kDim;
    for (int stream = 0; stream < s_.n_streams; stream++) {
      for (int j = 0; j < window_.a.n_judges; j++) {
        const int token = window_.judges[stream * window_.a.n_judges + j];
        if (token < 0) continue;
        const size_t from = size_t(stream - first_stream) * window_.a.mask_tokens + token;
        std::copy_n(&queries[from * size], size, &queries_[(size_t(stream) * window_.a.n_judges + j) * size]);
      }
    }
    return window_.exact();
  }

  std::vector<int64_t> take_prompt(const Vector<int64_t>& cells, const Vector<float>& keys,
                                   const Vector<float>& queries, int first_stream) {
    WindowArgs& a = window_.a;
    const int n_entries = 2 * (a.capacity + a.n_tokens + kJudgeTile) / kJudgeTile * kJudgeTile + 8 * kJudgeTile;
    // Of two layers: this one is the second.
    Vector<JudgeJob> jobs(2 * s_.n_streams * kMaxJudgeJobs);
    Vector<int> n_jobs(2 * s_.n_streams, 99);
    Vector<int32_t> entries(2 * s_.n_streams * n_entries, 1 << 20), kept(size_t(s_.n_streams) * a.capacity);
    Vector<uint32_t> scores(entries.size(), UINT32_MAX);
    Vector<uint8_t> flags(kept.size(), 0xff);
    a.kept_cells = kept.data();
    a.flags = flags.data();
    const JudgeList lists{jobs.data(), n_jobs.data(), entries.data(), scores.data(), n_entries};
    a.judge = lists.of_layer(1, s_.n_streams);
    a.part = WindowArgs::begin;
    window_.run();
    const size_t token = size_t(n_heads()) * kDim;
    JudgeArgs judge{.layers = window_.layer.data(),
                    .list = a.judge,
                    .n_streams = s_.n_streams,
                    .n_kv_heads = s_.n_kv_heads,
                    .group = s_.group,
                    .head_dim = kDim,
                    .capacity = a.capacity,
                    .n_judges = a.n_judges,
                    .keys = keys.data(),
                    .key_token_stride = size_t(s_.n_kv_heads) * kDim,
                    .key_head_stride = kDim,
                    .queries = queries.data(),
                    .query_stream_stride = token * a.mask_tokens,
                    .query_token_stride = token,
                    .query_head_stride = kDim,
                    .first_stream = first_stream,
                    .n_batch_streams = a.n_batch_streams,
                    .stream_tokens = a.mask_tokens};
    if (s_.staged) {
      judge_staged(judge, lists, cells);
    } else {
      Device::judge_cells(judge);
    }
    a.part = WindowArgs::end;
    window_.run();
    a.part = WindowArgs::whole;
    a.kept_cells = nullptr;
    a.judge = {};
    std::vector<int64_t> exact(cells.begin(), cells.end());  // while the prompt is attended to
    for (size_t row = 0; row < kept.size(); row++) {
      if (kept[row] >= 0) exact.push_back(int64_t(row / a.capacity) * s_.n_cells + kept[row]);
    }
    std::sort(exact.begin(), exact.end());
    return exact;
  }

  /// As a prompt does whose layers end together. `judge`: of this layer alone.
  void judge_staged(JudgeArgs judge, const JudgeList& lists, const Vector<int64_t>& cells) {
    const int n = int(cells.size()), n_sides = s_.n_kv_heads * kDim;
    const size_t side = size_t(n) * n_sides;
    Vector<uint16_t> rows(4 * side, 0x7e00);
    Vector<LayerWindow> layers(2, window_.w);
    layers[0] = {};
    const int n_jobs = lists.max_entries / kJudgeTile;
    const size_t stride = size_t(judge.n_batch_streams) * n_jobs * n_heads() * kDim;
    Vector<float> means(2 * stride, NAN);
    PromptArgs prompt;
    prompt.batch.n_kv_heads = s_.n_kv_heads;
    prompt.batch.head_dim = kDim;
    prompt.batch.n_tokens = n;
    prompt.batch.keys = judge.keys;
    prompt.batch.key_token_stride = judge.key_token_stride;
    prompt.batch.key_head_stride = judge.key_head_stride;
    prompt.batch.cells = cells.data();
    prompt.batch.cells_per_stream = s_.n_cells;
    prompt.batch.key_codec = tables_[0].view();
    prompt.batch.value_codec = tables_[1].view();
    judge.staged.rows = rows.data();
    judge.staged.side_stride = side;
    judge.staged.n_tokens = n;
    judge.staged.cells = cells.data();
    judge.staged.layers[0] = 2;
    prompt.staged_keys = judge.staged.of(1, true);
    prompt.staged_values = judge.staged.of(1, false);
    prompt.queries.n_streams = 0;
    prompt.judge = judge;
    prompt.judge.means = {means.data() + stride, stride, n_jobs, 0};
    Device::template prepare_prompt<kDim>(prompt);
    judge.layers = layers.data();
    judge.n_layers = 2;
    judge.list = lists;
    judge.keys = judge.queries = nullptr;
    judge.means = {means.data(), stride, n_jobs, 2};
    Device::judge_cells(judge);
  }

  // Counts sequences that have lost a cell and keep a later one that is not among the last.
  void note_unlike_oldest(const std::vector<int64_t>& exact) {
    std::map<std::pair<int64_t, int>, std::vector<int>> positions;
    for (int64_t cell : exact) {
      const auto it = owner_.find(cell);
      if (it != owner_.end()) positions[{cell / s_.n_cells, it->second.first}].push_back(it->second.second);
    }
    for (auto& [sequence, of] : positions) {
      std::sort(of.begin(), of.end());
      for (int i = 0; i < std::min(int(of.size()), s_.size.pool); i++) {
        if (of[i] == i) continue;
        n_unlike_oldest_++;
        break;
      }
    }
  }

  PairShape s_;
  Random random_;
  WindowOn<Device> window_;
  std::vector<uint8_t> memory_[2];
  std::vector<typename Device::Tables> tables_;  // by Kind
  std::unique_ptr<CacheLayer> cpu_;
  Vector<uint16_t> keys_;                         // the window's rows
  Vector<float> queries_;                         // kept
  std::map<int64_t, std::pair<int, int>> owner_;  // sequence, position
  std::map<std::pair<int, int>, int> length_;
  std::map<int, int64_t> next_;
  int n_unlike_oldest_ = 0;
};

inline std::vector<PairToken> tokens_of(int n, int sequence = 0, int stream = 0) {
  return std::vector<PairToken>(n, {stream, sequence});
}

/// Runs a script, and returns how many batches it had before cells differed, none (-1) where they never did; and how
/// often the oldest cells would have been others than those that stayed.
struct ScriptResult {
  int failed = -1, n_unlike_oldest = 0;
};

/// Calls step(pair, i) for i from 0 on, which runs a batch, n times.
template <typename Device, typename Step>
ScriptResult run_script(const PairShape& shape, unsigned seed, int n, Step step) {
  Pair<Device> pair(shape, seed);
  for (int i = 0; i < n; i++) {
    if (!step(pair, i)) return {i, 0};
  }
  return {-1, pair.n_unlike_oldest()};
}

template <typename Device>
ScriptResult token_by_token(WindowSize size) {
  return run_script<Device>({size, 2, 3}, 1, 120, [](auto& pair, int) { return pair.run(tokens_of(1)); });
}

template <typename Device>
ScriptResult prompts(WindowSize size, bool staged = false) {
  return run_script<Device>({.size = size, .n_kv_heads = 3, .group = 1, .staged = staged}, 2, 14,
                            [](auto& pair, int i) {
                              constexpr int kTokens[] = {100, 1, 1, 9, 30, 1, 12, 12, 11, 1, 10, 70, 1, 1};
                              return pair.run(tokens_of(kTokens[i]));
                            });
}

/// Drafts, some of whose tokens are taken back.
template <typename Device>
ScriptResult drafts() {
  return run_script<Device>({{16, 5, 8}, 2, 2}, 3, 60, [](auto& pair, int i) {
    const int n = i == 0 ? 40 : 1 + pair.random().below(8);
    const bool equal = pair.run(tokens_of(n));
    if (i > 0) pair.remove(0, 0, pair.random().below(n));
    return equal;
  });
}

/// Chats in one stream, alone and together, one in the midst of its prompt while others decode.
template <typename Device>
ScriptResult chats(bool staged = false) {
  return run_script<Device>({.size = {16, 5, 8}, .n_cells = 1024, .staged = staged}, 4, 60, [](auto& pair, int i) {
    if (i < 3) return pair.run(tokens_of(20 + 9 * i, i));
    std::vector<PairToken> batch;
    const int prompt = i % 9 == 4 ? i % 3 : -1;
    for (int sequence = 0; sequence < 3; sequence++) {
      if (sequence != prompt && (pair.random().below(3) > 0 || sequence == i % 3)) batch.push_back({0, sequence});
    }
    if (prompt >= 0) batch.insert(batch.end(), 12, {0, prompt});
    return pair.run(batch);
  });
}

/// A sequence in each of three streams, of which batches have some.
template <typename Device>
ScriptResult streams(bool staged = false) {
  const PairShape shape{.size = {16, 5, 8}, .n_streams = 3, .n_cells = 256, .sequences = 1, .staged = staged};
  return run_script<Device>(shape, 5, 41, [](auto& pair, int i) {
    const int n = i == 0 ? 20 : i % 11 == 7 ? 14 : i % 7 == 2 ? 3 : 1, first = i % 5 == 3;
    std::vector<PairToken> batch;
    for (int stream = first; stream < (i == 0 ? 3 : first + 1 + i % 2); stream++) {
      batch.insert(batch.end(), n, {stream, 0});
    }
    return pair.run(batch);
  });
}

/// Where a state is saved, what a token made too much has left before; nothing else changes.
template <typename Device>
ScriptResult finished() {
  return run_script<Device>({{16, 5, 4}, 2, 2}, 6, 80, [](auto& pair, int i) {
    const bool equal = pair.run(tokens_of(i % 6 == 5 ? 3 : 1));
    if (i % 3 == 0) pair.finish();
    return equal;
  });
}

}  // namespace thimble::cuda
