// Heads that are divided over two devices of the plugin (llama.cpp's --split-mode tensor): each codes those that it has
// as one device codes all of them, with their part of a profile, and states pass between one device and two.
#include <cmath>
#include <random>

#include "codec/half.h"
#include "profile/profile.h"
#include "support/plugin_session.h"
#include "support/temporary_folder.h"

namespace thimble::test {
namespace {

using Bytes = std::vector<uint8_t>;

constexpr int kDim = 64;

// Bits of keys and values of the profile, uneven as calibration makes them.
constexpr double kRate = 2, kKeyBits = 3, kValueBits = 1;

// A rotation, as a file keeps it.
std::vector<float> random_rotation(std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> m(kDim * kDim);
  for (float& x : m) x = normal(random);
  for (int i = 0; i < kDim; i++) {
    float* row = &m[size_t(i) * kDim];
    for (int j = 0; j < i; j++) {
      const float* other = &m[size_t(j) * kDim];
      double along = 0;
      for (int d = 0; d < kDim; d++) along += double(row[d]) * other[d];
      for (int d = 0; d < kDim; d++) row[d] -= float(along) * other[d];
    }
    double norm = 0;
    for (int d = 0; d < kDim; d++) norm += double(row[d]) * row[d];
    for (int d = 0; d < kDim; d++) row[d] /= float(std::sqrt(norm));
  }
  for (float& x : m) x = half_to_float(float_to_half(x));
  return m;
}

// A profile of a model's layers that tells each head's codec from the others'.
void write_random_profile(const std::string& path, int n_layers, int n_kv_heads, int n_heads) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0, 0.1f);
  Profile profile;
  profile.shape.architecture = "llama";
  profile.transform = "klt";
  profile.source = "a test";
  profile.bits = {kRate};
  for (int l = 0; l < n_layers; l++) {
    profile.shape.layers.push_back({n_kv_heads, n_heads, kDim, kDim});
    profile.density.push_back(0.1f);
    for (Kind kind : {Kind::key, Kind::value}) {
      LayerProfile layer;
      LayerCodebooks& books = layer.by_bits[kRate];
      books.format = make_format(kDim, kind == Kind::key ? kKeyBits : kValueBits);
      const HeadCodec plain = make_uncalibrated_codec(kind, books.format);
      for (int head = 0; head < n_kv_heads; head++) {
        for (int d = 0; d < kDim; d++) layer.mean.push_back(normal(random));
        const std::vector<float> matrix = random_rotation(random);
        layer.matrix.insert(layer.matrix.end(), matrix.begin(), matrix.end());
        for (int d = 0; d < kDim; d++) books.order.push_back(int16_t((d * 5 + head) % kDim));
        books.words.insert(books.words.end(), plain.codebook.words.begin(), plain.codebook.words.end());
        books.scale.insert(books.scale.end(), plain.codebook.scale.begin(), plain.codebook.scale.end());
      }
      (kind == Kind::key ? profile.keys : profile.values).push_back(std::move(layer));
    }
  }
  write_profile(profile, path);
}

Bytes saved(Session& session) {
  Bytes state(llama_state_seq_get_size(session.context(), 0));
  EXPECT_EQ(llama_state_seq_get_data(session.context(), state.data(), state.size(), 0), state.size());
  return state;
}

bool load(Session& session, const Bytes& state) {
  return llama_state_seq_set_data(session.context(), state.data(), state.size(), 0) == state.size();
}

Tokens tokens(int first, int n) {
  Tokens all;
  for (int i = first; i < first + n; i++) all.push_back(1 + i * 37 % (kTinyVocabulary - 1));
  return all;
}

// How heads are divided: KV heads of the model, query heads, and the devices' shares.
struct Division {
  std::string name, architecture;
  uint32_t n_kv_heads, n_heads;
  std::vector<float> shares;
  bool has_profile;
};
void PrintTo(const Division& d, std::ostream* out) {
  *out << d.name;
}

class TensorSplit : public PluginTest, public testing::WithParamInterface<Division> {
protected:
  void SetUp() override {
    write_random_profile(folder_.file("profile"), 2, int(GetParam().n_kv_heads), int(GetParam().n_heads));
  }

