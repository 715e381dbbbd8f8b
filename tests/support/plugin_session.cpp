#include "support/plugin_session.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <numeric>
#include <regex>
#include <sstream>
#include <stdexcept>

#include "ggml-backend.h"

namespace thimble::test {
namespace {

std::mutex log_mutex;
std::string log_text;

const char* model_path() {
  const char* path = std::getenv("THIMBLE_TEST_MODEL");
  return path && *path ? path : nullptr;
}

// How many devices of the plugin a model's layers are spread over, all around the CPU.
int n_devices() {
  const char* text = std::getenv("THIMBLE_TEST_DEVICES");
  return text && *text ? std::atoi(text) : 1;
}

// Once a process: the log, the CPU (part of ggml, or a library beside it), the plugin.
ggml_backend_dev_t thimble_device() {
  static ggml_backend_dev_t device = [] {
    llama_log_set(
        [](ggml_log_level, const char* line, void*) {
          const std::lock_guard lock(log_mutex);
          log_text += line;
        },
        nullptr);
    for (const char* where : {static_cast<const char*>(nullptr), THIMBLE_BIN}) {  // null: where ggml looks by itself
      if (!ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)) ggml_backend_load_all_from_path(where);
    }
    const char* other = std::getenv("THIMBLE_TEST_PLUGIN");
    const std::string plugin = other ? other : THIMBLE_PLUGIN_PATH;
    std::string device = "device=CPU";
    for (int i = 1; i < n_devices(); i++) device += "+CPU";
    if (const char* recording = std::getenv("THIMBLE_TEST_RECORDING")) {
      device = "device=RECORDING+CPU+CPU";
      if (!ggml_backend_load(recording)) throw std::runtime_error(std::string("cannot load ") + recording);
    }
    if (device != "device=CPU") setenv("THIMBLE_KV", device.c_str(), 1);
    if (!ggml_backend_load(plugin.c_str())) throw std::runtime_error("cannot load " + plugin);
    llama_backend_init();
    return ggml_backend_dev_by_name("THIMBLE0");
  }();
  if (!device) throw std::runtime_error("the plugin has no device THIMBLE0");
  return device;
}

double log_sum_exp(const Logits& x) {
  const double top = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (float v : x) sum += std::exp(v - top);
  return top + std::log(sum);
}

std::string number(double value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

}  // namespace

std::string Options::kv() const {
  return "bits=" + number(bits) + ",window=" + std::to_string(last) + ",pool=" + std::to_string(pool) +
         ",small=" + std::to_string(small_cells) + (retrieval.empty() ? "" : "," + retrieval);
}

Options Options::with_bits(double other) const {
  Options options = *this;
  options.bits = other;
  return options;
}

std::vector<double> rates(std::initializer_list<double> bits) {
  const char* only = std::getenv("THIMBLE_TEST_BITS");
  std::vector<double> chosen;
  for (double each : bits) {
    if (!only || std::atof(only) == each) chosen.push_back(each);
  }
  return chosen;
}

std::string take_log() {
  const std::lock_guard lock(log_mutex);
  return std::exchange(log_text, {});
}

// Loads on the device that coded caches are on, or on the plain CPU. The plugin is there in either case.
template <typename Load>
std::shared_ptr<llama_model> load_on(bool coded, bool mmap, std::vector<std::string> names, const Load& load) {
  thimble_device();
  if (names.empty() && coded) {
    for (int i = 0; i < n_devices(); i++) names.push_back("THIMBLE" + std::to_string(i));
  }
  std::vector<ggml_backend_dev_t> devices;
  for (const std::string& name : names) {
    devices.push_back(ggml_backend_dev_by_name(name.c_str()));
    if (!devices.back()) throw std::runtime_error("the plugin has too few devices");
  }
  devices.push_back(nullptr);
  llama_model_params params = llama_model_default_params();
  params.devices = devices.data();
  params.n_gpu_layers = coded ? 99 : 0;
  params.load_mode = mmap ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
  return load(params);
}

std::shared_ptr<llama_model> load_model(bool coded, bool mmap) {
  static std::map<std::pair<bool, bool>, std::shared_ptr<llama_model>> models;
  auto& model = models[{coded, mmap}];
  if (model) return model;
  model = load_on(coded, mmap, {}, [](const llama_model_params& params) {
    return std::shared_ptr<llama_model>(llama_model_load_from_file(model_path(), params), llama_model_free);
  });
  if (!model) throw std::runtime_error("cannot load the model\n" + take_log());
  return model;
}

Tokens text(int first, int n) {
  static const Tokens all = [] {
    std::ifstream file(THIMBLE_TEST_DATA "/alice.txt");
    const std::string words{std::istreambuf_iterator<char>(file), {}};
    Tokens tokens(words.size());
    const llama_vocab* vocab = llama_model_get_vocab(load_model(false).get());
    tokens.resize(std::max(0, llama_tokenize(vocab, words.data(), int(words.size()), tokens.data(), int(tokens.size()),
                                             /* add_special = */ false, /* parse_special = */ false)));
    return tokens;
  }();
  if (first + n > int(all.size())) throw std::out_of_range("the text has " + std::to_string(all.size()) + " tokens");
  return {all.begin() + first, all.begin() + first + n};
}

llama_context_params context_params(const Options& options) {
  if (options.coded()) {
    setenv("THIMBLE_KV", options.kv().c_str(), 1);
  } else {
    unsetenv("THIMBLE_KV");
  }
  llama_context_params params = llama_context_default_params();
  params.n_ctx = options.n_ctx;
  params.n_batch = options.n_ctx;
  params.n_ubatch = options.n_ubatch;
  params.n_seq_max = options.n_seq;
  params.kv_unified = options.unified;
  params.swa_full = false;  // as llama.cpp's programs have it
  params.n_threads = params.n_threads_batch = options.n_threads;
  if (options.coded()) params.type_k = params.type_v = options.coded_type;
  const bool flash_attention = options.coded() ? options.coded_flash_attention : options.plain_flash_attention;
  params.flash_attn_type = flash_attention ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
  if (options.coded() && options.leaves_flash_attention) params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_AUTO;
  return params;
}

Session::Session(const Options& options) : options_(options) {
  if (options.model) {
    const std::vector<std::string> devices = options.coded() ? options.devices : std::vector<std::string>{};
    model_ = load_on(options.coded(), false, devices, [&](llama_model_params params) {
      params.split_mode = options.split;
      // Of two layers and the output, which counts as one, the first device gets a layer.
      std::vector<float> shares = options.shares;
      if (shares.empty() && devices.size() == 2 && options.split == LLAMA_SPLIT_MODE_LAYER) shares = {1, 2};
      if (!shares.empty()) {
        shares.resize(llama_max_devices());
        params.tensor_split = shares.data();
      }
      const llama_model_tensor_buft_override experts[] = {{"_exps", ggml_backend_cpu_buffer_type()},
                                                          {nullptr, nullptr}};
      if (options.experts_on_cpu) params.tensor_buft_overrides = experts;
      return make_model(*options.model, params);
    });
  } else {
    model_ = load_model(options.coded(), options.mmap);
  }
  const llama_context_params params = context_params(options);
  take_log();
  context_.reset(llama_init_from_model(model_.get(), params), llama_free);
  log_ = take_log();
  if (!context_) throw std::runtime_error("no context with " + options.kv() + "\n" + log_);
  const std::regex size("THIMBLE([0-9]) KV buffer size = *([0-9.]+) MiB");
  std::vector<double> mib(std::max(size_t(n_devices()), options.devices.size()), 0.0);
  for (auto found = std::sregex_iterator(log_.begin(), log_.end(), size); found != std::sregex_iterator(); ++found) {
    double& first = mib.at(std::stoul((*found)[1]) % mib.size());
    if (first == 0) first = std::stod((*found)[2]);
  }
  cache_mib_ = std::accumulate(mib.begin(), mib.end(), 0.0);
  if (options.coded() && !options.model && std::count(mib.begin(), mib.end(), 0.0) > 0) {
    throw std::runtime_error("a device has no layers\n" + log_);
  }
  const bool is_cpu_engine = !std::getenv("THIMBLE_TEST_PLUGIN");
  if (!options.model && options.coded_type == GGML_TYPE_F16 && (is_cpu_engine || options.bits == 16)) check_size();
}

// A head of 64 numbers has a scale of 16 bits with its codes; cells of the window and the pool (32 more than asked for)
// are f16 rows besides, where no exact store has them.
void Session::check_size() const {
  const int n_head_kv = llama_model_n_head_kv(model_.get());
  const int head_dim = llama_model_n_embd(model_.get()) / llama_model_n_head(model_.get());
  const double n_cells = llama_n_ctx(context()), n_windows = options_.unified ? 1 : options_.n_seq;
  const double f16_mib = n_cells * llama_model_n_layer(model_.get()) * 2 * n_head_kv * head_dim * 2 / (1 << 20);
  double share = 0;
  if (options_.bits == 16) share = 1;
  if (options_.coded() && options_.bits < 16) {
    const bool store = options_.retrieval.starts_with("top=") && !options_.retrieval.ends_with("policy=none");
    share = (options_.bits + 16.0 / head_dim) / 16;
    const int n_window = options_.last + options_.pool > 0 ? options_.last + options_.pool + 32 : 0;
    if (!store) share += n_window * n_windows / n_cells;
    if (store && options_.retrieval.find("tail=drop") != std::string::npos) share /= 2;  // values have no codes
  }
  if (std::abs(cache_mib_ / f16_mib - share) > 0.01) {
    throw std::runtime_error("the cache takes " + number(cache_mib_) + " MiB on THIMBLE0 instead of " +
                             number(share * f16_mib) + "\n" + log_);
  }
}

void Session::feed(const Tokens& tokens, int sequence, int n_logits) {
  feed_together({{sequence, tokens}}, n_logits);
}

void Session::feed_together(const std::vector<std::pair<int, Tokens>>& sequences, int n_logits) {
  size_t n_tokens = 0, longest = 0;
  for (const auto& [sequence, tokens] : sequences) {
    n_tokens += tokens.size();
    longest = std::max(longest, tokens.size());
  }
  llama_batch batch = llama_batch_init(int(n_tokens), 0, 1);
  const std::unique_ptr<llama_batch, void (*)(llama_batch*)> owner(&batch,
                                                                   [](llama_batch* b) { llama_batch_free(*b); });
  for (size_t t = 0; t < longest; t++) {
    for (const auto& [sequence, tokens] : sequences) {
      if (t >= tokens.size()) continue;
      const int i = batch.n_tokens++;
      batch.token[i] = tokens[t];
      batch.pos[i] = llama_memory_seq_pos_max(memory(), sequence) + 1 + llama_pos(t);
      batch.n_seq_id[i] = 1;
      batch.seq_id[i][0] = sequence;
      batch.logits[i] = int64_t(t) + n_logits >= int64_t(tokens.size());
    }
  }
  const int status = llama_decode(context(), batch);
  if (status != 0) throw std::runtime_error("llama_decode: " + std::to_string(status) + "\n" + take_log());
  const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model_.get()));
  for (int i = 0; i < batch.n_tokens; i++) {
    if (!batch.logits[i]) continue;
    const float* row = llama_get_logits_ith(context(), i);
    logits.emplace_back(row, row + n_vocab);
  }
}

