// The parts of `thimble eval` that need no model: names of caches and their bytes, scores and rows, and the
// emulation of published methods for one attention node.
#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <random>
#include <set>

#include "codec/half.h"
#include "eval/cache.h"
#include "eval/kvarn_cache.h"
#include "eval/oscar_cache.h"
#include "eval/tailorkv_cache.h"
#include "eval/tasks.h"
#include "eval/text_score.h"
#include "support/temporary_folder.h"

namespace thimble {
namespace {

const ModelShape kShape = {"test", {{3, 9, 64, 64}, {3, 9, 64, 64}}, {}};

/// Both layers, of which the first attends broadly.
Profile two_classes() {
  Profile profile;
  profile.shape = kShape;
  profile.density = {0.6f, 0.1f};
  return profile;
}

TEST(EvalCache, Names) {
  EXPECT_EQ(parse_cache("q4_0").type, GGML_TYPE_Q4_0);
  EXPECT_FALSE(parse_cache("q4_0").coded);
  const EvalCache split = parse_cache("3/1");
  EXPECT_EQ(split.key_bits, 3);
  EXPECT_EQ(split.value_bits, 1);
  const EvalCache drop = parse_cache("1.25+128drop");
  EXPECT_EQ(drop.key_bits, 1.25);
  EXPECT_EQ(drop.top, 128);
  EXPECT_TRUE(drop.drop_tail);
  for (const char* wrong : {"", "q3", "2+", "2drop", "2+64drops", "3/", "bits"}) {
    EXPECT_THROW(parse_cache(wrong), std::runtime_error) << wrong;
  }
}

TEST(EvalCache, PublishedMethodsStandBesideTheirLike) {
  const auto caches = caches_to_measure({"2", "f16", "q4_0", "2+64"}, {"vecinfer", "tailorkv"});
  std::vector<std::string> rows;
  for (const EvalCache& c : caches) rows.push_back(std::string(method_name(c.method)) + " " + c.name);
  EXPECT_EQ(rows, (std::vector<std::string>{"thimble f16", "thimble 2", "vecinfer 2", "thimble q4_0", "thimble 2+64",
                                            "tailorkv 1+64"}));
  EXPECT_THROW(caches_to_measure({"2"}, {"tailorkv"}), std::runtime_error);
}

TEST(EvalCache, OscarHasTwoBitsAndKvarnWholeOnes) {
  std::vector<std::string> rows;
  for (const EvalCache& c : caches_to_measure({"2", "4/2", "1.5", "2+64"}, {"oscar", "kvarn"})) {
    rows.push_back(std::string(method_name(c.method)) + " " + c.name);
  }
  EXPECT_EQ(rows, (std::vector<std::string>{"thimble f16", "thimble 2", "oscar 2", "kvarn 2", "thimble 4/2",
                                            "kvarn 4/2", "thimble 1.5", "thimble 2+64"}));
}

TEST(EvalCache, Bytes) {
  const double vectors = 2 * 2 * 3;  // layers, keys and values, KV heads
  const CacheLayout layout = CacheLayout::plain(kShape, 1000);
  const auto plain = [&](const char* name) { return cache_bytes(parse_cache(name), nullptr, layout, 0); };
  EXPECT_EQ(plain("f16").compute, vectors * 1000 * 128);
  EXPECT_EQ(plain("q8_0").compute, vectors * 1000 * 68);

  // Blocks of 64 cells; 128 last cells, 40 others, and room for 32 more.
  const auto coded = [&](const char* name) {
    return planned_bytes(Settings::parse(settings_of(parse_cache(name), "window=128,pool=40,small=0")), layout);
  };
  EXPECT_EQ(coded("2").compute, vectors * (1024 * 18 + 200 * 128));
  EXPECT_EQ(coded("2").store, 0);
  EXPECT_EQ(coded("2+64").compute, vectors * 1024 * 18);  // the window is read from the store
  EXPECT_EQ(coded("2+64").store, vectors * 1000 * 128);
  EXPECT_EQ(coded("2+64drop").compute, vectors / 2 * 1024 * 18);

  const Profile profile = two_classes();
  const EvalCache tailorkv = caches_to_measure({"2+64"}, {"tailorkv"}).back();
  const CacheBytes published = cache_bytes(tailorkv, &profile, layout, 0);
  EXPECT_EQ(published.compute, 3 * (2 * 1000 * 12 + 1000 * 32 + 2 * 64 * 128));
  EXPECT_EQ(published.store, 3 * 2 * 1000 * 128);
}

TEST(EvalCache, BytesOfOscarAndKvarn) {
  EXPECT_EQ(oscar::bits(64), 2.5);
  EXPECT_EQ(oscar::bits(256), 2.25);
  EXPECT_EQ(kvarn::bits(Kind::key, 128, 4), 4.375);
  EXPECT_EQ(kvarn::bits(Kind::value, 128, 2), 2.375);
  EXPECT_EQ(kvarn::bits(Kind::key, 256, 4), 4 + 16 * 640.0 / (128 * 256));
  EXPECT_EQ(kvarn::bits(Kind::value, 256, 2), 2 + 16 * 512.0 / (128 * 256));

  const CacheLayout layout = CacheLayout::plain(kShape, 1024);
  const Settings settings = Settings::parse("bits=2,small=0");
  const auto caches = caches_to_measure({"2", "4/2"}, {"oscar", "kvarn"});
  const double heads = 2 * 3;  // layers, KV heads
  EXPECT_EQ(published_bytes(caches[2], settings, layout).compute, 2 * heads * (1024 * 20 + 320 * 128));
  EXPECT_EQ(published_bytes(caches[5], settings, layout).compute,
            heads * (1024 * (64 * 4.5 + 64 * 2.625) / 8 + 2 * 256 * 128));
  EXPECT_EQ(published_bits(caches[2], settings, layout), 2.5);
  EXPECT_EQ(published_bits(caches[5], settings, layout), (4.5 + 2.625) / 2);
  // Caches that are left f16 cost what f16 costs.
  const Settings all_small = Settings::parse("bits=2,small=4096");
  EXPECT_EQ(published_bytes(caches[2], all_small, layout).compute, 2 * heads * 1024 * 128);
  EXPECT_EQ(published_bits(caches[2], all_small, layout), 16);
}

TEST(Oscar, ClipsAndRoundsToFourLevelsAGroup) {
  // The 62nd of 64 absolute values limits keys, the 59th values.
  std::vector<float> y(64);
  for (int i = 0; i < 64; i++) y[i] = float(i % 2 ? i : -i);
  std::vector<float> keys = y, values = y;
  oscar::code_vector(keys.data(), 64, Kind::key);
  oscar::code_vector(values.data(), 64, Kind::value);
  EXPECT_EQ(std::set<float>(keys.begin(), keys.end()).size(), 4u);
  EXPECT_NEAR(*std::max_element(keys.begin(), keys.end()), 61, 1e-4);
  EXPECT_NEAR(*std::min_element(keys.begin(), keys.end()), -61, 1e-4);
  EXPECT_NEAR(*std::max_element(values.begin(), values.end()), 58, 1e-4);
  EXPECT_NEAR(keys[21], 61 / 3.0, 1e-4);  // the nearest of -61, -61 / 3, 61 / 3, 61
  EXPECT_NEAR(keys[44], -61, 1e-4);

  // A vector of 256 has two groups with levels of their own; the limit is that of the whole vector.
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> wide(256);
  for (int i = 0; i < 256; i++) wide[i] = normal(random) * (i < 128 ? 1 : 0.01f);
  oscar::code_vector(wide.data(), 256, Kind::key);
  const std::set<float> first(wide.begin(), wide.begin() + 128), second(wide.begin() + 128, wide.end());
  EXPECT_EQ(first.size(), 4u);
  EXPECT_EQ(second.size(), 4u);
  EXPECT_LT(*second.rbegin(), 0.1f);
}

TEST(Kvarn, BalancesRowsAndColumns) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const int n_rows = 16, n_columns = 24;
  std::vector<float> matrix;
  for (int r = 0; r < n_rows; r++) {
    for (int c = 0; c < n_columns; c++) matrix.push_back(normal(random) * float((r + 1) * (1 + c % 3) * 10));
  }
  // Of the greatest deviation of a row over the least. Scales are bounded from below, so the least rows converge late.
  const auto imbalance = [&](const kvarn::Scales& scales) {
    std::vector<double> deviations;
    for (int r = 0; r < n_rows; r++) {
      double square = 0, sum = 0;
      for (int c = 0; c < n_columns; c++) {
        const double x = matrix[size_t(r) * n_columns + c] / scales.row[r] / scales.column[c];
        sum += x, square += x * x;
      }
      deviations.push_back(std::sqrt((square - sum * sum / n_columns) / (n_columns - 1)));
    }
    const auto [least, greatest] = std::minmax_element(deviations.begin(), deviations.end());
    return *greatest / *least;
  };
  const kvarn::Scales ones{std::vector<float>(n_rows, 1.0f), std::vector<float>(n_columns, 1.0f)};
  const kvarn::Scales scales = kvarn::balance(matrix, n_rows, n_columns);
  EXPECT_GT(imbalance(ones), 10);
  EXPECT_LT(imbalance(scales), 3);
  EXPECT_NEAR(scales.column[2] / scales.column[0], 3, 1.5);
  // A balanced matrix stays as it is, or nearly so.
  for (float& x : matrix) x = normal(random);
  for (float s : kvarn::balance(matrix, n_rows, n_columns).row) EXPECT_NEAR(s, 1, 0.6);
}

TEST(Kvarn, ErrorsOfATile) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (int dim : {64, 256}) {
    for (Kind kind : {Kind::key, Kind::value}) {
      std::vector<float> tile(size_t(kvarn::kTile) * dim);
      for (float& x : tile) x = 3 * normal(random);
      double errors[3] = {};
      for (int i = 0; i < 3; i++) {
        std::vector<float> coded = tile;
        kvarn::code_tile(coded.data(), dim, kind, 2 << i);  // 2, 4, 8 bits
        double power = 0;
        for (size_t j = 0; j < tile.size(); j++) {
          errors[i] += std::pow(tile[j] - coded[j], 2);
          power += std::pow(tile[j], 2);
        }
        errors[i] /= power;
      }
      // A normal number's range of about 5 deviations is cut into 3, 15 and 255 steps: step^2 / 12.
      EXPECT_NEAR(errors[0], std::pow(5.2 / 3, 2) / 12, 0.08) << dim;
      EXPECT_NEAR(errors[1], std::pow(5.2 / 15, 2) / 12, 0.004) << dim;
      EXPECT_LT(errors[2], 1e-4) << dim;
    }
  }
}

