// Every instruction set is held to the scalar specification: codes and tiles bit for bit, attention to a stated error.
#include "kernels/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

#include "codec/half.h"
#include "coded_problem.h"
#include "kernels_on.h"
#include "support/random.h"

#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace thimble {
namespace {

constexpr double kRates[] = {4.0, 3.0, 2.0, 1.5, 1.25, 1.0};

TEST(Dispatch, PicksTheFastestOrTheOneAskedFor) {
  const auto available = available_kernels();
  EXPECT_STREQ(available.front()->name, "scalar");
#if defined(__x86_64__) && defined(__GNUC__)
  const bool avx512 = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
  EXPECT_STREQ(available.back()->name, avx512 ? "avx512" : __builtin_cpu_supports("avx2") ? "avx2" : "scalar");
#elif defined(__aarch64__)
  EXPECT_STREQ(available.back()->name, "neon");
#endif
  const char* wanted = std::getenv("THIMBLE_ISA");
  EXPECT_STREQ(kernels().name, wanted && *wanted ? wanted : available.back()->name);
}

TEST_P(KernelsOn, CodesAreBitExact) {
  for (int dim : {32, 34, 36, 64, 80, 96, 100, 128, 256, 512}) {
    for (double bits : kRates) {
      const HeadCodec codec = make_uncalibrated_codec(Kind::key, make_format(dim, bits));
      const auto expect_same = [&](const std::vector<float>& y) {
        std::vector<uint8_t> codes(codec.format.n_subspaces(), 1), expected(codes.size(), 2);
        const uint16_t scale = k().encode(codec, y.data(), codes.data());
        EXPECT_EQ(scale, encode_vector(codec, y.data(), expected.data())) << dim << " " << bits;
        EXPECT_EQ(codes, expected) << dim << " " << bits;
      };
      for (unsigned seed = 0; seed < 20; seed++) {
        auto y = gaussian(dim, seed);
        expect_same(y);
        for (float scale : {1e-15f, 1e-6f, 1e6f, 1e15f}) {
          auto scaled = y;
          for (float& v : scaled) v *= scale;
          expect_same(scaled);
        }
        for (float& v : y) v = std::round(v);  // ties
        expect_same(y);
      }
      std::vector<float> y(dim, 0.0f);
      expect_same(y);
      for (float v : {1.0f, -1.0f, 1e-30f, 1e30f, kInfinity, -kInfinity, kNaN}) {
        y[dim / 3] = v;
        expect_same(y);
      }
    }
  }
}

TEST_P(KernelsOn, TransformsAreBitExact) {
  for (int dim : {32, 34, 36, 64, 72, 80, 96, 128, 256, 512}) {
    const int n_rows = dim == 64 ? 17 : 5;
    const auto x = gaussian(size_t(n_rows) * dim, 1), matrix = gaussian(size_t(dim) * dim, 2);
    for (const Transform& t :
         {Transform::identity(dim), Transform::hadamard(dim), Transform::dense(gaussian(dim, 3), matrix)}) {
      std::vector<float> y(x.size()), expected(x.size());
      t.forward(x.data(), y.data(), n_rows, k().transform);
      t.forward(x.data(), expected.data(), n_rows);
      EXPECT_TRUE(same_bits(y, expected)) << dim;
      t.query(x.data(), y.data(), n_rows, k().transform);
      t.query(x.data(), expected.data(), n_rows);
      EXPECT_TRUE(same_bits(y, expected)) << dim;
      const std::vector<float> weights(n_rows, 0.75f);
      t.output(x.data(), weights.data(), y.data(), n_rows, k().transform);
      for (int r = 0; r < n_rows; r++) t.output(&x[size_t(r) * dim], weights[r], &expected[size_t(r) * dim]);
      EXPECT_TRUE(same_bits(y, expected)) << dim;
    }
  }
}

TEST_P(KernelsOn, DecodedBlocksAreExact) {
  for (int dim : {32, 34, 36, 64, 80, 96, 100, 128, 256, 512}) {
    for (double bits : {16.0, 4.0, 3.0, 2.0, 1.5, 1.25, 1.0}) {
      for (Kind kind : {Kind::key, Kind::value}) {
        const HeadCodec codec = make_uncalibrated_codec(kind, make_format(dim, bits));
        std::vector<uint8_t> memory(codec.format.block_bytes() + 1);
        uint8_t* block = memory.data() + 1;  // no alignment
        for (int i = 0; i < kBlockCells; i++) encode_cell(codec, gaussian(dim, i).data(), block, i);
        std::vector<float> tile(size_t(dim) * kBlockCells, -1), expected(tile);
        k().decode_block(codec, block, tile.data());
        spec().decode_block(codec, block, expected.data());
        EXPECT_TRUE(tile == expected) << dim << " " << bits;  // a zero's sign may differ
      }
    }
  }
}

TEST_P(KernelsOn, LoadedRowsAreBitExact) {
  for (int dim : {32, 34, 36, 100, 128}) {
    std::vector<uint8_t> memory(size_t(kBlockCells) * dim * 2 + 1);
    std::minstd_rand random(1);
    for (uint8_t& b : memory) b = uint8_t(random() >> 8) & 0xbf;  // any half but infinities and NaNs
    for (int n : {1, 7, 8, 9, 16, 17, 63, 64}) {
      const uint8_t* rows[kBlockCells];
      for (int i = 0; i < n; i++) rows[i] = &memory[1 + size_t(i * 37 % n) * dim * 2];
      for (Kind kind : {Kind::key, Kind::value}) {
        std::vector<float> tile(size_t(dim) * kBlockCells, -1), expected(tile);
        k().load_rows(kind, rows, n, dim, tile.data());
        spec().load_rows(kind, rows, n, dim, expected.data());
        EXPECT_TRUE(same_bits(tile, expected)) << dim << " " << n;
      }
    }
  }
}

TEST_P(KernelsOn, VisibleReadsNoFurtherThanTheMask) {
  for (int n = 1; n <= kBlockCells; n++) {
    std::vector<uint16_t> mask(n);
    for (int i = 0; i < n; i++) mask[i] = i % 3 == 0 ? 0xfc00 : i % 3 == 1 ? 0x8000 : 0x7c00;
    EXPECT_EQ(k().visible(mask.data(), n), spec().visible(mask.data(), n)) << n;
  }
}

TEST_P(KernelsOn, AttentionFromCodesEqualsTheSpecification) {
  const auto expect_equal = [&](Problem& p) {
    p.fill();
    EXPECT_LT(nmse(p, attend_codes(k(), p), attend_codes(spec(), p)), is_spec() ? 1e-30 : codes_bound(p))
        << "dim " << p.dim << " bits " << p.bits << " group " << p.group << " tokens " << p.n_tokens << " cells "
        << p.n_cells;
  };
  for (int dim : {32, 34, 36, 64, 80, 96, 100, 128, 256, 512}) {
    for (double bits : {16.0, 4.0, 3.0, 2.0, 1.5, 1.25, 1.0}) {
      Problem p;
      p.dim = dim;
      p.bits = bits;
      expect_equal(p);
    }
  }
  for (int n_cells : {1, 63, 64, 65, 127, 129, 1023, 1024, 1025, 2200}) {
    for (double bits : {4.0, 2.0}) {
      Problem p;
      p.n_cells = n_cells;
      p.bits = bits;
      p.hide = false;
      p.misalign = 1;
      expect_equal(p);
      p.mask = false;
      expect_equal(p);
    }
  }
  for (int group = 1; group <= 16; group++) {
    for (int n_tokens : {1, 2, 5, 8, 9}) {
      Problem p{.group = group, .n_tokens = n_tokens};
      expect_equal(p);
    }
  }
  for (float softcap : {0.0f, 3.0f}) {
    for (bool slope : {false, true}) {
      for (bool bias : {false, true}) {
        for (double bits : {3.0, 2.0}) {
          Problem p{.bits = bits, .softcap = softcap, .bias = bias, .slope = slope};
          p.n_tokens = 2;
          p.n_cells = 1500;
          expect_equal(p);
        }
      }
    }
  }
}

TEST_P(KernelsOn, HugeAndTinyLogits) {
  for (float size : {1e-20f, 1e-3f, 10.0f, 100.0f, 1e4f, 1e20f}) {
    Problem p;
    p.query_size = size;
    p.n_cells = 1500;
    p.fill();
    const Result result = attend_codes(k(), p), expected = attend_codes(spec(), p);
    for (int row = 0; row < p.n_rows(); row++) {
      EXPECT_NEAR(result.max[row], expected.max[row], std::fabs(expected.max[row]) * 0.02 + 0.05 * std::min(size, 1.0f))
          << size;
    }
    // The error of scores is a share of their size; where it is more than a few units, softmax prefers other cells.
    if (size <= 1) {
      EXPECT_LT(nmse(p, result, expected), codes_bound(p)) << size;
    }
    for (float v : result.acc) EXPECT_TRUE(std::isfinite(v)) << size;
  }
}

// Attention sinks: one cell takes half of the weight, the other half is spread over a thousand.
TEST_P(KernelsOn, ManySmallWeightsKeepTheirSum) {
  Problem p;
  p.group = 1;
  p.n_cells = 1024;
  p.mask = p.hide = false;
  p.query_size = 1e-3f;
  p.slope = true;
  p.fill();
  for (int i = 0; i < p.n_cells; i++) {
    p.mask_data[i] = float_to_half(i == 300 ? 7.0f : 0.0f);
    std::vector<float> v(p.dim, 1.0f);
    for (int d = 0; d < p.dim; d++) v[d] += 0.3f * p.v[size_t(i) * p.dim + d];
    if (i == 300) {
      for (float& x : v) x = -x;
    }
    encode_cell(p.values, v.data(), p.block(p.v_memory, p.values, i / kBlockCells), i % kBlockCells);
  }
  p.mask = true;
  EXPECT_LT(nmse(p, attend_codes(k(), p), attend_codes(spec(), p)), is_spec() ? 1e-30 : 0.03);
}

// As large as sums of weights times codewords become: equal weights of equal values, each at the end of its codebook.
TEST_P(KernelsOn, EqualWeightsOfExtremeValues) {
  for (double bits : kRates) {
    Problem p;
    p.n_cells = 2048;
    p.bits = bits;
    p.mask = p.hide = false;
    p.fill();
    p.q.assign(p.q.size(), 0.0f);
    std::vector<float> v(p.dim), stored(p.dim);
    for (int m = 0, d = 0; m < p.values.format.n_subspaces(); m++) {
      const float* words = &p.values.words[size_t(d) * kCodewords];  // by their first components
      const int extreme = int(std::max_element(words, words + kCodewords) - words);
      for (const int end = d + p.values.format.width(m); d < end; d++) {
        v[d] = p.values.words[size_t(d) * kCodewords + extreme];
      }
    }
    for (int i = 0; i < p.n_cells; i++) {
      encode_cell(p.values, v.data(), p.block(p.v_memory, p.values, i / kBlockCells), i % kBlockCells);
    }
    decode_cell(p.values, p.v_memory.data(), 0, stored.data());
    const Result result = attend_codes(k(), p);
    for (int d = 0; d < p.dim; d++) {
      EXPECT_NEAR(result.value(p, 1, d), stored[d], 1e-2 * std::fabs(stored[d]) + 1e-3) << bits << " " << d;
    }
  }
}

TEST_P(KernelsOn, MasksOfAllKinds) {
  Problem p;
  p.n_cells = 1300;
  p.hide = false;
  p.fill();
  p.mask_data.assign(p.mask_data.size(), 0xfc00);
  Result nothing = attend_codes(k(), p);
  for (int row = 0; row < p.n_rows(); row++) {
    EXPECT_EQ(nothing.max[row], -kInfinity);
    EXPECT_EQ(nothing.sum[row], 0);
  }
  for (int only : {0, 64, 777, 1299}) {
    p.mask_data.assign(p.mask_data.size(), 0xfc00);
    p.mask_data[only] = 0;
    const Result result = attend_codes(k(), p);
    std::vector<float> v(p.dim);
    decode_cell(p.values, p.block(p.v_memory, p.values, only / kBlockCells), only % kBlockCells, v.data());
    for (int row = 0; row < p.n_rows(); row++) {
      EXPECT_NEAR(result.sum[row], 1, 1e-5);
      for (int d = 0; d < p.dim; d++) EXPECT_NEAR(result.value(p, row, d), v[d], 0.02 * std::fabs(v[d]) + 1e-6) << only;
    }
  }
  p.mask_data[5] = 0x7c00;  // +inf: NaN, as f16 attention gives, and no crash
  attend_codes(k(), p);
  p.mask_data[6] = 0x7e00;
  attend_codes(k(), p);
}

TEST_P(KernelsOn, NaNsComeOutAndCrashNothing) {
  Problem p;
  p.n_cells = 300;
  p.hide = p.mask = false;
  p.fill();
  const Problem good = p;
  const auto bytes = [&](std::vector<uint8_t>& memory, const HeadCodec& codec, int cell) {
    return p.block(memory, codec, cell / kBlockCells) + codec.format.codes_bytes() + cell % kBlockCells * 2;
  };
  const uint16_t nan = 0x7e00;
  std::memcpy(bytes(p.k_memory, p.keys, 70), &nan, 2);
  EXPECT_TRUE(std::isnan(attend_codes(k(), p).value(p, 0, 0)));
  p = good;
  std::memcpy(bytes(p.v_memory, p.values, 70), &nan, 2);
  EXPECT_TRUE(std::isnan(attend_codes(k(), p).value(p, 0, 0)));
  p.hide = true;  // cell 70 is among the hidden ones
  p.hidden.assign(p.n_blocks(), 0);
  p.hidden[1] = uint64_t{1} << 6;
  const Result result = attend_codes(k(), p);
  for (float v : result.acc) EXPECT_TRUE(std::isfinite(v));
  p = good;
  p.q[3] = kNaN;
  EXPECT_TRUE(std::isnan(attend_codes(k(), p).value(p, 0, 0)) || attend_codes(k(), p).sum[0] == 0);
  p.q[3] = kInfinity;
  attend_codes(k(), p);
}

TEST_P(KernelsOn, APartOfTheCellsAndThenTheRest) {
  for (double bits : {16.0, 4.0, 2.0}) {
    Problem p;
    p.n_cells = 3000;
    p.bits = bits;
    p.fill();
    Result parts(p);
    attend_codes(k(), p, 0, 5, parts);
    attend_codes(k(), p, 5, 6, parts);
    attend_codes(k(), p, 6, p.n_blocks(), parts);
    EXPECT_LT(nmse(p, parts, attend_codes(spec(), p)), codes_bound(p)) << bits;
  }
}

TEST_P(KernelsOn, DenseTilesEqualTheSpecification) {
  for (int dim : {32, 36, 64, 80, 128, 256, 512}) {
    for (int n_tokens : {1, 2, 7, 64}) {
      for (int n_cells : {1, 5, 63, 64}) {
        for (float softcap : {0.0f, 3.0f}) {
          Problem p;
          p.dim = dim;
          p.n_tokens = n_tokens;
          p.n_cells = n_cells;
          p.softcap = softcap;
          p.slope = p.bias = true;
          p.fill();
          std::vector<float> k_tile(size_t(dim) * kBlockCells), v_tile(k_tile);
          k().decode_block(p.keys, p.k_memory.data(), k_tile.data());
          k().decode_block(p.values, p.v_memory.data(), v_tile.data());
          Result result(p), expected(p);
          Scratch scratch;
          for (int round = 0; round < 2; round++) {  // the second goes on from the first
            Softmax softmax = result.softmax(p), expected_softmax = expected.softmax(p);
            const Tile tile{n_cells, k_tile.data(), v_tile.data(), p.hidden[0]};
            k().attend_tile(p.queries(), tile, p.mask_view(), softmax, scratch);
            spec().attend_tile(p.queries(), tile, p.mask_view(), expected_softmax, scratch);
          }
          EXPECT_LT(nmse(p, result, expected), 1e-9) << dim << " " << n_tokens << " " << n_cells;
        }
      }
    }
  }
}

#ifdef __SSE__
// A denormal operand costs a hundred cycles: hidden cells and those far below the greatest must weigh nothing at all.
TEST_P(KernelsOn, DenseTilesStayClearOfDenormals) {
  constexpr int kDim = 64, kRows = 8;
  std::vector<float> keys(kDim * kBlockCells, 0.0f), values(kBlockCells * kDim, 1e-3f), q(kRows * kDim, 1.0f);
  for (int cell = 0; cell < kBlockCells; cell++) keys[cell] = -1.5f * float(cell);
  std::vector<uint16_t> mask(kRows * kBlockCells, 0);
  for (int row = 0; row < kRows; row++) {
    for (int cell = 40 + row; cell < kBlockCells; cell++) mask[row * kBlockCells + cell] = 0xfc00;
  }
  std::vector<float> max(kRows, -INFINITY), sum(kRows, 0.0f), acc(kRows * kDim, 0.0f);
  Softmax softmax{kDim, max.data(), sum.data(), acc.data()};
  Scratch scratch;
  constexpr unsigned kDenormalOperand = 2;
  _mm_setcsr(_mm_getcsr() & ~kDenormalOperand);
  k().attend_tile({kRows, 1, kDim, q.data()}, {kBlockCells, keys.data(), values.data(), 0}, {mask.data(), kBlockCells},
                  softmax, scratch);
  EXPECT_FALSE(_mm_getcsr() & kDenormalOperand);
  for (int row = 0; row < kRows; row++) EXPECT_FLOAT_EQ(acc[row * kDim] / sum[row], 1e-3f);
}
#endif

// The error of a kernel's arithmetic must be less than a tenth of the codec's own error, for scores (taken as the
// maximum over one visible cell) and for outputs.
void expect_a_tenth(const Kernels& kernels, const Problem& p, const std::string& what) {
  const Kernels& spec = scalar_kernels();
  double codec = 0, kernel = 0;
  Problem one = p;
  one.mask = true;
  for (int cell = 0; cell < 64; cell++) {
    one.mask_data.assign(one.mask_data.size(), 0xfc00);
    for (int t = 0; t < p.n_tokens; t++) one.mask_data[size_t(t) * p.n_cells + cell] = 0;
    const Result result = attend_codes(kernels, one), expected = attend_codes(spec, one);
    for (int row = 0; row < p.n_rows(); row++) {
      double exact = 0;
      for (int d = 0; d < p.dim; d++) exact += double(p.q[size_t(row) * p.dim + d]) * p.k[size_t(cell) * p.dim + d];
      codec += std::pow(expected.max[row] - exact, 2);
      kernel += std::pow(double(result.max[row]) - expected.max[row], 2);
    }
  }
  EXPECT_LT(std::sqrt(kernel), 0.1 * std::sqrt(codec)) << what;

  Result exact(p);
  for (int row = 0; row < p.n_rows(); row++) {
    std::vector<double> scores(p.n_cells, 0.0);
    for (int i = 0; i < p.n_cells; i++) {
      for (int d = 0; d < p.dim; d++) scores[i] += double(p.q[size_t(row) * p.dim + d]) * p.k[size_t(i) * p.dim + d];
    }
    const double greatest = *std::max_element(scores.begin(), scores.end());
    exact.sum[row] = 0;
    for (int i = 0; i < p.n_cells; i++) {
      const float weight = float(std::exp(scores[i] - greatest));
      exact.sum[row] += weight;
      for (int d = 0; d < p.dim; d++) exact.acc[size_t(row) * p.dim + d] += weight * p.v[size_t(i) * p.dim + d];
    }
  }
  const Result expected = attend_codes(spec, p);
  EXPECT_LT(std::sqrt(nmse(p, attend_codes(kernels, p), expected)), 0.1 * std::sqrt(nmse(p, expected, exact))) << what;
}

Problem without_masks(int dim, double bits) {
  Problem p;
  p.dim = dim;
  p.bits = bits;
  p.group = 4;
  p.n_cells = 256;
  p.mask = p.hide = false;
  return p;
}

TEST_P(KernelsOn, ArithmeticErrorIsATenthOfTheCodecs) {
  for (int dim : {64, 128, 256, 512}) {
    for (double bits : kRates) {
      for (bool outliers : {false, true}) {
        Problem p = without_masks(dim, bits);
        p.fill();
        if (outliers) {
          for (int row = 0; row < p.n_rows(); row++) p.q[size_t(row) * dim + 5 * row + 1] *= 6;
        }
        expect_a_tenth(k(), p, std::to_string(dim) + " " + std::to_string(bits) + (outliers ? " outliers" : ""));
      }
    }
  }
}

// Some models' keys and queries are far larger in a few dimensions than in the others (gemma 3), and a row's scores far
// apart.
TEST_P(KernelsOn, ArithmeticErrorWithOutliersInKeysAndQueries) {
  if (is_spec()) GTEST_SKIP() << "this is the specification";
  for (double bits : {4.0, 2.0}) {
    for (float outlying : {4.0f, 16.0f}) {
      for (int n_tokens : {1, kMaxCodeTokens + 1}) {
        Problem p = without_masks(256, bits);
        p.n_cells = 128;
        p.n_tokens = n_tokens;
        p.outlying = outlying;
        p.query_size = 16.0f / (outlying * outlying);
        p.fill();
        expect_a_tenth(k(), p, std::to_string(bits) + " " + std::to_string(outlying) + " " + std::to_string(n_tokens));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, KernelsOn, testing::ValuesIn(available_kernels()),
                         [](const auto& info) { return std::string(info.param->name); });

}  // namespace
}  // namespace thimble
