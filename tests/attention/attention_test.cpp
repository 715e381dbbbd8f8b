// Attention over a cache layer is held to dense attention in double over the rows that the cache stands for.
#include "attention/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <filesystem>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <thread>
#include <tuple>

#include "codec/half.h"

namespace thimble {
namespace {

struct Case {
  int k_dim = 64, v_dim = 64, n_kv_heads = 2, group = 3, n_tokens = 1, n_streams = 1, cells = 200, n_cells = 200;
  double bits = 2;
  WindowSize window{20, 4, 0};
  float max_bias = 0, softcap = 0;
  bool sinks = false, mask = true;
  bool blind = false;  // the mask hides everything
  int threads = 1;
  bool dense_transform = false;
  int top = 0;  // cells to retrieve; above 0 with an exact store
  bool in_file = false;
  size_t store_bytes = SIZE_MAX;  // for keys, and for values: a store may be full
  bool drop_tail = false;
  bool latent = false;  // queries are multiplied with values as well, by their first numbers

  int key_at() const { return latent ? v_dim : 0; }  // of a query: the number that goes with a key's first
  int q_dim() const { return key_at() + k_dim; }
};

HeadCodec codec_for(const Case& c, Kind kind, unsigned seed) {
  const int dim = kind == Kind::key ? c.k_dim : c.v_dim;
  HeadCodec codec = make_uncalibrated_codec(kind, make_format(dim, c.bits));
  if (c.dense_transform) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> mean(dim), matrix(size_t(dim) * dim);
    for (float& v : mean) v = normal(random);
    for (float& v : matrix) v = 0.3f * normal(random);
    for (int i = 0; i < dim; i++) matrix[size_t(i) * dim + i] += 6;
    codec.transform = Transform::dense(std::move(mean), std::move(matrix));
    // So much that a wrong sign, or a half too much, shows.
    for (int d = 0; d < dim && kind == Kind::key; d++) codec.error.push_back(20.0f * float(d % 5));
    codec.derive_tables();
  }
  return codec;
}

// The cells that each stream, KV head and token retrieves: those of the `top` greatest scores, the lower cell of equal
// ones.
// By the kernel's own scores, since kernels may order nearly equal scores differently.
std::vector<std::set<int>> retrieved(const Case& c, const Kernels& kernels, const CacheLayer& layer,
                                     const AttentionProblem& p) {
  std::vector<std::set<int>> chosen;
  const int n_blocks = (c.n_cells + kBlockCells - 1) / kBlockCells, n_rows = c.group;
  for (int s = 0; s < c.n_streams; s++) {
    std::vector<uint64_t> hidden(n_blocks, 0);
    for (const auto& row : layer.window().rows()) {
      const int cell = row.cell % c.cells;
      if (row.cell / c.cells == s && cell < c.n_cells) hidden[cell / 64] |= uint64_t{1} << cell % 64;
    }
    for (int i = 0; i < c.n_kv_heads * c.n_tokens; i++) {
      const int h = i / c.n_tokens, t = i % c.n_tokens;
      const HeadCodec &k = layer.keys().codec(h), &v = layer.values().codec(h);
      std::vector<float> q(size_t(n_rows) * c.q_dim()), coded(q.size()), bias(n_rows), slope(n_rows);
      for (int r = 0; r < n_rows; r++) {
        const int head = h * c.group + r;
        float *row = &q[size_t(r) * c.q_dim()], *coded_row = &coded[size_t(r) * c.q_dim()];
        for (int d = 0; d < c.q_dim(); d++) {
          row[d] = p.scale * p.q[s * p.q_stream + head * p.q_head + t * p.q_token + d];
        }
        k.transform.query(row + c.key_at(), coded_row + c.key_at(), 1, kernels.transform);
        bias[r] = k.transform.query_bias(row + c.key_at());
        if (c.latent) {
          v.transform.query(row, coded_row, 1, kernels.transform);
          bias[r] += v.transform.query_bias(row);
        }
        slope[r] = alibi_slope(c.max_bias, p.n_heads, head);
        bias[r] += k.score_bias(coded_row + c.key_at());
      }
      const int64_t cell0 = int64_t(s) * c.cells;
      const CodedCells cells{
          &k, &v, layer.keys().block(h, cell0), layer.values().block(h, cell0), hidden.data(), 0, n_blocks, c.n_cells};
      std::vector<float> scores(size_t(n_blocks) * kBlockCells, NAN);
      Scratch scratch;
      kernels.score_codes({n_rows, c.group, c.q_dim(), coded.data(), bias.data(), slope.data(), c.softcap, c.key_at()},
                          cells,
                          {p.mask ? p.mask + s * p.mask_stream + t * p.mask_token : nullptr, ptrdiff_t(p.mask_token)},
                          scores.data(), scratch);
      std::vector<int> order;
      for (int cell = 0; cell < c.n_cells; cell++) {
        if (!std::isinf(scores[cell])) order.push_back(cell);
      }
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return scores[a] > scores[b]; });
      order.resize(std::min(order.size(), size_t(c.top)));
      chosen.emplace_back(order.begin(), order.end());
    }
  }
  return chosen;
}