Difference compare(const std::vector<Logits>& a, const std::vector<Logits>& b) {
  if (a.empty() || a.size() != b.size()) throw std::invalid_argument("not the same rows");
  Difference d;
  double error = 0, power = 0;
  for (size_t row = 0; row < a.size(); row++) {
    const double a_total = log_sum_exp(a[row]), b_total = log_sum_exp(b[row]);
    double kl = 0;
    for (size_t i = 0; i < a[row].size(); i++) {
      const double x = a[row][i], y = b[row][i];
      error += (x - y) * (x - y);
      power += x * x;
      kl += std::exp(x - a_total) * ((x - a_total) - (y - b_total));
    }
    d.mean_kl += kl / double(a.size());
    d.max_kl = std::max(d.max_kl, kl);
    d.other_top += std::max_element(a[row].begin(), a[row].end()) - a[row].begin() !=
                   std::max_element(b[row].begin(), b[row].end()) - b[row].begin();
  }
  d.nmse = error / power;
  return d;
}

void expect_like_plain(const Options& options, const Scenario& scenario, double kl_bound) {
  Session plain(options.with_bits(0)), exact(options.with_bits(16));
  for (Session* session : {&plain, &exact}) scenario(*session);
  const Difference rounding = compare(plain.logits, exact.logits);
  // ggml sums values in f16, which the plugin does not: on some processors that alone makes 1.1e-6.
  EXPECT_LT(rounding.nmse, 2e-6);
  EXPECT_EQ(rounding.other_top, 0);
  std::printf("16 bits: NMSE %.1e, KL %.1e\n", rounding.nmse, rounding.mean_kl);

  for (double bits : rates({4})) {
    Session coded(options.with_bits(bits));
    scenario(coded);
    const Difference coding = compare(plain.logits, coded.logits);
    EXPECT_LT(coding.mean_kl, kl_bound);
    EXPECT_GT(coding.mean_kl, 100 * rounding.mean_kl) << "4 bits are as good as 16: nothing was read from codes";
    std::printf("4 bits: KL mean %.4f max %.4f, other top %d of %zu\n", coding.mean_kl, coding.max_kl, coding.other_top,
                plain.logits.size());
  }
}

void PluginTest::SetUp() {
  if (!model_path()) GTEST_SKIP() << "THIMBLE_TEST_MODEL names no model; scripts/fetch-model gets one";
}

}  // namespace thimble::test
