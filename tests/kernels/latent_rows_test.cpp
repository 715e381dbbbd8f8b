// Attention over latent rows (MLA): a value is scored as well, and a key is what its row has besides.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels_on.h"
#include "support/random.h"

namespace thimble {
namespace {

// Coded cells and queries of `latent` numbers that are values and `rope` others.
struct LatentProblem {
  int latent = 512, rope = 64, group = 16, n_tokens = 1, n_cells = 200;
  double bits = 2;
  bool mask = true, hide = true;

  HeadCodec keys, values;
  std::vector<float> q, biases;
  std::vector<uint8_t> k_memory, v_memory;
  std::vector<uint16_t> mask_data;
  std::vector<uint64_t> hidden;

  int n_rows() const { return n_tokens * group; }
  int dim() const { return latent + rope; }
  int n_blocks() const { return (n_cells + kBlockCells - 1) / kBlockCells; }
  Queries queries() const {
    Queries queries{n_rows(), group, dim(), q.data(), biases.data(), nullptr, 0};
    queries.of_values = latent;
    return queries;
  }
  Mask mask_view() const { return {mask ? mask_data.data() : nullptr, n_cells}; }
  CodedCells cells(int first_block, int last_block) const {
    return {&keys,       &values,    k_memory.data(), v_memory.data(), hide ? hidden.data() : nullptr,
            first_block, last_block, n_cells};
  }

  void fill() {
    keys = make_uncalibrated_codec(Kind::key, make_format(rope, bits == 16 ? 16 : 4));
    values = make_uncalibrated_codec(Kind::value, make_format(latent, bits));
    q = gaussian(size_t(n_rows()) * dim(), 7);
    for (float& x : q) x /= std::sqrt(float(dim()));
    biases = gaussian(n_rows(), 8);
    // Coding is slow, and most problems of a test have the same cells.
    static std::map<std::tuple<int, int, int, double>, std::array<std::vector<uint8_t>, 2>> coded;
    auto& memories = coded[{latent, rope, n_cells, bits}];
    for (auto [memory, codec, seed] : {std::tuple{&memories[0], &keys, 1}, {&memories[1], &values, 2}}) {
      if (!memory->empty()) continue;
      const int n = codec->format.head_dim;
      const auto x = gaussian(size_t(n_cells) * n, unsigned(seed));
      memory->assign(n_blocks() * codec->format.block_bytes(), 0xff);  // cells never written hold NaN
      for (int i = 0; i < n_cells; i++) {
        encode_cell(*codec, &x[size_t(i) * n], memory->data() + i / kBlockCells * codec->format.block_bytes(),
                    i % kBlockCells);
      }
    }
    k_memory = memories[0];
    v_memory = memories[1];
    mask_data.assign(size_t(n_tokens) * n_cells, 0);
    for (size_t i = 0; i < mask_data.size(); i++) {
      if (i % 13 == 3 || i / 150 % 4 == 2) mask_data[i] = 0xfc00;
    }
    hidden.assign(n_blocks(), 0);
    for (int i = 0; hide && i < n_cells; i += 5) hidden[i / kBlockCells] |= uint64_t{1} << (i % kBlockCells);
  }

  // Outputs, [row][latent].
  std::vector<double> attend(const Kernels& kernels, RowScores kept = {}) const {
    std::vector<float> max(n_rows(), -kInfinity), sum(n_rows(), 0.0f), acc(size_t(n_rows()) * latent, 0.0f);
    Softmax softmax{latent, max.data(), sum.data(), acc.data()};
    Scratch scratch;
    for (const auto& [first, last] : {std::pair{0, n_blocks() / 3}, {n_blocks() / 3, n_blocks()}}) {
      CodedCells part = cells(first, last);
      part.scores = kept;
      kernels.attend_codes(queries(), part, mask_view(), softmax, scratch);
    }
    std::vector<double> out(acc.begin(), acc.end());
    for (size_t i = 0; i < out.size(); i++) out[i] /= sum[i / latent] == 0 ? 1 : sum[i / latent];
    return out;
  }

