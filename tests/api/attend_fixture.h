// Caches with queries, masks and exact rows for tests of thimble_attend, and attention over them in double.
#pragma once

#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>

#include "attention/problem.h"
#include "codec/head_codec.h"
#include "fixture.h"

namespace thimble::test {

struct Shape {
  int k_dim = 64, v_dim = 64, n_heads = 2;
  double k_bits = 2, v_bits = 2;
  const thimble_profile* profile = nullptr;
  int layer = 0;

  thimble_codec_args codec(int kind) const {
    auto args = plain_codec(kind, kind == THIMBLE_KEY ? k_dim : v_dim, n_heads, kind == THIMBLE_KEY ? k_bits : v_bits);
    args.profile = profile;
    args.layer = layer;
    return args;
  }
};

/// A coded cache: in contiguous blocks, or in pages that lie in no order among other pages.
inline Cache cache_of(const Shape& shape, const std::vector<int64_t>& n_cells, Layout layout, bool paged,
                      thimble_context* context) {
  Cache cache;
  cache.n_sequences = int(n_cells.size());
  cache.n_cells = n_cells;
  cache.blocks_per_sequence = int(*std::max_element(n_cells.begin(), n_cells.end()) + 63) / 64 + 1;
  const int n = cache.n_sequences * cache.blocks_per_sequence;
  if (paged) {
    cache.table.resize(n);
    for (int i = 0; i < n; i++) cache.table[i] = (i * 7 + 3) % (n + 5);
    if ((n + 5) % 7 == 0) std::iota(cache.table.rbegin(), cache.table.rend(), 5);
    for (int s = 0; s < cache.n_sequences; s++) {  // behind a sequence's cells is nothing
      for (int b = int(n_cells[s] + 63) / 64; b < cache.blocks_per_sequence; b++) {
        cache.table[s * cache.blocks_per_sequence + b] = -1;
      }
    }
  }
  cache.keys = std::make_unique<Side>(shape.codec(THIMBLE_KEY), n + 5, layout);
  cache.values = std::make_unique<Side>(shape.codec(THIMBLE_VALUE), n + 5, layout);
  cache.encode(context);
  return cache;
}

/// A causal mask with holes, [token][stride], as f16; with `bias`, distances that ALiBi multiplies.
inline std::vector<uint16_t> mask_of(const Cache& cache, const Queries& x, size_t stride, bool bias) {
  std::vector<uint16_t> mask(size_t(x.first_tokens.back()) * stride, 0x7e00);  // NaN behind what may be looked at
  for (int s = 0; s < cache.n_sequences; s++) {
    const int64_t n_tokens = x.first_tokens[s + 1] - x.first_tokens[s];
    for (int64_t t = 0; t < n_tokens; t++) {
      const int64_t position = cache.n_cells[s] - n_tokens + t;
      for (int64_t c = 0; c < cache.n_cells[s]; c++) {
        const bool seen = c <= position && c % 11 != 5;
        mask[size_t(x.first_tokens[s] + t) * stride + c] =
            !seen ? uint16_t{THIMBLE_MASK_HIDDEN} : float_to_half(bias ? float(c - position) : 0.0f);
      }
    }
  }
  return mask;
}

/// What the scores of coded cells get besides (HeadCodec::score_bias): the codecs of keys by KV head, none where there
/// is nothing, and which cells of a sequence are exact.
struct ScoreBias {
  std::vector<HeadCodec> codecs;
  std::function<bool(int sequence, int64_t cell)> is_exact = [](int, int64_t) { return false; };

