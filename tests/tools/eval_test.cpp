// The parts of `thimble eval` that need no model: names of caches and their bytes, scores and rows, and the
// emulation of TailorKV for one attention node.
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

// --- TailorKV on one attention, as llama.cpp builds it ---

class TailorKv : public testing::Test {
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
  void run(TailorKvCache& cache, int n_cells) {
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

  ggml_backend_ptr backend_;
  ggml_context_ptr context_, graph_context_{ggml_init({ggml_graph_overhead(), nullptr, true})};
  ggml_backend_buffer_ptr buffer_;
  ggml_tensor *cache_[2], *set_rows_[2], *q_, *rows_, *attention_;
};

TEST_F(TailorKv, AllCellsRetrievedIsAttentionAsItIs) {
  fill(1);
  const Profile profile = two_classes();
  TailorKvCache cache(profile, 8, 128, kCells);
  const std::vector<float> exact = output();
  std::fill_n(static_cast<float*>(attention_->data), exact.size(), NAN);
  run(cache, kCells);
  const std::vector<float> all = output();
  for (size_t i = 0; i < all.size(); i++) ASSERT_NEAR(all[i], exact[i], 2e-3);
}

TEST_F(TailorKv, FewCellsRetrievedIsNot) {
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

TEST_F(TailorKv, BroadLayersAreQuantizedToTwoLevelsAGroup) {
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

}  // namespace
}  // namespace thimble
