// Which cells matter most: their scores, and which cells of a cache stay exact because of them.
#include "cache/pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "cache/layer.h"
#include "codec/half.h"

namespace thimble {
namespace {

TEST(Pool, MeanOfQueriesOfSomeRows) {
  // Two streams of three tokens, two heads of two numbers: [stream][token][head][dim].
  std::vector<float> q(2 * 3 * 2 * 2);
  for (size_t i = 0; i < q.size(); i++) q[i] = float(i);
  const BatchQueries queries{q.data(), 2, 2, 3, 4, 2, 12};
  const std::vector<int> rows = {1, 5};  // token 1 of the first, 2 of the second
  EXPECT_EQ(mean_query(queries, rows), (std::vector<float>{12, 13, 14, 15}));
}

TEST(Pool, ManyRowsAreSampledEvenly) {
  std::vector<float> q(1000);
  std::vector<int> rows(1000);
  for (int i = 0; i < 1000; i++) q[i] = float(rows[i] = i);
  const float mean = mean_query({q.data(), 1, 1, 1000, 1, 1, 1000}, rows)[0];
  EXPECT_NEAR(mean, 500, 10);
}

TEST(Pool, ScoresAreDeviationsOfTheRecentCells) {
  constexpr int kHeads = 6, kKvHeads = 2, kDim = 20, kCells = 70, kRecent = 130;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> query(kHeads * kDim);
  for (float& x : query) x = normal(random);
  std::vector<std::vector<uint16_t>> keys(kCells + kRecent, std::vector<uint16_t>(kKvHeads * kDim));
  std::vector<const uint16_t*> rows;
  for (auto& key : keys) {
    for (uint16_t& x : key) x = float_to_half(normal(random));
    rows.push_back(key.data());
  }
  keys[3][1] = 0x7e00;  // NaN, of the first KV head
  std::vector<float> scores(kCells);
  const std::span all(rows);
  score_cells(query, kHeads, kKvHeads, kDim, all.first(kCells), all.subspan(kCells), scores);
  const auto product = [&](int cell, int head) {
    double sum = 0;
    for (int d = 0; d < kDim; d++) {
      sum += double(query[head * kDim + d]) * half_to_float(keys[cell][head / 3 * kDim + d]);
    }
    return sum;
  };
  for (int cell = 0; cell < kCells; cell++) {
    double best = -INFINITY;
    for (int head = 0; head < kHeads; head++) {
      double mean = 0, square = 0;
      for (int r = 0; r < kRecent; r++) mean += product(kCells + r, head) / kRecent;
      for (int r = 0; r < kRecent; r++) square += std::pow(product(kCells + r, head) - mean, 2) / kRecent;
      const double z = (product(cell, head) - mean) / std::sqrt(square);
      if (z > best) best = z;
    }
    EXPECT_NEAR(scores[cell], best, 1e-4) << cell;
  }
}

TEST(Pool, WhatHasNoNumberMattersLeast) {
  const std::vector<uint16_t> nan(4, 0x7e00), one(4, 0x3c00);
  const std::vector<float> query(4, 1.0f);
  const std::vector<const uint16_t*> cells = {nan.data(), one.data()}, recent = {one.data(), one.data()};
  std::vector<float> scores(2);
  score_cells(query, 1, 1, 4, cells, recent, scores);
  EXPECT_EQ(scores[0], -std::numeric_limits<float>::infinity());
  EXPECT_EQ(scores[1], 0.0f);
}

// Cells that queries look at stay exact in a layer, however long ago they were written; the others leave.
TEST(Pool, ALayerKeepsWhatItsQueriesLookAt) {
  constexpr int kCells = 200, kDim = 64;
  const WindowSize window{20, 5, 4};
  const CacheShape shape{1, kCells, 1};
  std::vector<uint8_t> memory[2];
  const auto side = [&](Kind kind) {
    const Format format = make_format(kDim, 2);
    auto codecs = std::make_shared<std::vector<HeadCodec>>(1, make_uncalibrated_codec(kind, format));
    memory[int(kind)].resize(CacheSide::memory_bytes(shape, format, window.total()));
    return CacheSide(shape, codecs, window.total(), memory[int(kind)].data());
  };
  CacheSide keys = side(Kind::key), values = side(Kind::value);
  CacheLayer layer(std::move(keys), std::move(values), Window(window, window.total(), kCells));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> query(kDim);
  for (float& x : query) x = normal(random);
  const std::vector<int> looked_at = {0, 31, 64, 65, 130};
  for (int64_t cell = 0; cell < kCells; cell++) {
    const bool matters = std::count(looked_at.begin(), looked_at.end(), cell) > 0;
    std::vector<uint16_t> row(kDim);
    for (int d = 0; d < kDim; d++) row[d] = float_to_half(normal(random) + (matters ? 3 * query[d] : 0));
    for (Kind kind : {Kind::key, Kind::value}) {
      layer.begin_write(kind, {&cell, 1});
      layer.write_row(kind, 0, row.data());
    }
    layer.commit([](int, int64_t) { return true; }, {query.data(), 1, kDim, 1, kDim, kDim, kDim});
    for (int old : looked_at) {
      EXPECT_EQ(layer.exact_row(Kind::key, old) != nullptr, old <= cell) << old << " at " << cell;
    }
  }
  for (int64_t cell = 0; cell < kCells - window.last - window.spare; cell++) {
    const bool matters = std::count(looked_at.begin(), looked_at.end(), cell) > 0;
    EXPECT_EQ(layer.exact_row(Kind::value, cell) != nullptr, matters) << cell;
  }
}

}  // namespace
}  // namespace thimble