TEST(TextScore, OneToken) {
  const std::vector<float> exact = {std::log(0.5f), std::log(0.25f), std::log(0.25f)};
  const std::vector<float> other = {std::log(0.25f), std::log(0.5f), std::log(0.25f)};
  const TokenScore same = score_token(exact, exact, 1);
  EXPECT_EQ(same.divergence, 0);
  EXPECT_TRUE(same.agrees);
  EXPECT_NEAR(same.nll, std::log(4), 1e-6);
  const TokenScore off = score_token(other, exact, 1);
  EXPECT_NEAR(off.divergence, 0.25 * std::log(2), 1e-6);
  EXPECT_FALSE(off.agrees);
  EXPECT_NEAR(off.exact_nll - off.nll, std::log(2), 1e-6);
}

TEST(TextScore, Summary) {
  // Two chunks of two positions.
  const auto row =
      summarize({{1.0, 1.0, 0.0, true}, {1.2, 1.0, 0.4, true}, {1.4, 1.0, 0.2, false}, {1.0, 1.0, 0.2, true}}, 2);
  EXPECT_NEAR(row["ppl"], std::exp(1.15), 1e-9);
  EXPECT_NEAR(row["ppl_ratio"], std::exp(0.15), 1e-9);
  EXPECT_NEAR(row["ppl_ratio_error"], std::exp(0.15) * std::sqrt(0.11 / 4) / 2, 1e-3);
  EXPECT_NEAR(row["kld_mean"], 0.2, 1e-9);
  EXPECT_EQ(row["kld_p99"], 0.4);
  EXPECT_EQ(row["top1_agreement"], 0.75);
  EXPECT_NEAR(row["kld_by_position"][0], 0.1, 1e-9);
  EXPECT_NEAR(row["kld_by_position"][1], 0.3, 1e-9);
}

