// A whole decode step with retrieval: the CUDA kernels' own source, emulated, against the specification in double.
// Encoding, scores, choice, gathering and attention, as encode and retrieve_step enqueue them.
#define THIMBLE_SIMT_HOST
#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "cuda/attend/score_kernel.h"
#include "cuda/attend/shape.h"
#include "cuda/attend/shared.h"
#include "cuda/attend/tile_kernel.h"
#include "cuda/attend/tile_shape.h"
#include "cuda/encode/encode_kernel.h"
#include "cuda/retrieve/kernel.h"
#include "emulated_attend.h"
#include "fixture.h"

namespace thimble::cuda {
namespace {

struct Case {
  int n_streams = 1, n_tokens = 1, n_kv_heads = 2, group = 4;
  int n_cells = 128, spare_cells = 64, top = 7, n_window = 9, n_splits = 1;
  bool dense = false, mask = false, drop_tail = false;
  float softcap = 0;
};

/// The kernels of a shape, and what they are run on.
template <typename S>
struct Kernels {
  static constexpr bool kTiles = false;
  static constexpr Rates kRates{8.0 / S::kKeyWidth, 8.0 / S::kValueWidth};
  static constexpr double kTolerance = tolerance(S::kKeyWidth, S::kValueWidth);
  // What the codec itself costs is ten times as much.
  static constexpr double kScoreTolerance = S::kWideKeys ? 1e-3 : 0.03;
  static void attend(const AttendArgs& a) { AttendKernel<S>::run(a); }
  static void score(const ScoreArgs& a) { ScoreKernel<S>::run(a); }
};
template <int HeadDim>
struct Kernels<TileShape<HeadDim>> {
  static constexpr bool kTiles = true;
  static constexpr Rates kRates{HeadDim == 64 ? 1.25 : 3, 1.5};
  static constexpr double kTolerance = 1.5e-3, kScoreTolerance = kTileTolerance;
  static void attend(const AttendArgs& a) { TileKernel<TileShape<HeadDim>>::attend(a); }
  static void score(const ScoreArgs& a) { TileKernel<TileShape<HeadDim>>::score(a); }
};

template <typename S>
class Step {
public:
  explicit Step(const Case& c) : c_(c), pairs_(c.n_streams * c.n_kv_heads), store_cells_(c.n_cells + c.spare_cells) {
    for (int h = 0; h < c.n_kv_heads; h++) {
      codecs_[0].push_back(random_codec(Kind::key, D, K::kRates.keys, c.dense, random_));
      codecs_[1].push_back(random_codec(Kind::value, D, K::kRates.values, c.dense, random_));
    }
    for (int kind = 0; kind < 2; kind++) make_cells(kind);
  }

  void check() {
    encode();
    score();
    choose_and_gather();
    attend();
  }

private:
  using K = Kernels<S>;
  static constexpr int D = S::kHeadDim;

  // Codes and, near to what they stand for, stored rows; every other cell of the store must stay unread.
  void make_cells(int kind) {
    store_[kind].assign(size_t(pairs_) * store_cells_ * D, 0x7e00);
    exact_[kind].resize(size_t(pairs_) * c_.n_cells * D);
    coded_[kind].resize(exact_[kind].size());
    for (int i = 0; i < pairs_; i++) {
      heads_[kind].push_back(random_head(codecs_[kind][i % c_.n_kv_heads], c_.n_cells, random_, K::kTiles));
      const CodedHead& head = heads_[kind].back();
      cache_[kind].insert(cache_[kind].end(), head.blocks.begin(), head.blocks.end());
      for (int cell = 0; cell < c_.n_cells; cell++) undo(kind, i, cell);
      for (size_t k = 0; k < head.decoded.size(); k++) {
        const size_t at = size_t(i) * c_.n_cells * D + k;
        const uint16_t half = float_to_half(coded_[kind][at] + 0.2f * random_.normal());
        store_[kind][size_t(i) * store_cells_ * D + k] = half;
        exact_[kind][at] = half_to_float(half);
      }
    }
    tables_[kind] = pack_tables(codecs_[kind], K::kTiles);
  }

