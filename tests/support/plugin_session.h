// llama.cpp contexts over the small real model, on the plain CPU or on THIMBLE0. Tests run the same steps in both and
// compare the logits.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "llama.h"
#include "support/tiny_model.h"

namespace thimble::test {

/// The settings of a context.
struct Options {
  double bits = 0;  // of the coded cache; 0: plain CPU, no Thimble
  int last = 16;    // window=, small so that most cells are coded
  int pool = 4;
  std::string retrieval;  // more of THIMBLE_KV, such as "top=64"
  uint32_t n_ctx = 1024;
  uint32_t n_ubatch = 64;
  uint32_t n_seq = 1;
  bool unified = true;
  int n_threads = 1;  // ggml's threads spin, so more of them than there are idle cores are very slow
  bool mmap = true;
  std::shared_ptr<const TinyModel> model;  // instead of the real one
  // Of such a model: the plugin's devices instead of all of them, and how they share it.
  std::vector<std::string> devices;
  llama_split_mode split = LLAMA_SPLIT_MODE_LAYER;
  std::vector<float> shares;  // of these devices; empty: an equal part, or one layer to the first
  bool experts_on_cpu = false;
  int small_cells = 0;
  // Without flash attention plain llama.cpp is the more exact: with it, the CPU sums values in f16 (NMSE 1e-5).
  bool plain_flash_attention = false;
  ggml_type coded_type = GGML_TYPE_F16;  // --cache-type-k and --cache-type-v of a coded cache
  bool leaves_flash_attention = false;   // llama.cpp finds out whether the device has it
  bool coded_flash_attention = true;     // without it, the plugin decodes rows for llama.cpp's matrix products

  bool coded() const { return bits != 0; }
  std::string kv() const;
  Options with_bits(double other) const;
};

/// The real model, loaded once per device and way of loading.
std::shared_ptr<llama_model> load_model(bool coded, bool mmap = true);

/// Tokens [first, first + n) of an English text of about 800.
std::vector<llama_token> text(int first, int n);

/// The rates to test, of those given: all, or the one that THIMBLE_TEST_BITS names, for an engine that has no others.
std::vector<double> rates(std::initializer_list<double> bits);

/// The log of llama.cpp and the plugin since the last call.
std::string take_log();

/// The context parameters of options; sets THIMBLE_KV too.
llama_context_params context_params(const Options& options);

using Logits = std::vector<float>;
using Tokens = std::vector<llama_token>;

class Session {
public:
  /// Throws where the context cannot be made, or where the real model's cache has not the size that a coded one must
  /// have.
  explicit Session(const Options& options);

  llama_context* context() const { return context_.get(); }
  llama_model* model() const { return model_.get(); }
  llama_memory_t memory() const { return llama_get_memory(context()); }
  const Options& options() const { return options_; }
  /// The KV buffers on THIMBLE0 as llama.cpp reported them.
  double cache_mib() const { return cache_mib_; }
  /// The log from while the context was made.
  const std::string& log() const { return log_; }

  /// Decodes tokens at the end of a sequence in one batch, and records the logits of the last `n_logits` of them.
  void feed(const Tokens& tokens, int sequence = 0, int n_logits = 1 << 30);
  /// The same for several sequences in one batch: a token of each in turn.
  void feed_together(const std::vector<std::pair<int, Tokens>>& sequences, int n_logits = 1 << 30);

  std::vector<Logits> logits;

private:
  void check_size() const;

  Options options_;
  std::shared_ptr<llama_model> model_;
  std::shared_ptr<llama_context> context_;
  double cache_mib_ = 0;
  std::string log_;
};

/// How far the logit rows `b` are from `a`, those of the same tokens.
struct Difference {
  double nmse = 0;
  double mean_kl = 0, max_kl = 0;  // of the distributions, in nats
  int other_top = 0;               // rows whose most likely token differs
};
Difference compare(const std::vector<Logits>& a, const std::vector<Logits>& b);

using Scenario = std::function<void(Session&)>;

/// Runs a scenario on the plain CPU, with a cache of 16 bits (the same logits but for rounding) and with one of 4 bits
/// (mean KL divergence at most `kl_bound` nats; measured: 0.003 to 0.009).
void expect_like_plain(const Options& options, const Scenario& scenario, double kl_bound = 0.02);

/// A test suite whose tests are skipped where there is no model.
class PluginTest : public testing::Test {
protected:
  void SetUp() override;
};

/// Saves `original`, loads the state into `restored`, and expects that this saves the same bytes and that both give the
/// same logits from there on.
template <typename Save, typename Load, typename GoOn>
void expect_goes_on_bit_for_bit(Session& original, Session& restored, const Save& save, const Load& load,
                                const GoOn& go_on) {
  const auto state = save(original);
  ASSERT_TRUE(load(restored, state));
  EXPECT_TRUE(save(restored) == state);
  EXPECT_TRUE(go_on(restored) == go_on(original));
}

}  // namespace thimble::test
