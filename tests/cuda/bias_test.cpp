// What coded cells' scores lack, in dense rows and transformed queries: the products of the two are the scores of exact
// and of coded cells, but for the two components that carry what is added.
#define THIMBLE_SIMT_HOST
#include "cuda/encode/bias.h"

#include <gtest/gtest.h>

#include "cuda/attend/attend.h"
#include "fixture.h"

namespace thimble::cuda {
namespace {

constexpr int kHeads = 2, kGroup = 3, kStreams = 2, kCells = 70, kAllCells = 128, kCapacity = 9, kQueries = 5;

// Of head 1 the component 40 has the smallest numbers and 7 the next; of head 0 it is 3 and 63.
std::vector<HeadCodec> codecs() {
  Random random(2);
  std::vector<HeadCodec> all;
  for (int h = 0; h < kHeads; h++) {
    all.push_back(random_codec(Kind::key, 64, 2, true, random));
    const auto shrink = [&](int d, int8_t by) {
      for (int c = 0; c < kCodewords; c++) all[h].codebook.words[size_t(d) * kCodewords + c] /= by;
      all[h].error[d] = 0.001f / float(by);
    };
    shrink(h == 0 ? 3 : 40, 100);
    shrink(h == 0 ? 63 : 7, 20);
    all[h].derive_tables();
  }
  return all;
}

TEST(CudaBias, ScoresOfCodedCellsGetWhatTheyLack) {
  const std::vector<HeadCodec> heads = codecs();
  const HostTables tables = pack_tables(heads);
  EXPECT_EQ(tables.carriers, (std::vector<int32_t>{3, 63, 40, 7}));
  for (const bool shifted : {false, true}) {
    Random random(4);
    std::vector<float> numbers = random.normals(size_t(kStreams) * kHeads * kCells * 64),
                       shift = random.normals(kHeads * 64);
    std::vector<uint16_t> rows(numbers.size());
    std::transform(numbers.begin(), numbers.end(), rows.begin(), float_to_half);
    std::vector<float> queries = random.normals(kStreams * kQueries * kHeads * kGroup * 64);
    const std::vector<uint16_t> rows_before = rows;
    const std::vector<float> queries_before = queries;
    // Streams 1 and 2 of 3 have rows.
    std::vector<int32_t> window(3 * kCapacity, -1);
    window[0] = 5;
    window[kCapacity + 3] = 7;
    window[2 * kCapacity + 8] = 69;
    window[2 * kCapacity + 1] = 100;  // has no row here
    const std::vector<int64_t> batch = {kAllCells + 11, -1, 2 * kAllCells + 12, 13};
    BiasArgs a;
    a.codec = tables.view();
    a.rows = {rows.data(), nullptr, 1, kStreams, kCells, shifted ? shift.data() : nullptr, nullptr};
    a.rows_kv_heads = kHeads;
    a.group = kGroup;
    a.scale = 0.3f;
    a.window_cells = window.data();
    a.n_window_streams = 3;
    a.capacity = kCapacity;
    a.cells = batch.data();
    a.n_tokens = int(batch.size());
    a.cells_per_stream = kAllCells;
    a.queries = queries.data();
    a.n_queries = kStreams * kQueries;
    ASSERT_TRUE(add_bias({0, 4, 64 << 10, 75}, a, nullptr).ok());
    for (int i = 0; i < kStreams * kQueries * kHeads * kGroup; i++) {
      const int stream = i / (kQueries * kHeads * kGroup), head = i / kGroup % kHeads;
      const float *q = &queries[size_t(i) * 64], *before = &queries_before[size_t(i) * 64];
      const int bias = tables.carriers[2 * head], constant = tables.carriers[2 * head + 1];
      const auto is_carrier = [&](int d) { return d == bias || (shifted && d == constant); };
      for (int cell = 0; cell < kCells; cell++) {
        const size_t at = ((size_t(stream) * kHeads + head) * kCells + cell) * 64;
        double got = 0, expected = 0;
        for (int d = 0; d < 64; d++) {
          got += double(q[d]) * half_to_float(rows[at + d]);
          if (!is_carrier(d)) expected += double(before[d]) * half_to_float(rows_before[at + d]);
          if (is_carrier(d) && shifted) expected += double(before[d]) * shift[head * 64 + d];
        }
        const bool is_exact = stream == 0 ? cell == 7 || cell == 11 : cell == 69 || cell == 12;
        // score_bias is of scaled queries; a product is scaled afterwards.
        std::vector<float> scaled(before, before + 64);
        for (float& x : scaled) x *= a.scale;
        if (!is_exact) expected += heads[head].score_bias(scaled.data()) / a.scale;
        ASSERT_NEAR(got, expected, 1e-3 * std::abs(expected) + 1e-3) << "query " << i << ", cell " << cell;
      }
    }
  }
}

TEST(CudaBias, WantsACodecThatKnowsItsError) {
  HeadCodec codec = make_uncalibrated_codec(Kind::key, make_format(64, 2));
  const HostTables tables = pack_tables({codec});
  BiasArgs a;
  a.codec = tables.view();
  EXPECT_EQ(add_bias({0, 4, 64 << 10, 75}, a, nullptr).code, Status::Code::invalid_argument);
}

}  // namespace
}  // namespace thimble::cuda