  // What a cell's codes are in the model's own domain.
  void undo(int kind, int pair, int cell) {
    codecs_[kind][pair % c_.n_kv_heads].transform.output(&heads_[kind][pair].decoded[size_t(cell) * D], 1,
                                                         &coded_[kind][(size_t(pair) * c_.n_cells + cell) * D]);
  }

  CacheView view(int kind) {
    const size_t block = tables_[kind].view().block_bytes(), head = block * (c_.n_cells / kBlockCells);
    return {cache_[kind].data(), head * c_.n_kv_heads, head, block};
  }
  bool in_window(int cell) const { return cell >= c_.n_cells - c_.n_window; }

  // The last cells of each stream are new, and the window's.
  void encode() {
    const int n_new = c_.n_tokens * c_.n_streams, n_heads = c_.n_kv_heads * c_.group;
    std::vector<int64_t> cells;
    std::vector<int32_t> slots;
    for (int i = 0; i < n_new; i++) {
      const int cell = c_.n_cells - 1 - i / c_.n_streams;
      cells.push_back(int64_t(i % c_.n_streams) * c_.n_cells + cell);
      slots.push_back(in_window(cell) ? c_.n_cells - 1 - cell : -1);
    }
    window_cells_.assign(size_t(c_.n_streams) * c_.n_window, -1);
    hidden_.assign(size_t(c_.n_streams) * c_.n_cells / 32, 0);
    for (int kind = 0; kind < 2; kind++) window_[kind].assign(size_t(pairs_) * c_.n_window * D, 0);
    for (int i = 0; i < pairs_ * c_.n_window; i++) {
      const int pair = i / c_.n_window, slot = i % c_.n_window, cell = c_.n_cells - 1 - slot;
      window_cells_[size_t(pair / c_.n_kv_heads) * c_.n_window + slot] = cell;
      hidden_[(size_t(pair / c_.n_kv_heads) * c_.n_cells + cell) / 32] |= 1u << cell % 32;
      for (int kind = 0; kind < 2; kind++) {
        std::copy_n(&store_[kind][(size_t(pair) * store_cells_ + cell) * D], D, &window_[kind][size_t(i) * D]);
      }
    }
    const std::vector<float> fresh[2] = {random_.normals(size_t(n_new) * c_.n_kv_heads * D),
                                         random_.normals(size_t(n_new) * c_.n_kv_heads * D)};
    raw_ = random_.normals(size_t(n_new) * n_heads * D);

    EncodeArgs p;
    p.n_kv_heads = c_.n_kv_heads;
    p.head_dim = D;
    p.n_tokens = n_new;
    p.tokens_per_block = 3;
    p.keys = fresh[0].data();
    p.values = fresh[1].data();
    p.key_token_stride = p.value_token_stride = c_.n_kv_heads * D;
    p.key_head_stride = p.value_head_stride = D;
    p.cells = cells.data();
    p.cells_per_stream = c_.n_cells;
    p.key_cache = view(0);
    if (!c_.drop_tail) p.value_cache = view(1);  // else there are no codes of values
    p.key_codec = tables_[0].view();
    p.value_codec = tables_[1].view();
    if (c_.n_window > 0) p.window = {window_[0].data(), window_[1].data(), slots.data(), c_.n_window};
    p.store = {store_[0].data(), store_[1].data(), 0, c_.n_streams, store_cells_};
    using Kernel = EncodeKernel<D>;
    simt::Machine::launch({(n_new + 2) / 3, 2 * c_.n_kv_heads}, Kernel::kThreads, Kernel::kSharedBytes,
                          [&] { Kernel::run(p); });

    // What the new cells are from now on: rows in the store, and codes.
    for (int kind = 0; kind < 2; kind++) {
      for (int i = 0; i < n_new * c_.n_kv_heads; i++) {
        const int h = i % c_.n_kv_heads, cell = int(cells[i / c_.n_kv_heads] % c_.n_cells);
        const int pair = int(cells[i / c_.n_kv_heads] / c_.n_cells) * c_.n_kv_heads + h;
        const HeadCodec& codec = codecs_[kind][h];
        std::vector<float> y(D);
        std::vector<uint8_t> codes(codec.format.vector_bytes());
        codec.transform.forward(&fresh[kind][size_t(i) * D], y.data());
        for (int d = 0; d < D; d++) {
          const uint16_t half = float_to_half(fresh[kind][size_t(i) * D + d]);
          ASSERT_EQ(store_[kind][(size_t(pair) * store_cells_ + cell) * D + d], half);
          exact_[kind][(size_t(pair) * c_.n_cells + cell) * D + d] = half_to_float(half);
        }
        const uint16_t scale = encode_vector(codec, y.data(), codes.data());
        decode_vector(codec, codes.data(), scale, &heads_[kind][pair].decoded[size_t(cell) * D]);
        undo(kind, pair, cell);
      }
    }
  }

