// Which cells matter most, by the rule of cache/pool.h: scores of keys by comparison with recent ones, and the choice
// of the greatest. Products are summed in the CPU's order, so that they are the CPU's bit for bit. Their mean and
// deviation are of the same numbers in double, added in another order and divided by through a reciprocal: a score that
// is rounded to f32 is then the CPU's but for one in millions. Of equal scores the older cell's counts as greater,
// there as here.
#pragma once

#include <cmath>

#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

struct Judge {
  static constexpr int kMostQueries = 64;         // of a mean
  static constexpr uint32_t kNoScore = 0x7fffff;  // that of minus infinity

  /// A number that compares with others as the scores do. Not for NaN.
  SIMT static uint32_t ordered(float x) {
    const uint32_t bits = simt::float_to_bits(simt::add_rn(x, 0.0f));  // zeros are equal
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }

  /// One head's key of a cell: in a row of the window, or where the model wrote it.
  struct Key {
    const uint16_t* halves;
    const float* floats;
  };

  /// Both are aligned to 16 bytes; dim is a multiple of 8.
  SIMT static float product(const float* query, const uint16_t* key, int dim) {
    float sums[4] = {};
    SIMT_UNROLL_BY(4)
    for (int d = 0; d < dim; d += 8) {
      const uint4 words = *reinterpret_cast<const uint4*>(key + d);
      const float2 k[4] = {simt::unpack_half2(words.x), simt::unpack_half2(words.y), simt::unpack_half2(words.z),
                           simt::unpack_half2(words.w)};
      SIMT_UNROLL
      for (int half = 0; half < 2; half++) {
        const float4 q = *reinterpret_cast<const float4*>(query + d + 4 * half);
        sums[0] = simt::add_rn(sums[0], simt::mul_rn(q.x, k[2 * half].x));
        sums[1] = simt::add_rn(sums[1], simt::mul_rn(q.y, k[2 * half].y));
        sums[2] = simt::add_rn(sums[2], simt::mul_rn(q.z, k[2 * half + 1].x));
        sums[3] = simt::add_rn(sums[3], simt::mul_rn(q.w, k[2 * half + 1].y));
      }
    }
    return simt::add_rn(simt::add_rn(sums[0], sums[1]), simt::add_rn(sums[2], sums[3]));
  }

  struct Spread {
    double mean, inverse;  // of the deviation
  };

  SIMT static void score(float product, Spread spread, uint32_t* greatest) {
    const float z = float((product - spread.mean) * spread.inverse);
    if (z == z) simt::atomic_max(greatest, ordered(z));
  }

  /// The `most` greatest of n scores: those above a threshold, and the first n_equal of those that equal it.
  struct Choice {
    uint32_t threshold;
    int n_equal;

    /// Whether number i is one of them.
    SIMT bool has(const uint32_t* scores, int i) const {
      if (scores[i] != threshold) return scores[i] > threshold;
      int before = 0;
      for (int other = 0; other < i && before < n_equal; other++) before += scores[other] == threshold;
      return before < n_equal;
    }
  };
  /// A thread block calls it, after a barrier.
  template <int Threads>
  SIMT static Choice choose(const uint32_t* scores, int n, int most) {
    if (n <= most) return {0, n};
    const auto count = [&](uint32_t threshold) {
      int found = 0;
      SIMT_NO_UNROLL
      for (int first = 0; first < n; first += Threads) {
        const int i = first + simt::thread();
        found += simt::count_in_block(i < n && scores[i] >= threshold);
      }
      return found;
    };
    uint32_t threshold = 0;
    SIMT_NO_UNROLL
    for (int bit = 31; bit >= 0; bit--) {
      if (count(threshold | 1u << bit) >= most) threshold |= 1u << bit;
    }
    return {threshold, threshold == UINT32_MAX ? most : most - count(threshold + 1)};
  }
};

/// Products of some query heads with keys, by a thread block: keys come to shared memory by rows, a tile at a time, and
/// a thread multiplies one of them with one head.
template <int Threads>
struct JudgeTiles {
  static constexpr int kWarps = Threads / 32, kMaxDim = 256;

  struct Shared {
    alignas(16) uint16_t keys[64 * (128 + 8)];  // 8 more numbers a row: to other banks
    double sums[kWarps], squares[kWarps];
  };
  static_assert(sizeof(Shared::keys) >= 32 * (kMaxDim + 8) * sizeof(uint16_t));

  Shared& s;
  int dim;

  SIMT int rows() const { return dim <= 128 ? 64 : 32; }
  /// Heads at once, and the one of them that is this thread's.
  SIMT int heads() const { return Threads / rows(); }
  SIMT int head() const { return simt::thread() / rows(); }

  /// Eight numbers of a key, rounded to f16.
  SIMT static uint4 load(Judge::Key key, int d) {
    if (key.halves) return *reinterpret_cast<const uint4*>(key.halves + d);
    const float4 low = *reinterpret_cast<const float4*>(key.floats + d);
    const float4 high = *reinterpret_cast<const float4*>(key.floats + d + 4);
    return make_uint4(simt::pack_half2(low.x, low.y), simt::pack_half2(low.z, low.w), simt::pack_half2(high.x, high.y),
                      simt::pack_half2(high.z, high.w));
  }

