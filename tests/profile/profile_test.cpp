// The profile's file: the reader returns the profile that was written, and refuses damaged files.
#include "profile/profile.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <random>
#include <stdexcept>

#include "codec/half.h"
#include "support/temporary_folder.h"

namespace thimble {
namespace {

LayerProfile random_layer(int n_heads, int head_dim, Kind kind, const std::vector<double>& rates,
                          std::mt19937& random) {
  std::normal_distribution<float> normal;
  LayerProfile layer;
  layer.mean.resize(size_t(n_heads) * head_dim);
  layer.matrix.resize(size_t(n_heads) * head_dim * head_dim);
  for (float& v : layer.mean) v = normal(random);
  for (float& v : layer.matrix) v = half_to_float(float_to_half(normal(random)));  // as files keep them
  for (double bits : rates) {
    LayerCodebooks& books = layer.by_bits[bits];
    // An average of 2 bits, unevenly spent.
    books.format = make_format(head_dim, bits != 2 ? bits : kind == Kind::key ? 3 : 1);
    books.words.resize(size_t(n_heads) * head_dim * kCodewords);
    books.scale.assign(size_t(n_heads) * books.format.n_subspaces(), 0.02f);
    for (int8_t& w : books.words) w = int8_t(random() % 255 - 127);
    for (int i = 0; i < n_heads * head_dim && kind == Kind::key && bits != 4; i++)
      books.error.push_back(0.01f * float(i));
    for (int h = 0; h < n_heads; h++) {
      for (int d = 0; d < head_dim; d++) books.order.push_back(int16_t((d * 5 + h) % head_dim));
    }
  }
  return layer;
}

Profile random_profile() {
  std::mt19937 random(1);
  Profile p;
  p.shape = {"llama", {{2, 4, 32, 16}, {0, 0, 0, 0}, {1, 2, 16, 16}}, {2, 32, 1e5f, 1}};
  p.transform = "klt";
  p.source = "a test";
  p.bits = {4, 2, 1.25};
  p.density = {0.5f, 0, 0.1f};
  for (const LayerShape& s : p.shape.layers) {
    for (Kind kind : {Kind::key, Kind::value}) {
      auto& into = kind == Kind::key ? p.keys : p.values;
      into.push_back(s.n_kv_heads ? random_layer(s.n_kv_heads, s.dim(kind), kind, p.bits, random) : LayerProfile{});
    }
  }
  return p;
}

std::vector<uint8_t> file_of(const Profile& profile) {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("written.thimble.gguf");
  write_profile(profile, path);
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

Profile read_back(const std::vector<uint8_t>& file) {
  return read_profile(file.data(), file.size());
}

TEST(Profile, IsReadAsWritten) {
  const Profile p = random_profile();
  const test::TemporaryFolder folder;
  const std::string path = folder.file("written.thimble.gguf");
  write_profile(p, path);
  const Profile q = read_profile(path);
  EXPECT_EQ(q.shape.architecture, p.shape.architecture);
  EXPECT_EQ(q.shape.layers, p.shape.layers);
  EXPECT_EQ(q.shape.rope, p.shape.rope);
  EXPECT_EQ(q.transform, p.transform);
  EXPECT_EQ(q.source, p.source);
  EXPECT_EQ(q.bits, p.bits);
  EXPECT_EQ(q.density, p.density);
  EXPECT_TRUE(q.quantization_friendly(0));
  EXPECT_FALSE(q.quantization_friendly(2));
  for (int layer : {0, 2}) {
    for (Kind kind : {Kind::key, Kind::value}) {
      const LayerProfile &a = p.layer(layer, kind), &b = q.layer(layer, kind);
      EXPECT_EQ(a.mean, b.mean);
      EXPECT_EQ(a.matrix, b.matrix);
      for (double bits : p.bits) {
        EXPECT_EQ(a.by_bits.at(bits).format, b.by_bits.at(bits).format);
        EXPECT_EQ(a.by_bits.at(bits).order, b.by_bits.at(bits).order);
        EXPECT_EQ(a.by_bits.at(bits).words, b.by_bits.at(bits).words);
        EXPECT_EQ(a.by_bits.at(bits).scale, b.by_bits.at(bits).scale);
        EXPECT_EQ(a.by_bits.at(bits).error, b.by_bits.at(bits).error);
      }
    }
  }
  EXPECT_EQ(q.format(0, Kind::key, 2), make_format(32, 3));
  EXPECT_EQ(q.format(0, Kind::value, 2), make_format(16, 1));
}

TEST(Profile, CodecTakesTheMatrixInItsRatesOrder) {
  const Profile p = random_profile();
  const HeadCodec codec = p.codec(0, 1, Kind::key, 4);
  EXPECT_EQ(codec.kind, Kind::key);
  EXPECT_EQ(codec.format, make_format(32, 4));
  const LayerProfile& layer = p.layer(0, Kind::key);
  const int column = layer.by_bits.at(4).order[32 + 3];
  EXPECT_EQ(codec.transform.matrix()[7 * 32 + 3], layer.matrix[32 * 32 + 7 * 32 + column]);
  EXPECT_EQ(codec.transform.mean()[5], layer.mean[32 + 5]);
  EXPECT_EQ(codec.codebook.word(3, 9), layer.by_bits.at(4).words[size_t(32 + 3) * kCodewords + 9]);
  EXPECT_TRUE(codec.error.empty());
  EXPECT_EQ(p.codec(0, 1, Kind::key, 2).error[5], layer.by_bits.at(2).error[32 + 5]);
}

TEST(Profile, RefusesWhatItDoesNotHold) {
  Profile p = random_profile();
  EXPECT_THROW(p.codec(0, 0, Kind::key, 3), std::runtime_error);
  EXPECT_THROW(p.codec(1, 0, Kind::key, 2), std::runtime_error);
  EXPECT_THROW(p.codec(3, 0, Kind::key, 2), std::runtime_error);
  EXPECT_THROW(p.codec(0, 2, Kind::key, 2), std::runtime_error);
  std::fill(p.keys[0].matrix.begin(), p.keys[0].matrix.end(), 0.0f);
  EXPECT_THROW(p.codec(0, 0, Kind::key, 2), std::runtime_error);
}

TEST(Profile, FitsOnlyItsModel) {
  const Profile p = random_profile();
  EXPECT_NO_THROW(p.check_fits(p.shape));
  EXPECT_NO_THROW(p.check_fits({}));
  EXPECT_NO_THROW(p.check_fits({"", {{2, 0, 32, 0}}, {}}));
  const auto misfit = [&](auto change) {
    ModelShape model = p.shape;
    change(model);
    EXPECT_THROW(p.check_fits(model), std::runtime_error);
  };
  misfit([](ModelShape& m) { m.architecture = "qwen2"; });
  misfit([](ModelShape& m) { m.layers[0].n_kv_heads = 4; });
  misfit([](ModelShape& m) { m.layers[2].value_dim = 32; });
  misfit([](ModelShape& m) { m.layers.push_back({1, 1, 16, 16}); });
  misfit([](ModelShape& m) { m.rope.freq_base = 1e4f; });
  misfit([](ModelShape& m) { m.rope.mode = 0, m.rope.n_dims = 16; });
}

TEST(ProfileFile, RefusesEveryTruncation) {
  const auto file = file_of(random_profile());
  for (size_t size = 0; size + 32 < file.size(); size += size < 4096 ? 1 : 97) {
    EXPECT_THROW(read_profile(file.data(), size), std::runtime_error) << size;
  }
}

TEST(ProfileFile, SurvivesFlippedBytes) {
  const auto file = file_of(random_profile());
  std::mt19937 random(2);
  for (int i = 0; i < 3000; i++) {
    auto damaged = file;
    for (int n = 0; n < 3; n++) damaged[random() % std::min<size_t>(file.size(), 6000)] = uint8_t(random());
    try {
      read_back(damaged);
    } catch (const std::runtime_error& e) {
      EXPECT_NE(std::string(e.what()), "");
    }
  }
}

TEST(ProfileFile, RefusesAbsurdNumbers) {
  const auto refused = [](auto change) {
    Profile p = random_profile();
    change(p);
    const auto file = file_of(p);
    EXPECT_THROW(read_back(file), std::runtime_error);
  };
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  refused([](Profile& p) { p.keys[0].mean[1] = kNan; });
  refused([](Profile& p) { p.values[2].matrix[3] = kInfinity; });
  refused([](Profile& p) { p.keys[0].by_bits.at(2).scale[0] = kNan; });
  refused([](Profile& p) { p.keys[0].by_bits.at(2).scale[0] = -1; });
  refused([](Profile& p) { p.keys[0].by_bits.at(2).error[0] = kNan; });
  refused([](Profile& p) { p.keys[0].by_bits.at(2).error[0] = -1; });
  refused([](Profile& p) { p.keys[0].by_bits.at(2).order[0] = p.keys[0].by_bits.at(2).order[1]; });
  refused([](Profile& p) { p.keys[0].by_bits.at(2).order[0] = -7; });
  refused([](Profile& p) { p.density[0] = kNan; });
  refused([](Profile& p) { p.shape.layers[0].key_dim = 1 << 30; });
  refused([](Profile& p) { p.shape.layers[0].n_kv_heads = 5; });
  refused([](Profile& p) { p.shape.rope.freq_base = kInfinity; });
  refused([](Profile& p) { p.keys[0].by_bits.at(2).format.n_width8 += 1; });
}

// Of the first version; ggml's own writer wrote it.
TEST(ProfileFile, OfTheFirstVersionIsRead) {
  std::ifstream file(std::string(THIMBLE_SOURCE) + "/tests/fuzz/corpus/tiny.thimble.gguf", std::ios::binary);
  const std::vector<uint8_t> bytes{std::istreambuf_iterator<char>(file), {}};
  ASSERT_GT(bytes.size(), 1000u);
  const Profile old = read_back(bytes), now = read_back(file_of(old));
  ASSERT_FALSE(old.bits.empty());
  EXPECT_EQ(now.bits, old.bits);
  for (size_t i = 0; i < old.shape.layers.size(); i++) {
    for (Kind kind : {Kind::key, Kind::value}) {
      const LayerProfile &a = old.layer(int(i), kind), &b = now.layer(int(i), kind);
      EXPECT_EQ(b.mean, a.mean);
      EXPECT_EQ(b.by_bits, a.by_bits);
      ASSERT_EQ(b.matrix.size(), a.matrix.size());
      for (size_t j = 0; j < a.matrix.size(); j++)
        EXPECT_NEAR(b.matrix[j], a.matrix[j], 1e-3f * std::fabs(a.matrix[j]));
    }
  }
}

TEST(ProfileFile, RatesOfOneFormatShareCodebooks) {
  Profile p = random_profile();
  const size_t before = file_of(p).size();
  for (auto* side : {&p.keys, &p.values}) {
    for (LayerProfile& layer : *side) {
      if (!layer.by_bits.empty()) layer.by_bits.at(2) = layer.by_bits.at(1.25);
    }
  }
  const auto file = file_of(p);
  EXPECT_LT(file.size(), before);
  EXPECT_EQ(read_back(file).keys[0].by_bits, p.keys[0].by_bits);
  p.keys[0].by_bits.at(2).words[3] ^= 1;
  EXPECT_THROW(file_of(p), std::runtime_error);
}

// The shipped profiles are as the writer writes them now.
TEST(ProfileFile, ShippedOnesAreWrittenAsTheyWereRead) {
  size_t n = 0;
  for (const auto& entry : std::filesystem::directory_iterator(std::string(THIMBLE_SOURCE) + "/profiles")) {
    if (entry.path().extension() != ".gguf") continue;
    std::ifstream file(entry.path(), std::ios::binary);
    const std::vector<uint8_t> bytes{std::istreambuf_iterator<char>(file), {}};
    EXPECT_EQ(file_of(read_back(bytes)), bytes) << entry.path();
    n++;
  }
  EXPECT_GE(n, 1u);
}

TEST(ProfileFile, SaysWhatToDo) {
  try {
    read_profile("/nonexistent/x.thimble.gguf");
    FAIL();
  } catch (const std::runtime_error& e) {
    EXPECT_NE(std::string(e.what()).find("/nonexistent/x.thimble.gguf"), std::string::npos);
  }
  EXPECT_THROW(write_profile(random_profile(), "/nonexistent/x.thimble.gguf"), std::runtime_error);
}

TEST(ProfileFile, LeavesNothingWhereItCannotWrite) {
  const test::TemporaryFolder folder;
  const std::string taken = folder.file("taken");
  std::filesystem::create_directory(taken);
  EXPECT_THROW(write_profile(random_profile(), taken), std::runtime_error);
  std::filesystem::remove(taken);
  EXPECT_TRUE(folder.empty());
}

}  // namespace
}  // namespace thimble