// The loops of the dense computation. They are not sanitized, since with sanitizers they would take most of the time.
[[gnu::noinline, gnu::no_sanitize("address", "undefined")]] double product(const float* a, const float* b, int n) {
  double sums[4] = {};
  for (int d = 0; d < n; d++) sums[d % 4] += double(a[d]) * b[d];
  return sums[0] + sums[1] + sums[2] + sums[3];
}

[[gnu::noinline, gnu::no_sanitize("address", "undefined")]] void add(double w, const float* x, int n, double* sum) {
  for (int d = 0; d < n; d++) sum[d] += w * x[d];
}

// A cache layer with a case's cells written; the last `n_tokens` of each stream are still in flight.
struct Filled {
  std::vector<std::vector<uint8_t>> memory;
  std::unique_ptr<CacheLayer> layer;
};

Filled fill(const Case& c, unsigned seed) {
  Filled filled;
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const CacheShape shape{c.n_kv_heads, c.cells, c.n_streams};
  std::vector<std::vector<uint8_t>>& memory = filled.memory;
  const int n_slots = c.window.total() * c.n_streams;
  const auto make_side = [&](Kind kind) {
    auto codecs = std::make_shared<std::vector<HeadCodec>>();
    for (int h = 0; h < c.n_kv_heads; h++) codecs->push_back(codec_for(c, kind, 10 * h + int(kind)));
    if (c.top > 0) {
      memory.emplace_back(CacheSide::memory_bytes(shape, codecs->front().format, 0));
      const size_t row_size = size_t(c.n_kv_heads) * codecs->front().format.head_dim;
      const std::string directory = std::filesystem::temp_directory_path();
      return CacheSide(shape, codecs, 0, memory.back().data(),
                       c.in_file ? ExactStore::file(directory, shape.n_cells(), row_size)
                                 : ExactStore::ram(shape.n_cells(), row_size, c.store_bytes));
    }
    memory.emplace_back(CacheSide::memory_bytes(shape, codecs->front().format, n_slots));
    return CacheSide(shape, codecs, n_slots, memory.back().data());
  };
  CacheSide keys = make_side(Kind::key), values = make_side(Kind::value);
  filled.layer = std::make_unique<CacheLayer>(std::move(keys), std::move(values),
                                              Window(c.window, n_slots, c.cells, c.n_streams), c.latent);
  CacheLayer& layer = *filled.layer;

  // A few batches, each stream's cells in order.
  std::vector<int64_t> batch;
  const auto write = [&](bool commit) {
    for (Kind kind : {Kind::key, Kind::value}) {
      layer.begin_write(kind, batch);
      std::vector<uint16_t> row(layer.side(kind).row_size());
      for (size_t r = 0; r < batch.size(); r++) {
        for (uint16_t& h : row) h = float_to_half(normal(random));
        layer.write_row(kind, int(r), row.data());
      }
    }
    if (commit) {
      const std::vector<int64_t> cells = batch;
      layer.commit(
          [&, cells](int row, int64_t cell) { return cell / c.cells == cells[row] / c.cells && cell <= cells[row]; });
    }
    batch.clear();
  };
  const int before = c.n_cells - c.n_tokens;
  for (int begin = 0; begin < before; begin += 37) {
    for (int s = 0; s < c.n_streams; s++) {
      for (int i = begin; i < std::min(begin + 37, before); i++) batch.push_back(int64_t(s) * c.cells + i);
    }
    write(true);
  }
  for (int s = 0; s < c.n_streams; s++) {
    for (int i = before; i < c.n_cells; i++) batch.push_back(int64_t(s) * c.cells + i);
  }
  write(false);
  return filled;
}