  /// Calls f(i, product) for the keys key(0) to key(n - 1); `query` is that of the thread's head, null: none.
  template <typename KeyOf, typename F>
  SIMT void multiply(const float* query, int n, KeyOf key, F f) const {
    const int stride = dim + 8, parts = dim / 8, mine = simt::thread() % rows();
    SIMT_NO_UNROLL
    for (int first = 0; first < n; first += rows()) {
      simt::sync();
      for (int i = simt::thread(); i < rows() * parts; i += Threads) {
        const int row = i / parts, d = i % parts * 8;
        if (first + row < n) *reinterpret_cast<uint4*>(s.keys + row * stride + d) = load(key(first + row), d);
      }
      simt::sync();
      if (query && first + mine < n) f(first + mine, Judge::product(query, s.keys + mine * stride, dim));
    }
  }

  /// Of the products with these keys.
  template <typename KeyOf>
  SIMT Judge::Spread spread(const float* query, int n, KeyOf key) const {
    double sum = 0, squares = 0;
    multiply(query, n, key, [&](int, float product) {
      const double x = product;
      sum += x;
      squares += x * x;
    });
    for (int mask = 1; mask < 32; mask *= 2) {
      sum += simt::shuffle_xor(sum, mask);
      squares += simt::shuffle_xor(squares, mask);
    }
    if (simt::thread() % 32 == 0) {
      s.sums[simt::thread() / 32] = sum;
      s.squares[simt::thread() / 32] = squares;
    }
    simt::sync();
    const int warps = rows() / 32, first = head() * warps;
    sum = squares = 0;
    for (int warp = first; warp < first + warps; warp++) {
      sum += s.sums[warp];
      squares += s.squares[warp];
    }
    const double count = n > 1 ? n : 1, mean = sum / count, variance = squares / count - mean * mean;
    return {mean, 1 / sqrt(variance > 1e-12 ? variance : 1e-12)};
  }
};

/// The queries of a batch that decide about a stream's cells, for one KV head.
template <int Threads>
struct JudgeQueries {
  const JudgeArgs& a;
  int stream, head;

  SIMT bool in_batch() const { return stream >= a.first_stream && stream < a.first_stream + a.n_batch_streams; }
  SIMT const float* query(int token, int of_group) const {
    return a.queries + token / a.stream_tokens * a.query_stream_stride +
           token % a.stream_tokens * a.query_token_stride + (head * a.group + of_group) * a.query_head_stride;
  }
  /// Which tokens' queries decide about a job, in `tokens`; `entries` are the job's. Returns how many there are. All
  /// threads call it; it ends with a barrier.
  SIMT int list_tokens(int* tokens, const JudgeJob& job, const int32_t* entries) const {
    const int n = job.n_judges < Judge::kMostQueries ? job.n_judges : Judge::kMostQueries;
    for (int k = simt::thread(); k < n; k += Threads) {
      tokens[k] = entries[job.judges + k * job.n_judges / n] - a.capacity;
    }
    simt::sync();
    return n;
  }
  /// Component d of the mean of these n tokens' queries.
  SIMT float mean(const int* tokens, int n, int of_group, int d) const {
    float sum = 0;
    SIMT_UNROLL_BY(16)
    for (int k = 0; k < n; k++) sum = simt::add_rn(sum, simt::load_constant(query(tokens[k], of_group) + d));
    return simt::div_rn(sum, float(n));
  }
  /// Keeps those of LayerWindow::judges, of `n_heads` heads of the group from `first` on.
  SIMT void keep(int first, int n_heads) const {
    const int32_t* judges = a.layers->judges + size_t(stream) * a.n_judges;
    SIMT_NO_UNROLL
    for (int j = 0; j < a.n_judges; j++) {
      if (judges[j] < 0) continue;
      const int token = (stream - a.first_stream) * a.stream_tokens + judges[j];
      float* to = a.layers->queries +
                  (((size_t(stream) * a.n_judges + j) * a.n_kv_heads + head) * a.group + first) * a.head_dim;
      for (int i = simt::thread(); i < n_heads * a.head_dim; i += Threads) {
        to[i] = query(token, first + i / a.head_dim)[i % a.head_dim];
      }
    }
  }
  /// Writes one head's mean for job number `job` of the stream, if there is one, to `a.means`, those of this layer. The
  /// first job's caller keeps queries besides. `tokens`: shared memory for Judge::kMostQueries of them.
  SIMT void keep_mean(int* tokens, int job, int of_group) const {
    if (job == 0) keep(of_group, 1);
    if (job >= a.list.n_jobs[stream]) return;
    const JudgeJob its = a.list.jobs[size_t(stream) * kMaxJudgeJobs + job];
    const int n = list_tokens(tokens, its, a.list.entries + size_t(stream) * a.list.max_entries + its.first);
    float* to = mean_of(a.means.data, a.n_kv_heads, a.group, a.head_dim, job, of_group);
    for (int d = simt::thread(); d < a.head_dim; d += Threads) to[d] = mean(tokens, n, of_group, d);
  }
  /// Where a layer's mean lies.
  SIMT float* mean_of(float* layer, int n_kv_heads, int group, int head_dim, int job, int of_group) const {
    const size_t of_stream = size_t(stream - a.first_stream) * a.means.n_jobs + job;
    return layer + ((of_stream * n_kv_heads + head) * group + of_group) * head_dim;
  }
};

