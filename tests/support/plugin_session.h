// llama.cpp contexts over the small real model, on the plain CPU or on THIMBLE0, that do the same things so that their
// logits can be compared.
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

/// What a context is made with.
struct Options {
  double bits = 0;  // of the coded cache; 0: plain CPU, no Thimble
  int last = 16;    // the exact window, small so that codes matter
  int pool = 4;
  std::string retrieval;  // more of THIMBLE_KV, such as "top=64"
  uint32_t n_ctx = 1024;
  uint32_t n_ubatch = 64;
  uint32_t n_seq = 1;
  bool unified = true;
  int n_threads = 1;  // ggml's threads spin: more of them than idle cores crawl
  bool mmap = true;
  std::shared_ptr<const TinyModel> model;  // instead of the real one
  int small_cells = 0;
  // Without flash attention plain llama.cpp is the more exact: with it, the CPU sums values in f16 (NMSE 1e-5).
  bool plain_flash_attention = false;

  bool coded() const { return bits != 0; }
  std::string kv() const;
  Options with_bits(double other) const;
};

/// The real model, loaded once per device and way of loading.
std::shared_ptr<llama_model> load_model(bool coded, bool mmap = true);

/// Tokens [first, first + n) of an English text of about 800.
std::vector<llama_token> text(int first, int n);

/// Those of some rates that are to be tested: all, or the one that THIMBLE_TEST_BITS names, for an engine that has no
/// others.
std::vector<double> rates(std::initializer_list<double> bits);

/// What llama.cpp and the plugin have logged since the last call.
std::string take_log();

/// Context parameters of options, and THIMBLE_KV set for it.
llama_context_params context_params(const Options& options);

using Logits = std::vector<float>;
using Tokens = std::vector<llama_token>;

class Session {
public:
  /// Throws where the context cannot be made, or where the cache of the real model is not the size that coding it must
  /// give.
  explicit Session(const Options& options);

  llama_context* context() const { return context_.get(); }
  llama_model* model() const { return model_.get(); }
  llama_memory_t memory() const { return llama_get_memory(context()); }
  const Options& options() const { return options_; }
  /// The KV buffers on THIMBLE0 as llama.cpp reported them.
  double cache_mib() const { return cache_mib_; }
  /// What was logged while the context was made.
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

/// How far `b` is from `a`, logit rows of the same tokens.
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

/// Tests of this suite skip where there is no model.
class PluginTest : public testing::Test {
protected:
  void SetUp() override;
};

}  // namespace thimble::test