  void score() {
    AttendArgs& a = attend_;
    a = attend_args(c_, D);
    deal_out(a, c_.n_splits, 0);
    a.keys = view(0);
    if (!c_.drop_tail) a.values = view(1);
    a.key_codec = tables_[0].view();
    a.value_codec = tables_[1].view();
    a.queries = raw_.data();
    a.query_head_stride = D;
    a.query_token_stride = size_t(c_.n_kv_heads) * c_.group * D;
    a.query_stream_stride = c_.n_tokens * a.query_token_stride;
    a.scale = kScale;
    mask_.resize(size_t(c_.n_streams) * c_.n_tokens * c_.n_cells);
    for (uint16_t& m : mask_) m = float_to_half(random_.below(3) == 0 ? -INFINITY : -0.125f * float(random_.below(16)));
    if (c_.mask) {
      a.mask = mask_.data();
      a.mask_token_stride = c_.n_cells;
      a.mask_stream_stride = size_t(c_.n_cells) * c_.n_tokens;
    }
    if (c_.n_window > 0) {
      a.exact[0] = {window_[0].data(), window_[1].data(), window_cells_.data(), c_.n_window, false};
      a.end_cell = c_.n_cells;
      a.hidden = hidden_.data();
      a.hidden_stream_stride = c_.n_cells / 32;
    }

    RetrieveArgs& r = retrieve_;
    r.n_streams = c_.n_streams;
    r.n_kv_heads = c_.n_kv_heads;
    r.head_dim = D;
    r.n_cells = c_.n_cells;
    r.row_groups = a.row_groups;
    r.top = c_.top;
    r.store_keys = store_[0].data();
    r.store_values = store_[1].data();
    r.store_cells = store_cells_;
    scores_.assign(size_t(pairs_) * a.row_groups * c_.n_cells, NAN);
    block_maxima_.assign(scores_.size() / kBlockCells, NAN);
    all_hidden_.assign(size_t(pairs_) * c_.n_cells / 32, ~0u);
    chosen_.assign(size_t(pairs_) * c_.top, 99);
    for (auto& rows : rows_) rows.assign(chosen_.size() * D, 0x7e00);
    r.scores = scores_.data();
    r.block_maxima = block_maxima_.data();
    r.all_hidden = all_hidden_.data();
    r.cells = chosen_.data();
    r.keys = rows_[0].data();
    r.values = rows_[1].data();

    const ScoreArgs score{a, r.scores, r.block_maxima, r.all_hidden};
    simt::Machine::launch({std::min(2, a.n_streams * a.n_splits), c_.n_kv_heads, a.row_groups}, S::kThreads,
                          shared_bytes<S>(), [&] { K::score(score); });
    best_.assign(size_t(pairs_) * c_.n_cells, -INFINITY);
    double error = 0, size = 0;
    for (size_t i = 0; i < best_.size(); i++) {
      const size_t pair = i / c_.n_cells, cell = i % c_.n_cells;
      double expected = -INFINITY;
      for (int row = 0; row < c_.n_tokens * c_.group; row++) {
        const double x = 1.44269504 * logit(int(pair), row, int(cell), transformed(int(pair), row),
                                            &heads_[0][pair].decoded[cell * D], lacking(int(pair), row));
        if (!in_window(int(cell))) expected = std::max(expected, x);
      }
      for (int g = 0; g < a.row_groups; g++) {
        const size_t group = pair * a.row_groups + g;
        best_[i] = std::max(best_[i], scores_[group * c_.n_cells + cell]);
        ASSERT_LE(scores_[group * c_.n_cells + cell], block_maxima_[(group * c_.n_cells + cell) / kBlockCells]);
      }
      if (expected == -INFINITY) {
        ASSERT_EQ(best_[i], -INFINITY);
      } else {
        error += std::pow(best_[i] - expected, 2);
        size += expected * expected;
      }
    }
    ASSERT_LT(std::sqrt(error / size), K::kScoreTolerance);
  }