/// Scores of a prompt's cells. Grid [n_layers][n_streams][n_kv_heads][tiles of kJudgeTile entries].
struct JudgeKernel {
  static constexpr int kThreads = 256;
  using Tiles = JudgeTiles<kThreads>;
  static constexpr int kMaxDim = Tiles::kMaxDim;

  struct Shared {
    int tokens[Judge::kMostQueries];
    float mean[8 * kMaxDim];  // of 4 heads, or of 8 where they are large
    Tiles::Shared tiles;
  };
  static constexpr size_t kSharedBytes = sizeof(Shared);

  /// Where a thread block's keys are, one KV head's of a stream.
  struct Keys {
    const int32_t* entries;  // of the job
    int capacity, dim;
    const uint16_t *rows, *staged;  // staged: null where the batch's are where the model wrote them
    const float* batch;
    size_t token_stride;

    SIMT Judge::Key key(int i) const {
      const int entry = entries[i];
      if (entry < capacity) return {rows + size_t(entry) * dim, nullptr};
      const size_t token = size_t(entry - capacity);
      if (staged) return {staged + token * dim, nullptr};
      return {nullptr, batch + token * token_stride};
    }
  };

  SIMT static void run(const JudgeArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    Shared& s = *reinterpret_cast<Shared*>(simt::shared());
    const int index = simt::block_z() / a.n_streams, first = simt::block_x() * kJudgeTile;
    const JudgeQueries<kThreads> queries{a, simt::block_z() % a.n_streams, simt::block_y()};
    const int stream = queries.stream, head = queries.head;
    if (!queries.in_batch()) return;
    const bool has_means = a.means.data != nullptr;
    if (has_means && !(a.means.layers >> index & 1)) return;
    const LayerWindow& layer = a.layers[index];
    const int n_kv_heads = layer.n_kv_heads, group = layer.group, dim = layer.head_dim;
    if (head >= n_kv_heads) return;
    if (!has_means && first == 0) queries.keep(0, group);
    const JudgeList list = index > 0 ? a.list.of_layer(index, a.n_streams) : a.list;
    JudgeJob job{};
    int number = 0;
    SIMT_NO_UNROLL
    for (int i = 0; i < list.n_jobs[stream]; i++) {
      const JudgeJob& each = list.jobs[size_t(stream) * kMaxJudgeJobs + i];
      if (first >= each.first && first < each.first + each.n_others) {
        job = each;
        number = i;
      }
    }
    if (job.n == 0) return;
    const size_t at = size_t(stream) * list.max_entries + job.first;
    const size_t row = (size_t(stream) * n_kv_heads + head) * a.capacity * dim;
    const Keys keys{list.entries + at,
                    a.capacity,
                    dim,
                    layer.keys + row,
                    has_means ? a.staged.of(index, true) + size_t(head) * a.staged.n_tokens * dim : nullptr,
                    has_means ? nullptr : a.keys + head * a.key_head_stride,
                    a.key_token_stride};
    uint32_t* scores = list.scores + at;
    const int begin = first - job.first;
    const Tiles tiles{s.tiles, dim};
    const int n_judges = has_means ? 0 : queries.list_tokens(s.tokens, job, keys.entries);
    SIMT_NO_UNROLL
    for (int from = 0; from < group; from += tiles.heads()) {
      const int n_heads = group - from < tiles.heads() ? group - from : tiles.heads();
      SIMT_NO_UNROLL
      for (int i = simt::thread(); i < n_heads * dim; i += kThreads) {
        const int of_group = from + i / dim, d = i % dim;
        s.mean[i] = has_means ? queries.mean_of(a.means.data + index * a.means.layer_stride, n_kv_heads, group, dim,
                                                number, of_group)[d]
                              : queries.mean(s.tokens, n_judges, of_group, d);
      }
      simt::sync();
      const float* query = tiles.head() < n_heads ? s.mean + tiles.head() * dim : nullptr;
      const Judge::Spread spread = tiles.spread(query, job.n_recent, [&](int i) { return keys.key(job.n_others + i); });
      const int left = job.n_others - begin;
      tiles.multiply(
          query, left < kJudgeTile ? left : kJudgeTile, [&](int i) { return keys.key(begin + i); },
          [&](int i, float x) { Judge::score(x, spread, &scores[begin + i]); });
      simt::sync();
    }
  }
};

}  // namespace thimble::cuda