  double of(const float* query, double scale, size_t kv_head) const {
    if (codecs.empty()) return 0;
    const HeadCodec& codec = codecs.at(kv_head);
    std::vector<float> scaled(codec.format.head_dim), y(scaled.size());
    for (size_t d = 0; d < scaled.size(); d++) scaled[d] = float(query[d] * scale);
    codec.transform.query(scaled.data(), y.data());
    return codec.score_bias(y.data());
  }
};

/// Normalized squared error against attention in double over `k` and `v`, rows of all cells.
inline double nmse(const Cache& cache, const Queries& x, const thimble_attend_args& args, const std::vector<float>& k,
                   const std::vector<float>& v, const ScoreBias& bias = {}) {
  const int group = x.n_heads / cache.keys->n_heads, k_dim = cache.keys->dim, v_dim = cache.values->dim;
  double error = 0, size = 1e-30;
  for (int s = 0; s < cache.n_sequences; s++) {
    for (int64_t t = x.first_tokens[s]; t < x.first_tokens[s + 1]; t++) {
      for (int h = 0; h < x.n_heads; h++) {
        std::vector<double> sums(v_dim, 0.0);
        const double scale = args.scale != 0 ? args.scale : 1 / std::sqrt(double(k_dim));
        const float* query = &x.q[t * args.q_token_stride + h * args.q_head_stride];
        const double besides = bias.of(query, scale, size_t(h / group));
        double total = args.sinks ? std::exp(double(args.sinks[h])) : 0;
        for (int64_t c = 0; c < cache.n_cells[s]; c++) {
          const uint16_t m = args.mask ? args.mask[t * args.mask_stride + c] : 0;
          if (m == THIMBLE_MASK_HIDDEN) continue;
          const size_t row = size_t(s * cache.cells() + c);
          double score = 0;
          for (int d = 0; d < k_dim; d++) {
            score += double(query[d]) * k[row * cache.keys->row_size() + size_t(h / group) * k_dim + d];
          }
          score *= scale;
          if (!bias.is_exact(s, c)) score += besides;
          if (args.softcap != 0) score = args.softcap * std::tanh(score / args.softcap);
          const double weight = std::exp(score + alibi_slope(args.max_bias, x.n_heads, h) * half_to_float(m));
          total += weight;
          for (int d = 0; d < v_dim; d++) {
            sums[d] += weight * v[row * cache.values->row_size() + size_t(h / group) * v_dim + d];
          }
        }
        for (int d = 0; d < v_dim; d++) {
          const double expected = total > 0 ? sums[d] / total : 0;
          const double got = args.out[t * args.out_token_stride + h * args.out_head_stride + d];
          error += (got - expected) * (got - expected);
          size += expected * expected;
        }
      }
    }
  }
  return error / size;
}

inline std::vector<float> decoded(const Cache& cache, const Side& side, thimble_context* context) {
  std::vector<int64_t> cells;
  for (int s = 0; s < cache.n_sequences; s++) {
    for (int64_t c = 0; c < cache.cells(); c++) cells.push_back(c < cache.n_cells[s] ? cache.memory_cell(s, c) : -1);
  }
  std::vector<float> rows(cells.size() * side.row_size(), 0.0f);
  const auto args = side.decode_args(rows, cells);
  EXPECT_TRUE(ok(thimble_decode(context, &args, nullptr)));
  return rows;
}

/// Rows of the cells that `takes` names, in reverse order, to be attended to exactly. `k` and `v`, rows of all cells,
/// become what attention is to see.
class ExactRows {
public:
  template <typename Takes>
  ExactRows(const Cache& cache, Takes takes, std::vector<float>& k, std::vector<float>& v)
      : key_size_(cache.keys->row_size()), value_size_(cache.values->row_size()) {
    for (int s = 0; s < cache.n_sequences; s++) {
      for (int64_t c = 0; c < cache.n_cells[s]; c++) {
        if (takes(s, c)) cells.push_back(c);
      }
      start.push_back(int64_t(cells.size()));
    }
    const int64_t n = int64_t(cells.size());
    keys.resize(n * key_size_);
    values.resize(n * value_size_);
    for (int s = 0; s < cache.n_sequences; s++) {
      for (int64_t i = start[s]; i < start[s + 1]; i++) {
        rows.push_back(n - 1 - i);
        const int64_t row = s * cache.cells() + cells[i];
        take(cache.k, row, key_size_, &keys[rows[i] * key_size_], k);
        take(cache.v, row, value_size_, &values[rows[i] * value_size_], v);
      }
    }
  }
  thimble_exact args() const {
    return {start.data(), cells.data(),  rows.data(), int64_t(rows.size()),
            keys.data(),  values.data(), key_size_,   value_size_};
  }

  std::vector<int64_t> start{0}, cells, rows;
  std::vector<uint16_t> keys, values;

private:
  static void take(const std::vector<float>& from, int64_t row, size_t size, uint16_t* to, std::vector<float>& seen) {
    for (size_t i = 0; i < size; i++) {
      to[i] = float_to_half(from[row * size + i]);
      seen[row * size + i] = half_to_float(to[i]);
    }
  }
  size_t key_size_, value_size_;
};

}  // namespace thimble::test
