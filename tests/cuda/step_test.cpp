// Decoding token by token over a CUDA cache, emulated: the window's books, coding what leaves it, and attention that
// takes new rows in, against a specification that keeps every row.
#define THIMBLE_SIMT_HOST
#include <gtest/gtest.h>

#include <cstring>

#include "cuda/attend/shape.h"
#include "cuda/attend/tile_kernel.h"
#include "cuda/attend/tile_shape.h"
#include "cuda/encode/encode_kernel.h"
#include "emulated_attend.h"
#include "fixture.h"
#include "test_window.h"

namespace thimble::cuda {
namespace {

constexpr int kDim = 64, kHeads = 2, kGroup = 2, kCells = 128, kLast = 6, kPool = 2, kSpare = 1,
              kSlots = kLast + kPool + 2 * kSpare, kCapacity = kSlots + kMaxTokens;
using Encode = EncodeKernel<kDim>;

/// Kernels with tables, and rates for them.
struct Tables {
  using Shape = AttendShape<kDim, 4, 4, true>;
  static constexpr bool kTiles = false;
  static constexpr Rates kRates{2, 2};
  static constexpr double kTolerance = 1.2 * tolerance(4, 4);  // few cells: errors average out less
  static void attend(const AttendArgs& a) { AttendKernel<Shape>::run(a); }
};

/// Kernels over tiles.
struct Tiles {
  using Shape = TileShape<kDim>;
  static constexpr bool kTiles = true;
  static constexpr Rates kRates{1.25, 3};
  static constexpr double kTolerance = 1.5e-3;
  static void attend(const AttendArgs& a) { TileKernel<Shape>::attend(a); }
};

/// One stream and one layer; what llama.cpp would tell of a batch is the tokens' cells, and a causal mask.
template <typename Kernels>
class Layer {
public:
  explicit Layer(bool dense) : random_(4) {
    for (int h = 0; h < kHeads; h++) {
      codecs_[0].push_back(random_codec(Kind::key, kDim, Kernels::kRates.keys, dense, random_));
      codecs_[1].push_back(random_codec(Kind::value, kDim, Kernels::kRates.values, dense, random_));
    }
    for (int k = 0; k < 2; k++) {
      tables_[k] = pack_tables(codecs_[k], Kernels::kTiles);
      const size_t block = codecs_[k][0].format.block_bytes(), head = block * (kCells / kBlockCells);
      cache_[k].resize(kHeads * head);
      view_[k] = {cache_[k].data(), kHeads * head, head, block};
      rows_[k].resize(kHeads * kCapacity * kDim, 0x7e00);  // not a number
      all_[k].resize(kCells * kHeads * kDim);
    }
    layer_.n_kv_heads = kHeads;
    layer_.head_dim = kDim;
    layer_.key_codec = tables_[0].view();
    layer_.value_codec = tables_[1].view();
    layer_.key_cache = view_[0];
    layer_.value_cache = view_[1];
    layer_.cells_per_stream = kCells;
    layer_.window = {rows_[0].data(), rows_[1].data(), nullptr, kCapacity};
    window_.w.n_kv_heads = kHeads;
    window_.w.group = kGroup;
    window_.w.head_dim = kDim;
    window_.w.keys = rows_[0].data();
    window_.w.queries = queries_.data();
  }

  /// Writes a batch, attends if it is small enough to be decoded, and returns attention's error.
  double run(const std::vector<int64_t>& cells) {
    const int n = int(cells.size());
    std::vector<float> keys = random_.normals(n * kHeads * kDim), values = random_.normals(keys.size());
    for (int i = 0; i < n * kHeads * kDim; i++) {  // f16 already, so that a prompt's codes are the window's
      const size_t at = cells[i / (kHeads * kDim)] * kHeads * kDim + i % (kHeads * kDim);
      all_[0][at] = keys[i] = half_to_float(float_to_half(keys[i]));
      all_[1][at] = values[i] = half_to_float(float_to_half(values[i]));
    }
    for (int64_t cell : cells) last_ = std::max(last_, int(cell) + 1);

    std::vector<uint16_t> mask(n * kCells);
    for (int i = 0; i < n * kCells; i++) mask[i] = i % kCells <= cells[i / kCells] ? 0 : 0xfc00;
    window_.update(cells, mask);
    LeaveArgs leave;
    leave.layers = &layer_;
    leave.windows = window_.layer.data();
    leave.n_layers = 1;
    leave.n_kv_heads = kHeads;
    leave.n_tokens = n;
    leave.tokens_per_block = 4;
    simt::Machine::launch({2, 2 * kHeads}, Encode::kThreads, Encode::kSharedBytes, [&] { Encode::run_leaving(leave); });
    if (n > kMaxTokens) {
      EncodeArgs p = layer_;
      p.n_tokens = n;
      p.keys = keys.data();
      p.values = values.data();
      p.key_token_stride = p.value_token_stride = kHeads * kDim;
      p.key_head_stride = p.value_head_stride = kDim;
      p.cells = cells.data();
      p.window.slots = window_.token_slots.data();
      simt::Machine::launch({n, 2 * kHeads}, Encode::kThreads, Encode::kSharedBytes, [&] { Encode::run(p); });
      return 0;
    }
    return attend(cells, keys, values);
  }

