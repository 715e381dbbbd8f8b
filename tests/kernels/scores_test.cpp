// Scores from codes, and what is chosen by them.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "coded_problem.h"
#include "kernels_on.h"
#include "support/random.h"

namespace thimble {
namespace {

// Scores of all cells are held to the specification's, and those to attention from the same codes.
TEST_P(KernelsOn, ScoresFromCodes) {
  const auto scores_of = [](const Kernels& kernels, const Problem& p, int first, int last) {
    std::vector<float> scores(size_t(p.n_blocks()) * kBlockCells, 1234.0f);
    Scratch scratch;
    kernels.score_codes(p.queries(), cells_of(p, first, last), p.mask_view(), scores.data(), scratch);
    return scores;
  };
  for (double bits : {16.0, 4.0, 3.0, 2.0, 1.25, 1.0}) {
    for (int n_cells : {1, 64, 130, 1500}) {
      for (int n_tokens : {1, 3, 8}) {
        Problem p;
        p.bits = bits;
        p.n_cells = n_cells;
        p.n_tokens = n_tokens;
        p.softcap = n_tokens == 3 ? 5.0f : 0.0f;
        p.hide = n_tokens != 8;
        p.fill();
        SCOPED_TRACE(testing::Message() << bits << " bits, cells " << n_cells << ", tokens " << n_tokens);
        const auto scores = scores_of(k(), p, 0, p.n_blocks()), expected = scores_of(spec(), p, 0, p.n_blocks());
        double error = 0, size = 1e-30;
        float top = -kInfinity;
        for (size_t i = 0; i < scores.size(); i++) {
          ASSERT_EQ(std::isinf(scores[i]), std::isinf(expected[i])) << i;
          top = std::max(top, expected[i]);
          if (std::isinf(scores[i])) continue;
          error += std::pow(double(scores[i]) - expected[i], 2);
          size += std::pow(double(expected[i]), 2);
        }
        EXPECT_LT(error / size, is_spec() ? 1e-30 : codes_bound(p));
        if (is_spec()) {
          const Result result = attend_codes(k(), p);
          EXPECT_FLOAT_EQ(top, *std::max_element(result.max.begin(), result.max.end()));
        }
        if (p.n_blocks() > 2) {  // a part of the blocks leaves the rest alone and yields the same bits
          const auto part = scores_of(k(), p, 1, 2);
          for (size_t i = 0; i < part.size(); i++) EXPECT_EQ(part[i], i / kBlockCells == 1 ? scores[i] : 1234.0f) << i;
        }
      }
    }
  }
  Problem p;
  p.fill();
  p.q[0] = kNaN;
  for (float score : scores_of(k(), p, 0, p.n_blocks())) EXPECT_TRUE(std::isinf(score));
}

TEST_P(KernelsOn, MaximaAndBoundsOfScores) {
  for (int n_blocks : {1, 2, 5}) {
    for (int seed = 0; seed < 20; seed++) {
      std::vector<float> scores = gaussian(1 + size_t(n_blocks) * kBlockCells, unsigned(seed));
      const float* at = scores.data() + 1;  // no alignment is asked for
      for (size_t i = seed; i < scores.size(); i += 3) scores[i] = i % 2 ? -kInfinity : scores[size_t(seed)];
      if (seed == 7) scores[9] = kInfinity;
      if (seed == 8) std::fill(scores.begin(), scores.end(), -kInfinity);
      std::vector<float> maxima(n_blocks), expected(n_blocks);
      k().block_maxima(at, n_blocks, maxima.data());
      spec().block_maxima(at, n_blocks, expected.data());
      EXPECT_EQ(maxima, expected);
      for (int b = 0; b < n_blocks; b++) {
        for (float bound : {at[5], expected[b], -kInfinity, kInfinity, 0.0f}) {
          EXPECT_EQ(k().at_least(at + b * kBlockCells, bound), spec().at_least(at + b * kBlockCells, bound)) << bound;
        }
      }
    }
  }
}

// Attention from kept scores gives the same bits as attention that looks keys up, though more cells are hidden by then
// and parts are cut elsewhere.
TEST_P(KernelsOn, KeptScoresEqualThoseLookedUp) {
  const auto expect_equal = [&](Problem p) {
    const size_t stride = size_t(p.n_blocks()) * kBlockCells + 3;
    std::vector<float> best(stride), kept(p.n_rows() * stride, 1234.0f);
    const int cut = p.n_blocks() / 3, other_cut = p.n_blocks() / 2;
    Scratch scratch;
    for (const auto& [first, last] : {std::pair{0, cut}, {cut, p.n_blocks()}}) {
      CodedCells cells = cells_of(p, first, last);
      cells.scores = {kept.data(), stride};
      k().score_codes(p.queries(), cells, p.mask_view(), best.data(), scratch);
    }
    p.hidden.resize(p.n_blocks());
    for (int i = 0; i < p.n_cells; i += 1 + i % 7) p.hidden[i / kBlockCells] |= uint64_t{1} << (i % kBlockCells);
    if (p.n_blocks() > 2) p.hidden[1] = ~uint64_t{0};
    p.hide = true;
    Result result(p), expected(p);
    for (const auto& [first, last] : {std::pair{0, other_cut}, {other_cut, p.n_blocks()}}) {
      attend_codes(k(), p, first, last, result, {kept.data(), stride});
      attend_codes(k(), p, first, last, expected);
    }
    EXPECT_TRUE(same_bits(result.max, expected.max) && same_bits(result.sum, expected.sum) &&
                same_bits(result.acc, expected.acc))
        << "bits " << p.bits << " group " << p.group << " tokens " << p.n_tokens << " cells " << p.n_cells;
  };
  for (double bits : {16.0, 4.0, 3.0, 2.0, 1.0}) {
    for (int n_cells : {1, 63, 65, 130, 1500, 2200}) {
      for (int group : {1, 3, 5}) {
        for (int n_tokens : {1, 3}) {
          Problem p{.group = group, .n_tokens = n_tokens, .n_cells = n_cells, .bits = bits, .hide = group != 5};
          p.fill();
          expect_equal(p);
        }
      }
    }
    Problem p;
    p.bits = bits;
    p.n_cells = 1500;
    p.softcap = 3;
    p.slope = p.bias = true;
    p.fill();
    expect_equal(p);
    p.mask = false;
    expect_equal(p);
    p.mask = true;
    p.q[p.dim + 3] = kNaN;  // of the second row
    expect_equal(p);
    p.mask_data.assign(p.mask_data.size(), 0xfc00);
    expect_equal(p);
  }
}

}  // namespace
}  // namespace thimble