  size_t head_of(int pair, int row) const {  // among the query vectors
    const int stream = pair / c_.n_kv_heads, h = pair % c_.n_kv_heads, token = row / c_.group;
    return size_t(stream * c_.n_tokens + token) * c_.n_kv_heads * c_.group + h * c_.group + row % c_.group;
  }
  // What codes lack of a query's products: that with the mean, and score_bias. It is the same for all cells, but rows
  // of a group compete.
  double lacking(int pair, int row) {
    const HeadCodec& codec = codecs_[0][pair % c_.n_kv_heads];
    return codec.transform.query_bias(&raw_[head_of(pair, row) * D]) +
           kScale * codec.score_bias(transformed(pair, row));
  }
  // A query as the codes want it.
  const float* transformed(int pair, int row) {
    std::vector<float>& q = transformed_[head_of(pair, row)];
    if (q.empty()) {
      q.resize(D);
      codecs_[0][pair % c_.n_kv_heads].transform.query(&raw_[head_of(pair, row) * D], q.data());
    }
    return q.data();
  }

  // Scaled, capped, masked; x: what the product lacks.
  double logit(int pair, int row, int cell, const float* query, const float* key, double x = 0) const {
    const int stream = pair / c_.n_kv_heads, token = row / c_.group;
    for (int d = 0; d < D; d++) x += double(query[d]) * key[d];
    x *= kScale;
    if (c_.softcap != 0) x = c_.softcap * std::tanh(x / c_.softcap);
    return c_.mask ? x + half_to_float(mask_[(size_t(stream) * c_.n_tokens + token) * c_.n_cells + cell]) : x;
  }

  void choose_and_gather() {
    simt::Machine::launch({1, pairs_}, RetrieveKernel::kThreads, RetrieveKernel::kSharedBytes,
                          [&] { RetrieveKernel::choose<false>(retrieve_); });
    simt::Machine::launch({2, pairs_}, RetrieveKernel::kThreads, 0, [&] { RetrieveKernel::gather(retrieve_); });
    is_exact_.assign(best_.size(), 0);
    for (int pair = 0; pair < pairs_; pair++) {
      const std::vector<float> best(&best_[size_t(pair) * c_.n_cells], &best_[size_t(pair) * c_.n_cells] + c_.n_cells);
      const std::vector<int32_t> expected = greatest(best, c_.top);
      std::vector<int32_t> got;
      for (int i = 0; i < c_.top; i++) {
        const int cell = chosen_[size_t(pair) * c_.top + i];
        if (cell < 0) continue;
        got.push_back(cell);
        for (int kind = 0; kind < 2; kind++) {
          const uint16_t* row = &rows_[kind][(size_t(pair) * c_.top + i) * D];
          ASSERT_TRUE(std::equal(row, row + D, &store_[kind][(size_t(pair) * store_cells_ + cell) * D]));
        }
      }
      std::sort(got.begin(), got.end());
      ASSERT_EQ(got, expected);
      for (int cell = 0; cell < c_.n_cells; cell++) {
        const bool exact = in_window(cell) || std::binary_search(got.begin(), got.end(), cell);
        is_exact_[size_t(pair) * c_.n_cells + cell] = exact;
        ASSERT_EQ(all_hidden_[(size_t(pair) * c_.n_cells + cell) / 32] >> cell % 32 & 1, uint32_t(exact));
      }
    }
  }