TEST(TextScore, RowsAreComplete) {
  nlohmann::json row = cache_row(parse_cache("2"), {}, CacheLayout::plain(kShape, 2048));
  row.update(summarize({{1, 1, 0, true}}, 1));
  for (const char* key : {"kv", "method", "bits_per_value", "kv_bytes", "store_bytes", "ppl", "ppl_ratio", "kld_mean",
                          "kld_p99", "top1_agreement", "kld_by_position", "log_p"}) {
    EXPECT_TRUE(row.contains(key)) << key;
  }
  EXPECT_EQ(row["bits_per_value"], 2.25);
}

TEST(TextScore, ExactRunIsKeptForItsTokensOnly) {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("exact_run");
  ExactRun run{{1, 2, 3}, 2, {{-0.5f, -1.0f}, {-2.0f, -3.0f}}, 7.0};
  ExactRun read{{1, 2, 3}, 2, {}, 0};
  EXPECT_FALSE(read_exact_run(path, read));
  write_exact_run(run, path);
  ASSERT_TRUE(read_exact_run(path, read));
  EXPECT_EQ(read.log_probs, run.log_probs);
  EXPECT_EQ(read.tokens_per_second, 7.0);
  ExactRun other_text{{1, 2, 4}, 2, {}, 0}, other_split{{1, 2, 3}, 1, {}, 0};
  EXPECT_THROW(read_exact_run(path, other_text), std::runtime_error);
  EXPECT_THROW(read_exact_run(path, other_split), std::runtime_error);
  std::filesystem::resize_file(path, std::filesystem::file_size(path) - 1);
  EXPECT_THROW(read_exact_run(path, read), std::runtime_error);
}