  int last() const { return last_; }
  int n_kept() const { return n_kept_; }

private:
  double attend(const std::vector<int64_t>& cells, const std::vector<float>& keys, const std::vector<float>& values) {
    const int n = int(cells.size()), n_heads = kHeads * kGroup;
    const std::vector<float> queries = random_.normals(size_t(n) * n_heads * kDim);
    std::vector<uint16_t> mask(n * kCells);
    for (int i = 0; i < n * kCells; i++) mask[i] = i % kCells <= cells[i / kCells] ? 0 : 0xfc00;
    const struct {
      int n_streams = 1, n_tokens, n_kv_heads = kHeads, group = kGroup, n_cells = kCells;
      float softcap = 0;
    } sizes{.n_tokens = n};
    AttendArgs a = attend_args(sizes, kDim);
    a.keys = view_[0];
    a.values = view_[1];
    a.key_codec = layer_.key_codec;
    a.value_codec = layer_.value_codec;
    a.queries = queries.data();
    a.query_head_stride = kDim;
    a.query_token_stride = a.query_stream_stride = n_heads * kDim;
    a.scale = 0.125f;
    a.mask = mask.data();
    a.mask_token_stride = kCells;
    a.hidden = window_.hidden.data();
    a.exact[0] = {rows_[0].data(), rows_[1].data(), window_.window.data(), kCapacity, false};
    a.kept_queries = queries_.data();
    a.n_judges = kMaxTokens;
    a.fresh.keys = keys.data();
    a.fresh.values = values.data();
    a.fresh.key_token_stride = a.fresh.value_token_stride = kHeads * kDim;
    a.fresh.key_head_stride = a.fresh.value_head_stride = kDim;
    a.fresh.tokens = window_.tokens.data();
    a.fresh.window_keys = rows_[0].data();
    a.fresh.window_values = rows_[1].data();
    deal_out(a, 1, 0);
    const std::vector<float> output = emulate_attend<typename Kernels::Shape>(a, 1, Kernels::attend);
    for (int j = 0; j < kMaxTokens; j++) {
      if (window_.judges[j] < 0) continue;
      n_kept_++;
      const size_t size = n_heads * kDim;
      EXPECT_TRUE(std::equal(&queries[window_.judges[j] * size], &queries[window_.judges[j] * size] + size,
                             &queries_[j * size]));
    }

    std::vector<double> expected;
    std::vector<float> transformed(kDim), k(kDim), v(kDim), mean(kDim), out(kDim);
    for (int i = 0; i < n * n_heads; i++) {
      const int h = i % n_heads / kGroup;
      const float* q = &queries[i * kDim];
      codecs_[0][h].transform.query(q, transformed.data());
      const double lacking = 0.125 * codecs_[0][h].score_bias(transformed.data());  // of coded cells' scores
      double total = 0;
      std::vector<double> y(kDim);
      for (int cell = 0; cell <= cells[i / n_heads]; cell++) {
        const size_t at = (size_t(cell) * kHeads + h) * kDim;
        std::copy_n(&all_[0][at], kDim, k.begin());
        std::copy_n(&all_[1][at], kDim, v.begin());
        const bool coded = !(window_.hidden[cell / 32] >> cell % 32 & 1);
        if (coded) {
          code(codecs_[0][h], k);
          code(codecs_[1][h], v);
        }
        double x = coded ? lacking : 0;
        for (int d = 0; d < kDim; d++) x += double(q[d]) * k[d];
        const double p = std::exp(x * 0.125);
        total += p;
        for (int d = 0; d < kDim; d++) y[d] += p * v[d];
      }
      for (int d = 0; d < kDim; d++) expected.push_back(y[d] / total);
    }
    return relative_error(output, expected);
  }

  // There and back: what a coded vector is in the model's own domain.
  static void code(const HeadCodec& codec, std::vector<float>& x) {
    std::vector<float> y(kDim), decoded(kDim);
    std::vector<uint8_t> codes(size_t(codec.format.vector_bytes()));
    codec.transform.forward(x.data(), y.data());
    const uint16_t scale = encode_vector(codec, y.data(), codes.data());
    decode_vector(codec, codes.data(), scale, decoded.data());
    codec.transform.output(decoded.data(), 1, x.data());
  }

  Random random_;
  std::vector<HeadCodec> codecs_[2];
  HostTables tables_[2];
  std::vector<uint8_t> cache_[2];
  CacheView view_[2];
  std::vector<uint16_t> rows_[2];
  std::vector<float> all_[2];  // [cells][KV heads][head size]
  EncodeArgs layer_;
  TestWindow window_{{kLast, kPool, kSpare}, kSlots, kCells, 1};
  std::vector<float> queries_ = std::vector<float>(kMaxTokens * kHeads * kGroup * kDim);
  int last_ = 0, n_kept_ = 0;
};

template <typename Kernels>
void decode_token_by_token() {
  constexpr double kTolerance = Kernels::kTolerance;
  for (const bool dense : {false, true}) {
    Layer<Kernels> layer(dense);
    const auto next = [&](int n) {
      std::vector<int64_t> cells;
      for (int i = 0; i < n; i++) cells.push_back(layer.last() + i);
      return cells;
    };
    for (int step = 0; step < 13; step++) {  // the window fills, and cells leave it
      EXPECT_LT(layer.run(next(1)), kTolerance) << step;
    }
    EXPECT_LT(layer.run(next(5)), kTolerance);
    layer.run(next(40));  // a prompt, over cells that were not coded yet
    for (int step = 0; step < 6; step++) EXPECT_LT(layer.run(next(1 + step % 3)), kTolerance) << step;
    EXPECT_LT(layer.run({layer.last() - 1, layer.last(), layer.last() + 1}), kTolerance);  // the first one anew
    EXPECT_LT(layer.run(next(1)), kTolerance);
    EXPECT_GT(layer.n_kept(), 3);
  }
}

TEST(CudaStep, DecodesTokenByToken) {
  decode_token_by_token<Tables>();
}

TEST(CudaStep, DecodesTokenByTokenOverTiles) {
  decode_token_by_token<Tiles>();
}

}  // namespace
}  // namespace thimble::cuda