  Options on(const std::vector<std::string>& devices, int n_layers, int pool) const {
    const Division& d = GetParam();
    Options options;
    options.bits = kRate;
    options.last = 4;
    options.pool = pool;
    options.n_ctx = 256;
    options.retrieval = d.has_profile ? "profile=" + folder_.file("profile") : "";
    options.model = std::make_shared<TinyModel>(TinyModel{d.architecture,
                                                          {{"block_count", uint32_t(n_layers)},
                                                           {"embedding_length", d.n_heads * uint32_t(kDim)},
                                                           {"attention.head_count", d.n_heads},
                                                           {"attention.head_count_kv", d.n_kv_heads},
                                                           {"attention.key_length", uint32_t(kDim)},
                                                           {"attention.value_length", uint32_t(kDim)}}});
    options.devices = devices;
    if (devices.size() > 1) {
      options.split = LLAMA_SPLIT_MODE_TENSOR;
      options.shares = d.shares;
    }
    return options;
  }
  Options on_one(int n_layers, int pool) const { return on({"THIMBLE0"}, n_layers, pool); }
  Options on_two(int n_layers, int pool) const { return on({"THIMBLE1", "THIMBLE0"}, n_layers, pool); }

  TemporaryFolder folder_;
};

INSTANTIATE_TEST_SUITE_P(, TensorSplit,
                         testing::Values(Division{"Halves", "llama", 4, 4, {1, 1}, false},
                                         Division{"HalvesWithAProfile", "llama", 4, 4, {1, 1}, true},
                                         Division{"OneOfThreeWithAProfile", "llama", 3, 6, {1, 2}, true},
                                         Division{"ThreeOfFourWithAProfile", "llama", 4, 8, {3, 1}, true},
                                         Division{"NormsOfKeys", "qwen3", 4, 4, {1, 1}, false}),
                         [](const auto& info) { return info.param.name; });

// Without a pool the same cells leave. The first layer computes the same keys and values wherever its heads are.
TEST_P(TensorSplit, HeadsAreCodedAsOnOneDevice) {
  Session one(on_one(1, 0)), two(on_two(1, 0));
  for (Session* session : {&one, &two}) {
    take_log();
    session->feed(tokens(0, 60), 0, 1);
    for (int i = 60; i < 90; i++) session->feed(tokens(i, 1));
  }
  const std::string log = take_log();
  for (const char* device : {"THIMBLE0: KV cache of 1 layers", "THIMBLE1: KV cache of 1 layers"}) {
    EXPECT_NE(log.find(device), std::string::npos) << log;
  }
  EXPECT_TRUE(saved(one) == saved(two));
  EXPECT_LT(compare(one.logits, two.logits).nmse, 1e-6);
}

// A state goes on where it was not saved: on one device, on two, and back, with the bytes that it had.
TEST_P(TensorSplit, StatesPassBetweenOneDeviceAndTwo) {
  Session one(on_one(2, 2)), two(on_two(2, 2)), back(on_two(2, 2));
  two.feed(tokens(0, 60), 0, 1);
  for (int i = 60; i < 90; i++) two.feed(tokens(i, 1));
  for (Session* session : {&one, &back}) {
    session->feed(tokens(200, 20), 0, 1);
    llama_memory_clear(session->memory(), false);
  }
  const Bytes state = saved(two);
  take_log();
  ASSERT_TRUE(load(back, state));
  EXPECT_TRUE(saved(back) == state);
  ASSERT_TRUE(load(one, state));
  const Bytes of_one = saved(one);
  EXPECT_FALSE(of_one == state) << "of no cell one device has codes and the other the row";
  for (Session* session : {&one, &two, &back}) {
    session->logits.clear();
    session->feed(tokens(90, 1));
  }
  EXPECT_LT(compare(two.logits, back.logits).nmse, 1e-11) << "only the order differs in which exact rows are added";
  EXPECT_LT(compare(two.logits, one.logits).nmse, 1e-5);

  llama_memory_clear(back.memory(), false);
  ASSERT_TRUE(load(back, of_one));
  EXPECT_TRUE(saved(back) == of_one);
  back.logits.clear();
  back.feed(tokens(90, 1));
  EXPECT_LT(compare(one.logits, back.logits).nmse, 1e-5);
  EXPECT_EQ(take_log().find("thimble:"), std::string::npos);
}

// A profile of a model with more heads is not taken for one of which other devices have a part.
TEST_F(PluginTest, AProfileOfMoreHeadsIsRefused) {
  const TemporaryFolder folder;
  write_random_profile(folder.file("profile"), 2, 8, 8);
  Options options;
  options.bits = kRate;
  options.n_ctx = 256;
  options.retrieval = "profile=" + folder.file("profile");
  options.model = std::make_shared<TinyModel>(TinyModel{"llama", {}});
  for (const char* device : {"THIMBLE0", "THIMBLE1"}) {
    options.devices = {device};
    try {
      const Session session(options);
      ADD_FAILURE() << "a context was made";
    } catch (const std::runtime_error& error) {
      EXPECT_NE(std::string(error.what()).find("another number of KV heads"), std::string::npos) << error.what();
    }
  }
}

}  // namespace
}  // namespace thimble::test