// --- Published methods on one attention, as llama.cpp builds it ---

class Emulated : public testing::Test {
protected:
  static constexpr int kCells = 512, kDim = 64, kHeads = 3, kGroup = 2, kRow = kDim * kHeads;

  void SetUp() override {
    ggml_backend_load_all();
    backend_.reset(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    ASSERT_TRUE(backend_);
    context_.reset(ggml_init({ggml_tensor_overhead() * 32, nullptr, true}));
    for (int i = 0; i < 2; i++) {
      cache_[i] = ggml_new_tensor_2d(context_.get(), GGML_TYPE_F16, kRow, kCells);
    }
    q_ = ggml_new_tensor_3d(context_.get(), GGML_TYPE_F32, kDim, 1, kHeads * kGroup);
    const auto heads = [&](ggml_tensor* t) {
      return ggml_permute(context_.get(), ggml_reshape_3d(context_.get(), t, kDim, kHeads, kCells), 0, 2, 1, 3);
    };
    attention_ = ggml_flash_attn_ext(context_.get(), q_, heads(cache_[0]), heads(cache_[1]), nullptr, 0.125f, 0, 0);
    rows_ = ggml_new_tensor_1d(context_.get(), GGML_TYPE_I64, 1);
    for (int i = 0; i < 2; i++) {
      ggml_tensor* row = ggml_new_tensor_2d(context_.get(), GGML_TYPE_F32, kRow, 1);
      set_rows_[i] = ggml_set_rows(context_.get(), cache_[i], row, rows_);
    }
    buffer_.reset(ggml_backend_alloc_ctx_tensors(context_.get(), backend_.get()));
  }

  /// Fills the cache except the last token's cells, and attends exactly.
  void fill(int layer) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    for (int i = 0; i < 2; i++) {
      ggml_format_name(cache_[i], "cache_%c_l%d", i ? 'v' : 'k', layer);
      for (int64_t j = 0; j < ggml_nelements(cache_[i]); j++) {
        static_cast<uint16_t*>(cache_[i]->data)[j] = float_to_half(normal(random));
      }
    }
    for (int64_t j = 0; j < ggml_nelements(q_); j++) static_cast<float*>(q_->data)[j] = 2 * normal(random);
    ggml_cgraph* graph = ggml_new_graph(graph_context_.get());
    ggml_build_forward_expand(graph, attention_);
    ASSERT_EQ(ggml_backend_graph_compute(backend_.get(), graph), GGML_STATUS_SUCCESS);
  }