// Coding is slow, most of all in an emulator, and most cases of a test attend to the same cells.
const CacheLayer& filled_layer(const Case& c, unsigned seed) {
  static std::map<std::tuple<int, int, int, int, int, int, int, double, int, int, bool, bool, size_t, bool, unsigned>,
                  Filled>
      all;
  auto& filled = all[{c.k_dim, c.v_dim, c.n_kv_heads, c.n_tokens, c.n_streams, c.cells, c.n_cells, c.bits,
                      c.window.pool, c.window.last, c.dense_transform, c.top > 0, c.store_bytes, c.latent, seed}];
  if (!filled.layer) filled = fill(c, seed);
  return *filled.layer;
}

// The arguments that attention gets for a case.
struct Inputs {
  std::vector<float> q, out, sinks;
  std::vector<uint16_t> mask;
  AttentionProblem p;
};

Inputs inputs_of(const Case& c, unsigned seed) {
  Inputs inputs;
  auto& [q, out, sinks, mask, p] = inputs;
  std::mt19937 random(seed + 1000);
  std::normal_distribution<float> normal;
  const int before = c.n_cells - c.n_tokens;
  const int n_heads = c.n_kv_heads * c.group;
  const size_t n_q = size_t(c.n_streams) * c.n_tokens * n_heads;
  q.resize(n_q * c.q_dim());
  out.assign(n_q * c.v_dim, NAN);
  sinks.resize(n_heads);
  for (float& v : q) v = normal(random);
  for (float& v : sinks) v = normal(random);
  mask.assign(size_t(c.n_streams) * c.n_tokens * c.n_cells, 0);
  for (int s = 0; s < c.n_streams; s++) {
    for (int t = 0; t < c.n_tokens; t++) {
      for (int i = 0; i < c.n_cells; i++) {
        const int position = before + t;
        uint16_t& m = mask[(size_t(s) * c.n_tokens + t) * c.n_cells + i];
        if (i > position || i % 11 == 5 || c.blind)
          m = 0xfc00;
        else if (c.max_bias > 0)
          m = float_to_half(float(i - position));
      }
    }
  }
  p.n_heads = n_heads;
  p.n_tokens = c.n_tokens;
  p.n_streams = c.n_streams;
  p.n_cells = c.n_cells;
  p.value_dim = c.v_dim;
  p.q = q.data();  // [stream][head][token][dim]
  p.q_token = c.q_dim();
  p.q_head = size_t(c.q_dim()) * c.n_tokens;
  p.q_stream = p.q_head * n_heads;
  p.out = out.data();  // [stream][token][head][dim]
  p.out_head = c.v_dim;
  p.out_token = size_t(c.v_dim) * n_heads;
  p.out_stream = p.out_token * c.n_tokens;
  p.mask = c.mask ? mask.data() : nullptr;
  p.mask_token = c.n_cells;
  p.mask_stream = size_t(c.n_cells) * c.n_tokens;
  p.scale = 1 / std::sqrt(float(c.q_dim()));
  p.max_bias = c.max_bias;
  p.softcap = c.softcap;
  p.sinks = c.sinks ? sinks.data() : nullptr;
  return inputs;
}

void retrieve_and_attend(Attention& attention, const Case& c, const CacheLayer& layer, const AttentionProblem& p,
                         int threads, const Kernels& kernels) {
  attention.prepare(layer, p, {c.top, c.drop_tail}, threads, kernels);
  const auto all = [&](auto work) {
    std::vector<std::thread> team;
    for (int i = 0; i < threads; i++) team.emplace_back([&, i] { (attention.*work)(i); });
    for (auto& t : team) t.join();
  };
  if (attention.retrieves()) all(&Attention::retrieve);
  all(&Attention::attend);
}

