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

/// Scores of a prompt's cells. Grid [n_streams][n_kv_heads][tiles of kJudgeTile entries].
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

  /// A thread block's stream and KV head.
  struct Place {
    const JudgeArgs& a;
    const uint16_t* rows;
    const int32_t* entries;  // of the job
    int stream, head;

    SIMT Judge::Key key(int i) const {
      const int entry = entries[i];
      if (entry < a.capacity) return {rows + size_t(entry) * a.head_dim, nullptr};
      return {nullptr, a.keys + size_t(entry - a.capacity) * a.key_token_stride + head * a.key_head_stride};
    }
    SIMT const float* query(int token, int of_group) const {
      return a.queries + token / a.stream_tokens * a.query_stream_stride +
             token % a.stream_tokens * a.query_token_stride + (head * a.group + of_group) * a.query_head_stride;
    }
  };

  /// Which tokens' queries decide. Returns how many there are.
  SIMT static int list_tokens(Shared& s, const Place& p, const JudgeJob& job) {
    const int n = job.n_judges < Judge::kMostQueries ? job.n_judges : Judge::kMostQueries;
    for (int k = simt::thread(); k < n; k += kThreads) {
      s.tokens[k] = p.entries[job.judges + k * job.n_judges / n] - p.a.capacity;
    }
    simt::sync();
    return n;
  }

  /// The mean of these n tokens' queries, of `n_heads` heads of the group from `first` on.
  SIMT static void make_mean(Shared& s, const Place& p, int n, int first, int n_heads) {
    SIMT_NO_UNROLL
    for (int i = simt::thread(); i < n_heads * p.a.head_dim; i += kThreads) {
      const int of_group = first + i / p.a.head_dim, d = i % p.a.head_dim;
      float sum = 0;
      SIMT_UNROLL_BY(16)
      for (int k = 0; k < n; k++) sum = simt::add_rn(sum, simt::load_constant(p.query(s.tokens[k], of_group) + d));
      s.mean[i] = simt::div_rn(sum, float(n));
    }
    simt::sync();
  }

  SIMT static void keep_queries(const Place& p) {
    const JudgeArgs& a = p.a;
    const int32_t* judges = a.layer->judges + size_t(p.stream) * a.n_judges;
    SIMT_NO_UNROLL
    for (int j = 0; j < a.n_judges; j++) {
      if (judges[j] < 0) continue;
      const int token = (p.stream - a.first_stream) * a.stream_tokens + judges[j];
      float* to =
          a.layer->queries + ((size_t(p.stream) * a.n_judges + j) * a.n_kv_heads + p.head) * a.group * a.head_dim;
      for (int i = simt::thread(); i < a.group * a.head_dim; i += kThreads) {
        to[i] = p.query(token, i / a.head_dim)[i % a.head_dim];
      }
    }
  }

  SIMT static void run(const JudgeArgs& a) {
    simt::launch_dependents();
    if (!a.early) simt::wait_for_previous_grid();
    score(a);
    // The next grid waits for this one alone, which must not end before those that it overtook.
    if (a.early) simt::wait_for_previous_grid();
  }

private:
  SIMT static void score(const JudgeArgs& a) {
    Shared& s = *reinterpret_cast<Shared*>(simt::shared());
    const int stream = simt::block_z(), head = simt::block_y(), first = simt::block_x() * kJudgeTile;
    const size_t rows = (size_t(stream) * a.n_kv_heads + head) * a.capacity * a.head_dim;
    Place p{a, a.layer->keys + rows, a.list.entries + size_t(stream) * a.list.max_entries, stream, head};
    const bool in_batch = stream >= a.first_stream && stream < a.first_stream + a.n_batch_streams;
    if (!in_batch) return;
    if (first == 0) keep_queries(p);
    JudgeJob job{};
    SIMT_NO_UNROLL
    for (int i = 0; i < a.list.n_jobs[stream]; i++) {
      const JudgeJob& each = a.list.jobs[size_t(stream) * kMaxJudgeJobs + i];
      if (first >= each.first && first < each.first + each.n_others) job = each;
    }
    if (job.n == 0) return;
    p.entries += job.first;
    uint32_t* scores = a.list.scores + size_t(stream) * a.list.max_entries + job.first;
    const int begin = first - job.first;
    const Tiles tiles{s.tiles, a.head_dim};
    const int n_judges = list_tokens(s, p, job);
    SIMT_NO_UNROLL
    for (int group = 0; group < a.group; group += tiles.heads()) {
      const int n_heads = a.group - group < tiles.heads() ? a.group - group : tiles.heads();
      make_mean(s, p, n_judges, group, n_heads);
      const float* query = tiles.head() < n_heads ? s.mean + tiles.head() * a.head_dim : nullptr;
      const Judge::Spread spread = tiles.spread(query, job.n_recent, [&](int i) { return p.key(job.n_others + i); });
      const int left = job.n_others - begin;
      tiles.multiply(
          query, left < kJudgeTile ? left : kJudgeTile, [&](int i) { return p.key(begin + i); },
          [&](int i, float x) { Judge::score(x, spread, &scores[begin + i]); });
      simt::sync();
    }
  }
};

}  // namespace thimble::cuda
