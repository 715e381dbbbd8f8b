// The codec's specification: formats, transforms, encode and decode, block layout.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <set>

#include "codec/half.h"
#include "codec/head_codec.h"
#include "support/random.h"

namespace thimble {
namespace {

double relative_error(const std::vector<float>& x, const std::vector<float>& y) {
  double error = 0, size = 0;
  for (size_t i = 0; i < x.size(); i++) {
    error += (x[i] - y[i]) * (x[i] - y[i]);
    size += x[i] * x[i];
  }
  return error / size;
}

TEST(HeadCodec, StretchedKeysMakeLittleErrorInScores) {
  // Weights as models have them: some numbers of keys are great, and others of queries.
  const int dim = 64, n = 400;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> keys(dim, 1.0f), queries(2 * dim, 1.0f);
  keys[5] = 30, keys[40] = -20, keys[7] = 0;
  queries[5] = queries[dim + 5] = 0.1f, queries[9] = 4, queries[dim + 9] = -4;
  const std::vector<float> stretch = key_stretch(keys.data(), queries.data(), 2, dim);
  ASSERT_EQ(stretch.size(), size_t(dim));
  EXPECT_NEAR(stretch[40] / stretch[1], std::sqrt(1 / 20.0f), 0.1f);
  EXPECT_NEAR(stretch[9] / stretch[1], 2, 0.1f);
  double errors[2] = {};
  for (bool stretched : {false, true}) {
    const HeadCodec codec =
        make_uncalibrated_codec(Kind::key, make_format(dim, 2), stretched ? stretch : std::vector<float>());
    std::vector<float> k(dim), q(dim), y(dim), decoded(dim);
    std::vector<uint8_t> codes(codec.format.n_subspaces());
    for (int i = 0; i < n; i++) {
      for (int d = 0; d < dim; d++) k[d] = keys[d] * normal(random), q[d] = queries[d] * normal(random);
      codec.transform.forward(k.data(), y.data());
      const uint16_t scale = encode_vector(codec, y.data(), codes.data());
      decode_vector(codec, codes.data(), scale, y.data());
      codec.transform.inverse(y.data(), decoded.data());
      double error = 0;
      for (int d = 0; d < dim; d++) error += double(q[d]) * (decoded[d] - k[d]);
      errors[stretched] += error * error / n;
    }
  }
  EXPECT_LT(errors[1], errors[0] / 8);
  const std::vector<float> zeros(dim, 0.0f);
  EXPECT_TRUE(key_stretch(zeros.data(), queries.data(), 2, dim).empty());
}

TEST(Half, EveryHalfSurvivesTheRoundTrip) {
  for (uint32_t h = 0; h < 0x10000; h++) {
    const float f = half_to_float(uint16_t(h));
    if (std::isnan(f)) {
      EXPECT_EQ(float_to_half(f) & 0x7e00, 0x7e00);
    } else {
      EXPECT_EQ(float_to_half(f), h);
    }
  }
}

TEST(Half, RoundsToNearestEven) {
  EXPECT_EQ(float_to_half(1.0f + 0x1p-11f), 0x3c00);      // tie, to even
  EXPECT_EQ(float_to_half(1.0f + 3 * 0x1p-11f), 0x3c02);  // tie, to even
  EXPECT_EQ(float_to_half(1.0f + 0x1p-11f + 0x1p-20f), 0x3c01);
  EXPECT_EQ(float_to_half(65519.0f), 0x7bff);
  EXPECT_EQ(float_to_half(65520.0f), 0x7c00);
  EXPECT_EQ(float_to_half(0x1p-25f), 0x0000);  // tie, to even
  EXPECT_EQ(float_to_half(0x1.8p-25f), 0x0001);
}

TEST(Format, CoversTheVectorExactlyOnce) {
  for (int head_dim : {32, 36, 64, 72, 80, 96, 100, 112, 128, 192, 256, 512}) {
    for (double bits : {4.0, 3.0, 2.0, 1.5, 1.25, 1.0}) {
      const Format f = make_format(head_dim, bits);
      int next = 0;
      for (int m = 0; m < f.n_subspaces(); m++) {
        EXPECT_EQ(f.offset(m), next);
        next += f.width(m);
      }
      EXPECT_EQ(next, head_dim) << bits;
      if (head_dim % 64 == 0) {
        EXPECT_DOUBLE_EQ(f.bits(), bits);
      }
      EXPECT_GE(f.bits(), bits);
    }
  }
  EXPECT_EQ(make_format(64, 2).block_bytes(), 64u * 16 + 128);
  EXPECT_EQ(make_format(64, 16).block_bytes(), 64u * 128);
}

TEST(Format, OfPositionsHasMoreBitsAndFitsBesideTheLatentPart) {
  for (const auto& [latent, position] : {std::pair{512, 64}, {256, 64}, {256, 32}, {128, 64}}) {
    for (double bits : {4.0, 3.0, 2.0, 1.5, 1.25, 1.0}) {
      const Format of_latent = make_format(latent, bits);
      const size_t piece = size_t((latent + position) % 64 == 0 ? 64 : 32);
      const size_t bytes = (latent + position) / piece * size_t(make_format(int(piece), bits).vector_bytes());
      const Format f = make_position_format(position, of_latent, bytes);
      SCOPED_TRACE(testing::Message() << latent << " and " << position << " numbers, " << bits << " bits");
      EXPECT_EQ(2 * f.n_width2 + 4 * f.n_width4 + 8 * f.n_width8, position);
      EXPECT_TRUE(of_latent.vector_bytes() + f.vector_bytes() <= double(bytes) || f.bits() == 2);
      EXPECT_TRUE(f.bits() > bits || bits == 4);
      EXPECT_LE(f.bits(), 4);
    }
  }
  EXPECT_DOUBLE_EQ(make_position_format(64, make_format(512, 2), 162).bits(), 3.75);
  EXPECT_DOUBLE_EQ(make_position_format(64, make_format(512, 2), 0).bits(), 2);
  EXPECT_TRUE(make_position_format(64, make_format(512, 16), 1152).f16);
}

TEST(Format, RefusesWhatItCannotCode) {
  EXPECT_THROW(make_format(64, 5), std::invalid_argument);
  EXPECT_THROW(make_format(63, 2), std::invalid_argument);
  EXPECT_THROW(make_format(0, 2), std::invalid_argument);
  EXPECT_THROW(make_format(514, 2), std::invalid_argument);
}

TEST(Format, PositionsArePermutations) {
  std::set<int> keys, values;
  for (int t = 0; t < kBlockCells; t++) {
    keys.insert(key_position(t));
    values.insert(value_position(t));
  }
  EXPECT_EQ(keys.size(), 64u);
  EXPECT_EQ(values.size(), 64u);
  EXPECT_EQ(*values.rbegin(), 63);
}

std::vector<Transform> transforms(int head_dim) {
  std::vector<float> matrix = gaussian(head_dim * head_dim, 7);
  for (int i = 0; i < head_dim; i++) matrix[size_t(i) * head_dim + i] += 8.0f;
  return {Transform::identity(head_dim), Transform::hadamard(head_dim),
          Transform::dense(gaussian(head_dim, 8), std::move(matrix))};
}

TEST(Transform, InverseUndoesForwardAndQueriesKeepTheirScores) {
  for (int head_dim : {32, 48, 64, 80, 128}) {
    for (const Transform& t : transforms(head_dim)) {
      const auto x = gaussian(head_dim, 1), q = gaussian(head_dim, 2);
      std::vector<float> y(head_dim), back(head_dim), tq(head_dim);
      t.forward(x.data(), y.data());
      t.inverse(y.data(), back.data());
      EXPECT_LT(relative_error(x, back), 1e-8);
      t.query(q.data(), tq.data());
      double exact = 0, score = t.query_bias(q.data());
      for (int i = 0; i < head_dim; i++) {
        exact += double(q[i]) * x[i];
        score += double(tq[i]) * y[i];
      }
      EXPECT_NEAR(score, exact, 1e-3 * std::sqrt(head_dim));
    }
  }
}

TEST(Transform, BehindARotationIsAsWithoutIt) {
  for (const auto& [head_dim, block] : {std::pair{64, 64}, {128, 64}, {192, 64}, {128, 128}}) {
    const Transform t = transforms(head_dim).back(), behind = t.behind_hadamard(block);
    const auto x = gaussian(head_dim, 1);
    std::vector<float> rotated = x, y(head_dim), of_rotated(head_dim), back(head_dim);
    kPlainTransformOps.hadamard(rotated.data(), head_dim, block, 1.0f / std::sqrt(float(block)));
    t.forward(x.data(), y.data());
    behind.forward(rotated.data(), of_rotated.data());
    EXPECT_LT(relative_error(y, of_rotated), 1e-8);
    behind.inverse(of_rotated.data(), back.data());
    EXPECT_LT(relative_error(rotated, back), 1e-8);
    // A rotation that is there already need not be done again.
    Transform::hadamard(head_dim).behind_hadamard(block).forward(rotated.data(), y.data());
    EXPECT_EQ(y, rotated);
  }
}

TEST(Transform, OutputCountsTheMeanByTheWeight) {
  const auto t = Transform::dense({1, 2}, {1, 0, 0, 1});
  const float y[2] = {0.5f, 0.5f};
  float out[2];
  t.output(y, 0.25f, out);
  EXPECT_FLOAT_EQ(out[0], 0.75f);
  EXPECT_FLOAT_EQ(out[1], 1.0f);
}

TEST(Transform, RefusesSingularAndNonFinite) {
  EXPECT_THROW(Transform::dense({0, 0}, {1, 2, 2, 4}), std::invalid_argument);
  EXPECT_THROW(Transform::dense({0, 0}, {1, NAN, 2, 4}), std::invalid_argument);
  EXPECT_THROW(Transform::dense({0, INFINITY}, {1, 0, 0, 4}), std::invalid_argument);
}

TEST(HeadCodec, ErrorFallsWithTheRateAsForAGaussianSource) {
  // Squared error of a unit Gaussian: the rate-distortion bound is 2^(-2 bits); vector quantization of width 8 and 4 at
  // 1 and 2 bits and width 2 at 4 bits comes within the given factor of it.
  for (auto [bits, bound] : {std::pair{1.0, 0.40}, {2.0, 0.125}, {4.0, 0.0090}}) {
    double error = 0;
    const HeadCodec codec = make_uncalibrated_codec(Kind::key, make_format(128, bits));
    for (unsigned seed = 0; seed < 50; seed++) {
      const auto y = gaussian(128, seed);
      std::vector<uint8_t> codes(codec.format.n_subspaces());
      std::vector<float> decoded(128);
      decode_vector(codec, codes.data(), encode_vector(codec, y.data(), codes.data()), decoded.data());
      error += relative_error(y, decoded) / 50;
    }
    EXPECT_LT(error, bound) << bits << " bits";
    EXPECT_GT(error, std::pow(2, -2 * bits)) << bits << " bits";
  }
}

TEST(HeadCodec, CodesAreTheNearestCodewords) {
  const HeadCodec codec = make_uncalibrated_codec(Kind::value, make_format(32, 2));
  const auto y = gaussian(32, 3);
  double square = 0;
  for (float v : y) square += v * v;
  const double rms = std::sqrt(square / 32);
  uint8_t codes[8];
  encode_vector(codec, y.data(), codes);
  for (int m = 0; m < 8; m++) {
    const auto distance = [&](int code) {
      double sum = 0;
      for (int j = 0; j < 4; j++) {
        const double w = codec.words[size_t(m * 4 + j) * kCodewords + (code & 0x7f)] * (code & 0x80 ? -1 : 1);
        sum += (y[m * 4 + j] / rms - w) * (y[m * 4 + j] / rms - w);
      }
      return sum;
    };
    for (int code = 0; code < 256; code++) EXPECT_LE(distance(codes[m]), distance(code) + 1e-5);
  }
}

TEST(HeadCodec, AwkwardVectors) {
  const HeadCodec codec = make_uncalibrated_codec(Kind::key, make_format(64, 2));
  std::vector<uint8_t> codes(16);
  std::vector<float> y(64, 0.0f), back(64);
  EXPECT_EQ(encode_vector(codec, y.data(), codes.data()), 0);
  decode_vector(codec, codes.data(), 0, back.data());
  EXPECT_EQ(back, y);
  y[3] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(half_to_float(encode_vector(codec, y.data(), codes.data()))));
  y[3] = std::numeric_limits<float>::infinity();
  EXPECT_TRUE(std::isnan(half_to_float(encode_vector(codec, y.data(), codes.data()))));
  y[3] = 1e7f;
  EXPECT_TRUE(std::isfinite(half_to_float(encode_vector(codec, y.data(), codes.data()))));
  y[3] = 1e-12f;
  EXPECT_TRUE(std::isfinite(half_to_float(encode_vector(codec, y.data(), codes.data()))));
}

TEST(HeadCodec, CellsOfABlockDoNotTouchEachOther) {
  for (double bits : {1.0, 2.0, 3.0, 4.0, 16.0}) {
    for (Kind kind : {Kind::key, Kind::value}) {
      const HeadCodec codec = make_uncalibrated_codec(kind, make_format(64, bits));
      std::vector<uint8_t> block(codec.format.block_bytes()), copy(block.size());
      std::vector<std::vector<float>> decoded(kBlockCells, std::vector<float>(64));
      for (int t = 0; t < kBlockCells; t++) encode_cell(codec, gaussian(64, t).data(), block.data(), t);
      for (int t = 0; t < kBlockCells; t++) decode_cell(codec, block.data(), t, decoded[t].data());
      std::vector<uint8_t> row(size_t(codec.format.vector_bytes()));
      for (int t = 0; t < kBlockCells; t++) {
        EXPECT_LT(relative_error(gaussian(64, t), decoded[t]), 0.6) << bits;
        copy_cell_out(codec.format, kind, block.data(), t, row.data());
        copy_cell_in(codec.format, kind, row.data(), copy.data(), t);
      }
      EXPECT_EQ(block, copy);
    }
  }
}

}  // namespace
}  // namespace thimble