  /// Tells the emulation of the last token's write and of the attention.
  void run(EmulatedCache& cache, int n_cells) {
    static_cast<int64_t*>(rows_->data)[0] = n_cells - 1;
    for (ggml_tensor* node : {set_rows_[0], set_rows_[1], attention_}) {
      if (EmulatedCache::callback(node, /*ask=*/true, &cache)) {
        ASSERT_TRUE(EmulatedCache::callback(node, /*ask=*/false, &cache));
      }
    }
    cache.check();
  }

  std::vector<float> output() const {
    const float* data = static_cast<const float*>(attention_->data);
    return {data, data + ggml_nelements(attention_)};
  }

  /// Cells of which a side's numbers differ from `before`.
  std::vector<int> changed(int side, const std::vector<uint16_t>& before) const {
    std::vector<int> cells;
    for (int cell = 0; cell < kCells; cell++) {
      const auto* row = static_cast<const uint16_t*>(cache_[side]->data) + size_t(cell) * kRow;
      if (!std::equal(row, row + kRow, before.begin() + ptrdiff_t(cell) * kRow)) cells.push_back(cell);
    }
    return cells;
  }
  std::vector<uint16_t> numbers(int side) const {
    const auto* data = static_cast<const uint16_t*>(cache_[side]->data);
    return {data, data + size_t(kCells) * kRow};
  }

  ggml_backend_ptr backend_;
  ggml_context_ptr context_, graph_context_{ggml_init({2 * ggml_graph_overhead(), nullptr, true})};
  ggml_backend_buffer_ptr buffer_;
  ggml_tensor *cache_[2], *set_rows_[2], *q_, *rows_, *attention_;
};

TEST_F(Emulated, TailorKvWithAllCellsIsAttentionAsItIs) {
  fill(1);
  const Profile profile = two_classes();
  TailorKvCache cache(profile, 8, 128, kCells);
  const std::vector<float> exact = output();
  std::fill_n(static_cast<float*>(attention_->data), exact.size(), NAN);
  run(cache, kCells);
  const std::vector<float> all = output();
  for (size_t i = 0; i < all.size(); i++) ASSERT_NEAR(all[i], exact[i], 2e-3);
}

TEST_F(Emulated, TailorKvWithFewCellsIsNot) {
  fill(1);
  const Profile profile = two_classes();
  TailorKvCache cache(profile, 8, 16, 4);
  const std::vector<float> exact = output();
  run(cache, kCells);
  const std::vector<float> few = output();
  double difference = 0;
  for (size_t i = 0; i < few.size(); i++) difference = std::max<double>(difference, std::fabs(few[i] - exact[i]));
  EXPECT_GT(difference, 0.05);
}

TEST_F(Emulated, TailorKvsBroadLayersAreQuantizedToTwoLevelsAGroup) {
  fill(0);
  const Profile profile = two_classes();
  TailorKvCache cache(profile, 8, 128, 16);
  const auto at = [&](int side, int cell, int c) {
    return static_cast<uint16_t*>(cache_[side]->data)[size_t(cell) * kRow + c];
  };
  const uint16_t sink = at(0, 7, 5), recent = at(1, kCells - 100, 5);
  run(cache, kCells);
  EXPECT_EQ(at(0, 7, 5), sink);
  EXPECT_EQ(at(1, kCells - 100, 5), recent);
  std::set<uint16_t> channel, head;
  for (int i = 0; i < 64; i++) {
    channel.insert(at(0, 8 + i, 5));  // keys: 64 cells of a channel
    head.insert(at(1, 8, kDim + i));  // values: 64 numbers of a cell
  }
  EXPECT_EQ(channel.size(), 2u);
  EXPECT_EQ(head.size(), 2u);
}