// Runs a case and returns the normalized squared error against the dense computation.
double nmse_of(const Case& c, const Kernels& kernels, unsigned seed = 1) {
  const CacheLayer& layer = filled_layer(c, seed);
  const Inputs inputs = inputs_of(c, seed);
  const auto& [q, out, sinks, mask, p] = inputs;
  const int n_heads = c.n_kv_heads * c.group;
  Attention attention;
  retrieve_and_attend(attention, c, layer, p, c.threads, kernels);
  const bool from_store = c.top > 0 && c.n_tokens > kMaxCodeTokens;
  std::vector<std::set<int>> chosen;
  if (attention.retrieves()) chosen = retrieved(c, kernels, layer, p);

  double error = 0, size = 0;
  std::vector<float> k_row(layer.keys().row_size()), v_row(layer.values().row_size());
  for (int s = 0; s < c.n_streams; s++) {
    std::vector<std::vector<float>> ks[2], vs[2];  // of codes, and of exact rows where there are any
    std::vector<char> in_window(c.n_cells, 0), has_row(c.n_cells, 0);
    for (int i = 0; i < c.n_cells; i++) {
      const int64_t cell = int64_t(s) * c.cells + i;
      layer.keys().decode_row(cell, k_row.data());
      layer.values().decode_row(cell, v_row.data());
      ks[0].push_back(k_row);
      vs[0].push_back(v_row);
      const uint16_t *key = layer.exact_row(Kind::key, cell), *value = layer.exact_row(Kind::value, cell);
      for (const auto& row : layer.window().rows()) {
        if (row.cell != cell) continue;
        in_window[i] = 1;
        key = layer.keys().row_data(row);
        value = layer.values().row_data(row);
      }
      has_row[i] = key && value;  // else the store is full
      for (size_t d = 0; d < k_row.size() && has_row[i]; d++) k_row[d] = half_to_float(key[d]);
      for (size_t d = 0; d < v_row.size() && has_row[i]; d++) v_row[d] = half_to_float(value[d]);
      ks[1].push_back(k_row);
      vs[1].push_back(v_row);
    }
    for (int t = 0; t < c.n_tokens; t++) {
      for (int h = 0; h < n_heads; h++) {
        const std::set<int>* mine =
            chosen.empty() ? nullptr : &chosen[(s * c.n_kv_heads + h / c.group) * c.n_tokens + t];
        const auto is_exact = [&](int i) {
          return in_window[i] || (has_row[i] && c.top > 0 && (from_store || mine->count(i)));
        };
        std::vector<double> scores(c.n_cells), expected(c.v_dim, 0.0);
        const float* query = &q[((size_t(s) * n_heads + h) * c.n_tokens + t) * c.q_dim()];
        // What the scores of coded cells lack: half the variance of their errors.
        const HeadCodec& codec = layer.keys().codec(h / c.group);
        std::vector<float> transformed(c.k_dim);
        codec.transform.query(query + c.key_at(), transformed.data());
        double lacking = 0;
        for (size_t d = 0; d < codec.error.size(); d++) {
          lacking += std::pow(double(p.scale) * transformed[d], 2) * codec.error[d] / 2;
        }
        double top = c.sinks ? sinks[h] : -1e300, sum = 0;
        for (int i = 0; i < c.n_cells; i++) {
          double dot = product(query + c.key_at(), &ks[is_exact(i)][i][h / c.group * c.k_dim], c.k_dim);
          if (c.latent) dot += product(query, &vs[is_exact(i)][i][h / c.group * c.v_dim], c.v_dim);
          dot *= p.scale;
          if (!is_exact(i)) dot += lacking;
          if (c.softcap != 0) dot = c.softcap * std::tanh(dot / c.softcap);
          if (c.mask) {
            const float m = half_to_float(mask[(size_t(s) * c.n_tokens + t) * c.n_cells + i]);
            dot += std::isinf(m) ? m : alibi_slope(c.max_bias, n_heads, h) * m;
          }
          if (c.drop_tail && !in_window[i] && mine && !mine->count(i)) dot = -INFINITY;
          scores[i] = dot;
          top = std::max(top, dot);
        }
        if (c.sinks) sum = std::exp(sinks[h] - top);
        for (int i = 0; i < c.n_cells; i++) {
          const double w = std::exp(scores[i] - top);
          sum += w;
          add(w, &vs[is_exact(i)][i][h / c.group * c.v_dim], c.v_dim, expected.data());
        }
        for (int d = 0; d < c.v_dim; d++) {
          const double e = sum > 0 ? expected[d] / sum : 0;  // nothing visible: zeros
          const double o = out[((size_t(s) * c.n_tokens + t) * n_heads + h) * c.v_dim + d];
          error += (e - o) * (e - o);
          size += e * e;
        }
      }
    }
  }
  return size > 0 ? error / size : error;
}