  void attend() {
    AttendArgs a = with_retrieved(attend_, retrieve_, c_.drop_tail);
    deal_out(a, c_.n_splits, 0);
    const int n_heads = c_.n_kv_heads * c_.group;
    const std::vector<float> output = emulate_attend<S>(a, std::min(2, a.n_streams * a.n_splits), K::attend);

    std::vector<double> expected;
    for (int i = 0; i < c_.n_streams * c_.n_tokens * n_heads; i++) {
      const int head = i % n_heads, token = i / n_heads % c_.n_tokens, stream = i / n_heads / c_.n_tokens;
      const int h = head / c_.group, pair = stream * c_.n_kv_heads + h, row = token * c_.group + head % c_.group;
      double total = 0;
      std::vector<double> y(D);
      for (int cell = 0; cell < c_.n_cells; cell++) {
        const size_t at = size_t(pair) * c_.n_cells + cell;
        const bool exact = is_exact_[at];
        if (!exact && c_.drop_tail) continue;
        const auto row_of = [&](int kind) { return &(exact ? exact_ : coded_)[kind][at * D]; };
        const double lacks = exact ? 0 : kScale * codecs_[0][h].score_bias(transformed(pair, row));
        const double p = std::exp(logit(pair, row, cell, &raw_[size_t(i) * D], row_of(0), lacks));
        total += p;
        for (int d = 0; d < D; d++) y[d] += p * row_of(1)[d];
      }
      for (int d = 0; d < D; d++) expected.push_back(y[d] / total);
    }
    EXPECT_LT(relative_error(output, expected), K::kTolerance);
  }

  static constexpr float kScale = 1.5f / 8;

  Case c_;
  Random random_{17};
  int pairs_, store_cells_;
  // By Kind. Of pairs: of a stream and KV head.
  std::vector<HeadCodec> codecs_[2];
  HostTables tables_[2];
  std::vector<CodedHead> heads_[2];
  std::vector<uint8_t> cache_[2];
  std::vector<uint16_t> store_[2], window_[2], rows_[2];
  std::vector<float> exact_[2], coded_[2];  // [pair][cell][D], in the model's own domain
  std::vector<int32_t> window_cells_, chosen_;
  std::vector<uint32_t> hidden_, all_hidden_;
  std::vector<uint16_t> mask_;
  std::vector<float> raw_, scores_, block_maxima_, best_;
  std::vector<char> is_exact_;
  std::map<size_t, std::vector<float>> transformed_;
  AttendArgs attend_;
  RetrieveArgs retrieve_;
};

TEST(CudaRetrieveStep, OneToken) {
  Step<AttendShape<128, 4, 4, true>>({}).check();
  Step<AttendShape<64, 8, 8, true>>({.group = 1, .n_cells = 192, .top = 64, .mask = true, .softcap = 3}).check();
  Step<AttendShape<64, 2, 4, true>>({.n_kv_heads = 1, .group = 3, .dense = true, .mask = true, .softcap = 4}).check();
}

TEST(CudaRetrieveStep, ManyRows) {
  Step<AttendShape<64, 4, 4, true>>({.n_tokens = 5, .group = 3, .top = 12, .mask = true}).check();
  Step<AttendShape<64, 4, 8, true>>({.n_streams = 2, .n_tokens = 2, .group = 7, .n_splits = 2, .dense = true}).check();
}

TEST(CudaRetrieveStep, SmallDevicesAndOddWindows) {
  Step<AttendShape<64, 4, 4, false>>({.n_streams = 3, .group = 2, .n_window = 0, .mask = true}).check();
  Step<AttendShape<128, 8, 8, false>>({.n_tokens = 3, .group = 2, .top = 1, .n_window = 2}).check();
}

TEST(CudaRetrieveStep, Tiles) {
  Step<TileShape<64>>({.n_tokens = 5, .group = 3, .top = 12, .mask = true}).check();
  Step<TileShape<64>>({.n_cells = 192, .top = 20, .dense = true, .mask = true, .drop_tail = true, .softcap = 3})
      .check();
  Step<TileShape<128>>({.n_streams = 2, .n_tokens = 2, .group = 7, .n_splits = 2, .dense = true}).check();
}

TEST(CudaRetrieveStep, TailDroppedAndAllCellsChosen) {
  Step<AttendShape<64, 4, 4, true>>({.top = 20, .mask = true, .drop_tail = true}).check();
  Step<AttendShape<64, 2, 2, true>>({.n_cells = 64, .top = 100, .mask = true}).check();
}

}  // namespace
}  // namespace thimble::cuda