TEST_F(Emulated, KvarnCodesFullTilesButTheFirst) {
  fill(1);
  KvarnCache cache(4, 2, {false, true}, {{kDim, kDim}, {kDim, kDim}});
  const std::vector<uint16_t> before[2] = {numbers(0), numbers(1)};
  for (int n_cells : {256, 300, 386}) run(cache, n_cells);
  // The third tile ends with cell 383. Codes of the second do not change again.
  for (int side : {0, 1}) {
    const std::vector<int> cells = changed(side, before[side]);
    ASSERT_EQ(cells.size(), 256u);
    EXPECT_EQ(cells.front(), 128);
    EXPECT_EQ(cells.back(), 383);
  }
  std::vector<float> tile(size_t(kvarn::kTile) * kDim);
  for (int i = 0; i < kvarn::kTile; i++) {
    for (int d = 0; d < kDim; d++)
      tile[size_t(i) * kDim + d] = half_to_float(before[0][size_t(128 + i) * kRow + kDim + d]);
  }
  kvarn::code_tile(tile.data(), kDim, Kind::key, 4);
  EXPECT_EQ(numbers(0)[size_t(130) * kRow + kDim + 5], float_to_half(tile[2 * kDim + 5]));

  cache.clear();
  fill(0);  // a layer that is not coded
  const std::vector<uint16_t> other = numbers(0);
  run(cache, kCells);
  EXPECT_TRUE(changed(0, other).empty());
}

TEST_F(Emulated, OscarCodesCellsBetweenTheFirstAndTheLast) {
  fill(1);
  // Rotations that only swap the halves of a head.
  Profile profile = two_classes();
  profile.bits = {2};
  LayerProfile side;
  LayerCodebooks& books = side.by_bits[2];
  books.format = make_format(kDim, 2);
  const Codebook built_in = builtin_codebook(books.format);
  for (int h = 0; h < kHeads; h++) {
    side.mean.insert(side.mean.end(), kDim, 0.0f);
    for (int i = 0; i < kDim; i++) {
      for (int j = 0; j < kDim; j++) side.matrix.push_back(j == (i + kDim / 2) % kDim ? 1.0f : 0.0f);
      books.order.push_back(int16_t(i));
    }
    books.words.insert(books.words.end(), built_in.words.begin(), built_in.words.end());
    books.scale.insert(books.scale.end(), built_in.scale.begin(), built_in.scale.end());
  }
  profile.keys = profile.values = {side, side};
  OscarCache cache(profile, {false, true});
  const std::vector<uint16_t> before[2] = {numbers(0), numbers(1)};
  for (int n_cells : {330, 400}) run(cache, n_cells);
  for (int kind : {0, 1}) {
    const std::vector<int> cells = changed(kind, before[kind]);
    ASSERT_EQ(cells.size(), size_t(399 - 256 - 64));
    EXPECT_EQ(cells.front(), 64);
    EXPECT_EQ(cells.back(), 399 - 256 - 1);
    std::vector<float> y(kDim);
    for (int d = 0; d < kDim; d++) {
      y[size_t(d + kDim / 2) % kDim] = half_to_float(before[kind][size_t(70) * kRow + kDim + d]);
    }
    oscar::code_vector(y.data(), kDim, Kind(kind));
    for (int d = 0; d < kDim; d++) {
      const float kept = half_to_float(numbers(kind)[size_t(70) * kRow + kDim + d]);
      EXPECT_NEAR(kept, y[size_t(d + kDim / 2) % kDim], 2e-3);
    }
  }
}

}  // namespace
}  // namespace thimble