class AttentionOn : public testing::TestWithParam<const Kernels*> {
protected:
  // Tables of 8-bit look-ups and weights may cost a kernel this much of the codec's own error; the scalar one nothing.
  double bound() const { return GetParam()->name == std::string("scalar") ? 1e-9 : 5e-4; }
  void expect(const Case& c) const { EXPECT_LT(nmse_of(c, *GetParam()), bound()) << GetParam()->name; }
};

TEST_P(AttentionOn, EveryRateAndHeadSize) {
  for (double bits : {16.0, 4.0, 3.0, 2.0, 1.5, 1.25, 1.0}) {
    for (int dim : {32, 64, 80, 96, 128, 256, 512}) {
      Case c;
      c.bits = bits;
      c.k_dim = c.v_dim = dim;
      SCOPED_TRACE(testing::Message() << bits << " bits, head size " << dim);
      expect(c);
    }
  }
}

TEST_P(AttentionOn, AwkwardNumbersOfCells) {
  for (int n : {1, 2, 63, 64, 65, 127, 128, 129, 199}) {
    Case c;
    c.n_cells = n;
    SCOPED_TRACE(n);
    expect(c);
    c.window = {0, 0, 0};
    expect(c);
  }
}

// All combinations of groups, tokens and threads. Prompts, whose cases take twenty times as long, have three groups
// only, each with another number of threads.
template <typename Run>
void for_groups_tokens_and_threads(const std::vector<int>& groups, const Run& run) {
  const auto run_case = [&](int group, int n_tokens, int threads) {
    Case c;
    c.group = group;
    c.n_tokens = n_tokens;
    c.threads = threads;
    c.n_streams = threads == 3 ? 2 : 1;
    SCOPED_TRACE(testing::Message() << "group " << group << " tokens " << n_tokens << " threads " << threads);
    run(c);
  };
  for (int group : groups) {
    for (int n_tokens : {1, 3, 8, 9}) {
      for (int threads : {1, 2, 3, 7}) run_case(group, n_tokens, threads);
    }
  }
  for (const auto& [group, threads] : {std::pair{1, 3}, {3, 1}, {3, 2}, {8, 7}}) run_case(group, 70, threads);
}

TEST_P(AttentionOn, GroupsTokensStreamsAndThreads) {
  for_groups_tokens_and_threads({1, 2, 3, 5, 8, 16}, [&](const Case& c) { expect(c); });
}

TEST_P(AttentionOn, NothingToSeeGivesZeros) {
  for (int n_tokens : {1, 9}) {
    for (int threads : {1, 3}) {
      Case c;
      c.blind = true;
      c.n_tokens = n_tokens;
      c.threads = threads;
      EXPECT_EQ(nmse_of(c, *GetParam()), 0) << n_tokens << " tokens, threads " << threads;
    }
  }
}

TEST_P(AttentionOn, DifferentKeyAndValueSizes) {
  Case c;
  c.k_dim = 96;
  c.v_dim = 64;
  expect(c);
  c.n_tokens = 20;
  expect(c);
}

