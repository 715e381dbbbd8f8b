// Attention of many query tokens from codes: a block is decoded once for all of them.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "coded_problem.h"
#include "kernels_on.h"

namespace thimble {
namespace {

// Many query tokens: each block is decoded once for all of them. Numbers of 16 bits leave hardly an error.
TEST_P(KernelsOn, PromptsFromCodesEqualTheSpecification) {
  const auto expect_equal = [&](Problem& p) {
    p.fill();
    const Result result = attend_codes(k(), p), expected = attend_codes(spec(), p);
    EXPECT_LT(nmse(p, result, expected), is_spec() ? 1e-30 : 1e-7)
        << "dim " << p.dim << " bits " << p.bits << " group " << p.group << " tokens " << p.n_tokens << " cells "
        << p.n_cells;
    for (int row = 0; row < p.n_rows(); row++) {
      if (expected.max[row] == -kInfinity) {
        EXPECT_EQ(result.max[row], -kInfinity);
      } else {
        EXPECT_NEAR(result.max[row], expected.max[row], 1e-3 * std::fabs(expected.max[row]) + 1e-3);
      }
    }
  };
  for (int dim : {2, 6, 32, 34, 36, 64, 80, 96, 100, 128, 256, 512}) {
    for (double bits : {16.0, 4.0, 3.0, 2.0, 1.5, 1.25, 1.0}) {
      if (dim < 8 && bits < 4) continue;  // subspaces of up to eight numbers
      Problem p{.dim = dim, .n_tokens = 9};
      p.bits = bits;
      expect_equal(p);
    }
  }
  for (int n_cells : {1, 63, 64, 65, 129, 200}) {
    for (int group : {1, 5}) {
      for (int n_tokens : {9, 17}) {
        Problem p{.group = group, .n_tokens = n_tokens, .n_cells = n_cells};
        p.misalign = 1;
        p.hide = group != 5;
        expect_equal(p);
        p.mask = false;
        expect_equal(p);
      }
    }
  }
  for (float softcap : {0.0f, 3.0f}) {
    for (bool slope : {false, true}) {
      for (bool bias : {false, true}) {
        for (float query_size : {1e-3f, 1.0f, 4.0f}) {
          Problem p{.n_tokens = 11, .n_cells = 200, .query_size = query_size, .softcap = softcap};
          p.bias = bias;
          p.slope = slope;
          expect_equal(p);
        }
      }
    }
  }
}

// The sum goes on from where it stands, whichever way the cells before were attended to.
TEST_P(KernelsOn, PromptsGoOnFromEarlierCells) {
  for (double bits : {4.0, 2.0}) {
    Problem p{.n_tokens = 12, .n_cells = 700, .bits = bits};
    p.fill();
    Result parts(p);
    for (const auto& [first, last] : {std::pair{6, p.n_blocks()}, {0, 1}, {1, 6}}) {
      attend_codes(first == 1 ? spec() : k(), p, first, last, parts);
    }
    EXPECT_LT(nmse(p, parts, attend_codes(spec(), p)), 1e-7) << bits;
  }
}

TEST_P(KernelsOn, PromptsOfExtremeNumbers) {
  for (float size : {1e-20f, 100.0f, 1e4f, 1e20f}) {
    Problem p{.n_tokens = 9, .n_cells = 300, .query_size = size};
    p.fill();
    const Result result = attend_codes(k(), p);
    for (float v : result.acc) EXPECT_TRUE(std::isfinite(v)) << size;
    for (int row = 0; row < p.n_rows(); row++) EXPECT_GT(result.sum[row], 0.99f) << size;
  }
  Problem p{.n_tokens = 9, .n_cells = 300};
  p.hide = p.mask = false;
  p.fill();
  const Problem good = p;
  const uint16_t nan = 0x7e00;
  const auto scale_of = [&](std::vector<uint8_t>& memory, const HeadCodec& codec) {  // cell 70
    return p.block(memory, codec, 1) + codec.format.codes_bytes() + 6 * 2;
  };
  std::memcpy(scale_of(p.k_memory, p.keys), &nan, 2);
  EXPECT_TRUE(std::isnan(attend_codes(k(), p).value(p, 0, 0)));
  p = good;
  std::memcpy(scale_of(p.v_memory, p.values), &nan, 2);
  EXPECT_TRUE(std::isnan(attend_codes(k(), p).value(p, 0, 0)));
  p.hide = true;
  p.hidden.assign(p.n_blocks(), 0);
  p.hidden[1] = uint64_t{1} << 6;
  for (float v : attend_codes(k(), p).acc) EXPECT_TRUE(std::isfinite(v));
  p = good;
  p.q[3] = kNaN;
  const Result result = attend_codes(k(), p);
  EXPECT_TRUE(std::isnan(result.value(p, 0, 0)) || result.sum[0] == 0);
  EXPECT_TRUE(std::isfinite(result.value(p, 1, 0)));
  p.q[3] = kInfinity;
  attend_codes(k(), p);
  p = good;
  p.mask = true;
  p.mask_data.assign(p.mask_data.size(), 0);
  p.mask_data[5] = 0x7c00;  // +inf
  attend_codes(k(), p);
}

}  // namespace
}  // namespace thimble