  // The same from decoded cells, in double precision.
  std::vector<double> attend_decoded() const {
    std::vector<double> out(size_t(n_rows()) * latent, 0.0);
    std::vector<float> y(dim());
    for (int row = 0; row < n_rows(); row++) {
      double sum = 0;
      for (int i = 0; i < n_cells; i++) {
        if (hide && hidden[i / kBlockCells] >> (i % kBlockCells) & 1) continue;
        if (mask && mask_data[size_t(row / group) * n_cells + i] != 0) continue;
        const int b = i / kBlockCells, t = i % kBlockCells;
        decode_cell(values, v_memory.data() + b * values.format.block_bytes(), t, y.data());
        decode_cell(keys, k_memory.data() + b * keys.format.block_bytes(), t, y.data() + latent);
        double score = biases[row];
        for (int d = 0; d < dim(); d++) score += double(q[size_t(row) * dim() + d]) * y[d];
        const double weight = std::exp(score);
        sum += weight;
        for (int d = 0; d < latent; d++) out[size_t(row) * latent + d] += weight * y[d];
      }
      for (int d = 0; d < latent && sum > 0; d++) out[size_t(row) * latent + d] /= sum;
    }
    return out;
  }
};

double nmse(const std::vector<double>& result, const std::vector<double>& expected) {
  double error = 0, size = 1e-30;
  for (size_t i = 0; i < result.size(); i++) {
    error += (result[i] - expected[i]) * (result[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  return error / size;
}

TEST_P(KernelsOn, LatentRowsEqualTheSpecification) {
  const auto expect_equal = [&](LatentProblem p) {
    p.fill();
    SCOPED_TRACE(testing::Message() << p.latent << " and " << p.rope << " numbers, " << p.bits << " bits, group "
                                    << p.group << ", tokens " << p.n_tokens << ", cells " << p.n_cells);
    const auto result = p.attend(k());
    if (is_spec()) {
      EXPECT_LT(nmse(result, p.attend_decoded()), 1e-9);
    } else {
      EXPECT_LT(nmse(result, p.attend(spec())), (p.bits > 2 ? 1e-4 : 1e-3) * std::max(1.0, p.latent / 256.0));
    }
  };
  for (double bits : {16.0, 4.0, 3.0, 2.0, 1.5, 1.0}) {
    for (const auto& [latent, rope] : {std::pair{512, 64}, {256, 64}, {256, 32}, {128, 64}}) {
      LatentProblem p;
      p.latent = latent;
      p.rope = rope;
      p.bits = bits;
      p.group = 3;
      expect_equal(p);
    }
  }
  for (int n_cells : {1, 63, 64, 65, 129, 1023, 1025, 2200}) {
    for (double bits : {4.0, 3.0, 2.0}) {
      LatentProblem p;
      p.group = 5;
      p.n_cells = n_cells;
      p.bits = bits;
      p.hide = p.mask = n_cells > 100;
      expect_equal(p);
    }
  }
  for (int group : {1, 2, 7, 16, 33, 128}) {
    for (int n_tokens : {1, 3, 8, 9}) {
      if (group * n_tokens > 300) continue;
      LatentProblem p;
      p.latent = 128;
      p.group = group;
      p.n_tokens = n_tokens;
      expect_equal(p);
    }
  }
}

// Attention is from codes, not from tiles: in tiles there is no rounding of tables to be seen.
TEST_P(KernelsOn, LatentRowsAreAttendedToFromCodes) {
  if (is_spec()) GTEST_SKIP() << "has no tables of whole numbers";
  LatentProblem p;
  p.fill();
  EXPECT_GT(nmse(p.attend(k()), p.attend_decoded()), 1e-8);
  p.bits = 16;
  p.fill();
  EXPECT_LT(nmse(p.attend(k()), p.attend_decoded()), 1e-8);
}

TEST_P(KernelsOn, LatentScoresAreKept) {
  for (double bits : {16.0, 3.0, 2.0}) {
    for (int n_cells : {1, 65, 1500}) {
      LatentProblem p;
      p.latent = 128;
      p.bits = bits;
      p.n_cells = n_cells;
      p.fill();
      const size_t stride = size_t(p.n_blocks()) * kBlockCells;
      std::vector<float> kept(p.n_rows() * stride), best(stride), expected(stride);
      Scratch scratch;
      CodedCells cells = p.cells(0, p.n_blocks());
      spec().score_codes(p.queries(), cells, p.mask_view(), expected.data(), scratch);
      cells.scores = {kept.data(), stride};
      k().score_codes(p.queries(), cells, p.mask_view(), best.data(), scratch);
      for (size_t i = 0; i < stride; i++) {
        ASSERT_EQ(std::isinf(best[i]), std::isinf(expected[i])) << i;
        if (std::isinf(best[i])) continue;
        EXPECT_NEAR(best[i], expected[i], 0.05) << i;
      }
      EXPECT_EQ(nmse(p.attend(k(), {kept.data(), stride}), p.attend(k())), 0) << bits << " " << n_cells;
    }
  }
}

}  // namespace
}  // namespace thimble