// MLA: one row a cell, whose first numbers are the value, and all of which is the key.
TEST_P(AttentionOn, LatentRows) {
  Case latent;
  latent.latent = true;
  latent.n_kv_heads = 1;
  latent.k_dim = 64;
  latent.v_dim = 128;
  latent.group = 5;
  const auto expect_case = [&](const Case& c) {
    SCOPED_TRACE(testing::Message() << c.v_dim << " and " << c.k_dim << " numbers, " << c.bits << " bits, group "
                                    << c.group << ", tokens " << c.n_tokens << ", cells " << c.n_cells << ", top "
                                    << c.top);
    expect(c);
  };
  for (double bits : {16.0, 4.0, 3.0, 2.0}) {
    for (int n_tokens : {1, 3, 20}) {
      Case c = latent;
      c.bits = bits;
      c.n_tokens = n_tokens;
      c.threads = n_tokens;
      expect_case(c);
    }
  }
  for (int n_cells : {1, 63, 64, 65, 129}) {
    Case c = latent;
    c.n_cells = n_cells;
    expect_case(c);
    c.window = {0, 0, 0};
    expect_case(c);
  }
  for (bool dense : {false, true}) {
    Case c = latent;
    c.dense_transform = dense;
    c.n_streams = 2;
    c.softcap = 5;
    c.sinks = true;
    c.max_bias = 8;
    expect_case(c);
    c.n_tokens = 9;
    expect_case(c);
  }
  for (bool drop_tail : {false, true}) {
    for (int n_tokens : {1, 9}) {
      Case c = latent;
      c.top = 10;
      c.drop_tail = drop_tail;
      c.n_tokens = n_tokens;
      expect_case(c);
    }
  }
  Case c = latent;
  c.v_dim = 512;
  c.group = 16;
  expect_case(c);
}

TEST_P(AttentionOn, SoftcapAlibiSinksAndTransforms) {
  for (int n_tokens : {1, 20}) {
    for (bool dense : {false, true}) {
      Case c;
      c.n_tokens = n_tokens;
      c.dense_transform = dense;
      expect(c);
      c.softcap = 5;
      expect(c);
      c.sinks = true;
      expect(c);
      c.softcap = 0;
      c.max_bias = 8;
      expect(c);
      c.group = 5;  // heads that are no power of two take the second kind of slope
      expect(c);
      c.mask = false;
      c.max_bias = 0;
      expect(c);
    }
  }
}

TEST_P(AttentionOn, Retrieval) {
  for (double bits : {4.0, 2.0, 1.25}) {
    for (int top : {1, 5, 64, 100, 1000}) {
      for (bool drop_tail : {false, true}) {
        Case c;
        c.cells = c.n_cells = 1200;
        c.bits = bits;
        c.top = top;
        c.drop_tail = drop_tail;
        SCOPED_TRACE(testing::Message() << bits << " bits, top " << top << (drop_tail ? ", tail dropped" : ""));
        expect(c);
        c.n_cells = 77;
        expect(c);
      }
    }
  }
}

TEST_P(AttentionOn, RetrievalByGroupsTokensStreamsAndThreads) {
  for_groups_tokens_and_threads({1, 3, 8}, [&](Case c) {
    if (c.threads == 2 && c.n_tokens < 70) return;
    c.top = 20;
    c.cells = 300;
    c.n_cells = 210;
    expect(c);
    c.softcap = 5;
    c.sinks = true;
    c.max_bias = 8;
    c.dense_transform = true;
    expect(c);
    c.softcap = 0;
    c.k_dim = 96;
    c.mask = false;
    c.max_bias = 0;
    c.drop_tail = true;
    expect(c);
  });
}

// A store with room for 512 of 1200 cells. Other cells are read from their codes, whether they are chosen or part of a
// prompt, except the last ones, whose rows are in RAM while they are in the window.
TEST_P(AttentionOn, RetrievalFromAFullStore) {
  for (int n_tokens : {1, 3, 20}) {
    Case c;
    c.n_kv_heads = 8;
    c.group = 1;
    c.k_dim = c.v_dim = 256;
    c.cells = c.n_cells = 1200;
    c.n_tokens = n_tokens;
    c.threads = 2;
    c.top = 100;
    c.store_bytes = size_t{2} << 20;
    SCOPED_TRACE(testing::Message() << n_tokens << " tokens");
    const Filled filled = fill(c, 1);
    const CacheLayer& layer = *filled.layer;
    int n_rows = 0, n_last = 0;
    for (int cell = 0; cell < c.cells; cell++) n_rows += layer.exact_row(Kind::key, cell) != nullptr;
    for (int cell = 512; cell < c.cells; cell++) n_last += layer.window().find(cell) >= 0;
    EXPECT_EQ(n_rows, 512 + n_last + n_tokens);
    expect(c);
  }
}

TEST_P(AttentionOn, RetrievalWithoutAWindowOrWithF16Keys) {
  Case c;
  c.top = 30;
  c.cells = c.n_cells = 400;
  c.window = {0, 0, 0};
  expect(c);
  c.bits = 16;
  expect(c);
}

TEST_P(AttentionOn, RetrievalOfHeadsThatThreadsShare) {
  for (int threads : {1, 2, 3, 7}) {
    Case c;
    c.top = 64;
    c.k_dim = c.v_dim = 32;
    c.cells = c.n_cells = 7000;
    c.threads = threads;
    c.drop_tail = true;
    SCOPED_TRACE(testing::Message() << threads << " threads");
    expect(c);
  }
}

// The rows of one head are asked for before the next head's cells are scored.
TEST_P(AttentionOn, RowsOfOneHeadAreAskedForBeforeTheNextIsScored) {
  Case c;
  c.top = 8;
  c.in_file = true;
  c.cells = c.n_cells = 1000;
  c.n_kv_heads = 3;
  const Filled filled = fill(c, 1);
  const Inputs inputs = inputs_of(c, 1);
  static const Kernels* real;
  static const CacheLayer* layer;
  static std::vector<int64_t> asked;  // rows, before each call
  real = GetParam();
  layer = filled.layer.get();
  asked.clear();
  Kernels watched = *real;
  watched.score_codes = [](const Queries& queries, const CodedCells& cells, const Mask& mask, float* scores,
                           Scratch& scratch) {
    int64_t n = 0;
    for (Kind kind : {Kind::key, Kind::value}) n += layer->side(kind).store()->n_asked();
    asked.push_back(n);
    real->score_codes(queries, cells, mask, scores, scratch);
  };
  Attention attention;
  retrieve_and_attend(attention, c, *filled.layer, inputs.p, 1, watched);
  ASSERT_EQ(asked.size(), 3u);
  EXPECT_EQ(asked[0], 0);
  EXPECT_GT(asked[1], 0);
  EXPECT_GT(asked[2], asked[1]);
}

// For one token, cells are scored once: attention uses the scores by which cells were chosen, with the same results.
TEST_P(AttentionOn, OneTokensCellsAreScoredOnce) {
  static const Kernels* real;
  static bool takes;
  static std::atomic<int> n_kept, n_looked_up;
  real = GetParam();
  Kernels watched = *real;
  watched.attend_codes = [](const Queries& queries, const CodedCells& cells, const Mask& mask, Softmax& softmax,
                            Scratch& scratch) {
    (cells.scores.data ? n_kept : n_looked_up)++;
    CodedCells seen = cells;
    if (!takes) seen.scores = {};
    real->attend_codes(queries, seen, mask, softmax, scratch);
  };
  for (int n_tokens : {1, 2}) {
    for (bool drop_tail : {false, true}) {
      Case c;
      c.top = 50;
      c.cells = c.n_cells = 700;
      c.group = 5;
      c.n_streams = 2;
      c.n_tokens = n_tokens;
      c.drop_tail = drop_tail;
      c.threads = 3;
      c.softcap = 5;
      c.max_bias = 8;
      const CacheLayer& layer = filled_layer(c, 1);
      std::vector<float> results[2];
      for (bool take : {false, true}) {
        takes = take;
        n_kept = n_looked_up = 0;
        Inputs inputs = inputs_of(c, 1);
        Attention attention;
        retrieve_and_attend(attention, c, layer, inputs.p, c.threads, watched);
        results[take] = inputs.out;
        EXPECT_EQ(n_kept > 0, n_tokens == 1 && !drop_tail);
        EXPECT_EQ(n_looked_up > 0, n_tokens > 1 && !drop_tail);
      }
      EXPECT_EQ(results[0], results[1]) << n_tokens << " tokens";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, AttentionOn, testing::ValuesIn(available_kernels()),
                         [](const auto& info) { return std::string(info.param->name); });

}  // namespace
}  // namespace thimble
