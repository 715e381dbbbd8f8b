// A layer's cache: rows in and out, saved states, stream copies.
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "cache/state_row.h"
#include "codec/half.h"

namespace thimble {
namespace {

struct TestLayer {
  explicit TestLayer(double bits, int n_streams = 1, int64_t cells = 100, WindowSize window = {6, 2, 0},
                     bool with_store = false, size_t store_bytes = SIZE_MAX) {
    const CacheShape shape{2, cells, n_streams};
    const int n_slots = window.total() * n_streams;
    const auto make = [&](Kind kind, std::vector<uint8_t>& memory) {
      const Format format = make_format(64, bits);
      auto codecs = std::make_shared<std::vector<HeadCodec>>(2, make_uncalibrated_codec(kind, format));
      memory.resize(CacheSide::memory_bytes(shape, format, with_store ? 0 : n_slots));
      if (with_store)
        return CacheSide(shape, codecs, 0, memory.data(), ExactStore::ram(shape.n_cells(), 128, store_bytes));
      return CacheSide(shape, codecs, n_slots, memory.data());
    };
    CacheSide k = make(Kind::key, k_memory), v = make(Kind::value, v_memory);
    layer = std::make_unique<CacheLayer>(std::move(k), std::move(v), Window(window, n_slots, cells, n_streams));
  }
  // Writes cells [0, n) of a stream, one at a time.
  void fill(int n, int stream = 0, unsigned seed = 1) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const int64_t base = stream * layer->keys().shape().cells_per_stream;
    for (int i = 0; i < n; i++) {
      const int64_t cell = base + i;
      for (Kind kind : {Kind::key, Kind::value}) {
        layer->begin_write(kind, {&cell, 1});
        std::vector<uint16_t> row(layer->side(kind).row_size());
        for (auto& h : row) h = float_to_half(normal(random));
        layer->write_row(kind, 0, row.data());
      }
      layer->commit([&](int, int64_t other) { return other >= base && other <= cell; });
    }
  }
  std::vector<uint8_t> save(int first, int n, uint64_t hash = 42) const {
    const std::vector<uint64_t> hashes(2, hash);
    std::vector<uint8_t> state;
    for (Kind kind : {Kind::key, Kind::value}) {
      const size_t bytes = size_t(layer->side(kind).row_size()) * 2;
      for (int i = 0; i < n; i++) {
        state.resize(state.size() + bytes);
        save_cell(*layer, kind, first + i, hashes, state.data() + state.size() - bytes);
      }
    }
    return state;
  }
  void load(const std::vector<uint8_t>& state, int first, int n, uint64_t hash = 42) {
    const std::vector<uint64_t> hashes(2, hash);
    const uint8_t* at = state.data();
    for (Kind kind : {Kind::key, Kind::value}) {
      for (int i = 0; i < n; i++, at += layer->side(kind).row_size() * 2)
        load_cell(*layer, kind, first + i, hashes, at);
    }
  }
  std::vector<uint8_t> k_memory, v_memory;
  std::unique_ptr<CacheLayer> layer;
};

TEST(State, SaveLoadSaveGivesTheSameBytes) {
  for (double bits : {16.0, 4.0, 2.0, 1.0}) {
    for (int n : {3, 8, 9, 50, 100}) {
      TestLayer a(bits), b(bits), c(bits);
      a.fill(n);
      const auto state = a.save(0, n);
      b.load(state, 0, n);
      EXPECT_EQ(b.save(0, n), state) << bits << " " << n;
      if (n <= 50) {  // elsewhere in the cache too
        c.load(state, 37, n);
        EXPECT_EQ(c.save(37, n), state) << bits << " " << n;
      }
    }
  }
}

TEST(State, LoadedAndOriginalGoOnAlike) {
  TestLayer a(2), b(2);
  a.fill(50);
  b.load(a.save(0, 50), 0, 50);
  for (TestLayer* t : {&a, &b}) {
    for (int64_t cell = 50; cell < 60; cell++) {
      for (Kind kind : {Kind::key, Kind::value}) {
        t->layer->begin_write(kind, {&cell, 1});
        t->layer->write_row(kind, 0, std::vector<uint16_t>(128, uint16_t(0x3c00 + cell)).data());
      }
      t->layer->commit([&](int, int64_t other) { return other <= cell; });
    }
  }
  EXPECT_EQ(a.save(0, 60), b.save(0, 60));
}

TEST(State, RefusesCodesOfOtherSettings) {
  TestLayer a(2), b(2), c(4), plain(16);
  a.fill(50);
  EXPECT_THROW(b.load(a.save(0, 50, 41), 0, 50), std::runtime_error);
  EXPECT_THROW(plain.load(a.save(0, 50), 0, 50), std::runtime_error);
  plain.fill(50);
  EXPECT_NO_THROW(c.load(plain.save(0, 50), 0, 50));  // a plain f16 state is welcome
}

// llama.cpp joins the rows of devices that share the heads, and cuts a row at heads: here, a row's first head is as it
// was saved and the second is another's. Each is taken for itself.
TEST(State, HeadsOfARowStandForThemselves) {
  constexpr size_t kHead = 128;  // bytes of a head of 64 numbers as f16
  const std::vector<uint64_t> hashes(2, 42), others{42, 43};
  TestLayer coded(2), exact(2), loaded(2);
  coded.fill(50, 0, 1);
  exact.fill(50, 0, 2);
  constexpr int kCoded = 20, kExact = 49;
  ASSERT_LT(coded.layer->window().find(kCoded), 0);
  ASSERT_GE(exact.layer->window().find(kExact), 0);
  for (Kind kind : {Kind::key, Kind::value}) {
    std::vector<uint8_t> a(2 * kHead), b(2 * kHead), again(2 * kHead);
    save_cell(*coded.layer, kind, kCoded, hashes, a.data());
    save_cell(*coded.layer, kind, kCoded + 1, hashes, b.data());
    std::copy_n(&b[kHead], kHead, &a[kHead]);
    load_cell(*loaded.layer, kind, 3, hashes, a.data());  // codes of both heads
    save_cell(*loaded.layer, kind, 3, hashes, again.data());
    EXPECT_EQ(again, a);
    EXPECT_THROW(load_cell(*loaded.layer, kind, 4, others, a.data()), std::runtime_error);  // of one the hash is wrong

    save_cell(*exact.layer, kind, kExact, hashes, b.data());
    std::copy_n(&b[kHead], kHead, &a[kHead]);
    load_cell(*loaded.layer, kind, 5, hashes, a.data());  // codes of one head, the row of the other
    const uint16_t* row = loaded.layer->exact_row(kind, 5);
    ASSERT_TRUE(row);
    std::vector<float> decoded(128);
    coded.layer->side(kind).decode_row(kCoded, decoded.data());
    for (int d = 0; d < 64; d++) {
      EXPECT_EQ(row[d], float_to_half(decoded[d]));
      EXPECT_EQ(row[64 + d], exact.layer->exact_row(kind, kExact)[64 + d]);
    }
  }
}

TEST(State, FitsItsRow) {
  EXPECT_TRUE(state_row_fits(make_format(64, 4)));
  EXPECT_TRUE(state_row_fits(make_format(16, 4)));
  EXPECT_FALSE(state_row_fits(make_format(8, 4)));
  EXPECT_TRUE(state_row_fits(make_format(8, 16)));
}

TEST(Streams, CopyTakesCodesAndWindow) {
  TestLayer a(2, 3);
  a.fill(60, 1, 7);
  a.fill(20, 2, 8);
  a.layer->copy_stream(Kind::key, 1, 2);
  a.layer->copy_stream(Kind::value, 1, 2);
  EXPECT_EQ(a.save(100, 60), a.save(200, 60));
  const auto before = a.save(100, 60);
  a.fill(5, 2, 9);
  EXPECT_EQ(a.save(100, 60), before);
}

// The state of the cells that `fill` wrote.
std::vector<uint8_t> written(int n, unsigned seed = 1) {
  TestLayer plain(16);
  plain.fill(n, 0, seed);
  return plain.save(0, n);
}

TEST(Store, StatesAreTheRowsAsWritten) {
  for (double bits : {4.0, 2.0, 1.0}) {
    TestLayer a(bits, 1, 100, {6, 2, 0}, true), b(bits, 1, 100, {6, 2, 0}, true), without(bits);
    a.fill(50);
    const auto state = a.save(0, 50);
    EXPECT_EQ(state, written(50));
    b.load(state, 37, 50);
    EXPECT_EQ(b.save(37, 50), state);
    // The codes are those of the same rows, too.
    b.load(state, 0, 50);
    EXPECT_EQ(b.k_memory, [&] {
      TestLayer again(bits, 1, 100, {6, 2, 0}, true);
      again.load(state, 37, 50);
      again.load(state, 0, 50);
      return again.k_memory;
    }());
    without.load(state, 0, 50);  // a state from a store loads where there is none
    std::vector<float> x(128), y(128);
    for (int cell = 0; cell < 50; cell++) {
      if (a.layer->window().find(cell) >= 0 || without.layer->window().find(cell) >= 0) continue;
      for (Kind kind : {Kind::key, Kind::value}) {
        a.layer->side(kind).decode_row(cell, x.data());
        without.layer->side(kind).decode_row(cell, y.data());
        EXPECT_EQ(x, y) << cell;
      }
    }
  }
}

TEST(Store, StatesOfCodesLoadAsWhatTheyStandFor) {
  TestLayer a(2), b(2, 1, 100, {6, 2, 0}, true);
  a.fill(50);
  b.load(a.save(0, 50), 0, 50);
  std::vector<float> row(128);
  for (int cell : {0, 20, 49}) {
    const bool in_window = a.layer->window().find(cell) >= 0;
    a.layer->keys().decode_row(cell, row.data());
    for (int d = 0; d < 128; d++) {
      const uint16_t expected = in_window ? a.layer->exact_row(Kind::key, cell)[d] : float_to_half(row[d]);
      EXPECT_EQ(b.layer->exact_row(Kind::key, cell)[d], expected) << cell << " " << d;
    }
  }
}

TEST(Store, CopyTakesRowsCodesAndWindow) {
  TestLayer a(2, 3, 100, {6, 2, 0}, true);
  a.fill(60, 1, 7);
  a.fill(20, 2, 8);
  for (Kind kind : {Kind::key, Kind::value}) a.layer->copy_stream(kind, 1, 2);
  EXPECT_EQ(a.save(200, 60), written(60, 7));
  for (const int64_t cell : {0, 1, 54, 59}) EXPECT_GE(a.layer->window().find(200 + cell), 0) << cell;
  EXPECT_LT(a.layer->window().find(230), 0);
  std::vector<float> x(128), y(128);
  a.layer->keys().decode_row(130, x.data());
  a.layer->keys().decode_row(230, y.data());
  EXPECT_EQ(x, y);
  a.fill(5, 2, 9);
  EXPECT_EQ(a.save(100, 60), written(60, 7));
}

TEST(Store, OverwrittenAndClearedCells) {
  TestLayer a(2, 1, 100, {6, 2, 0}, true);
  a.fill(50, 0, 1);
  a.fill(30, 0, 2);
  EXPECT_EQ(a.save(0, 30), written(30, 2));
  a.layer->clear();
  EXPECT_EQ(a.layer->exact_row(Kind::key, 3), nullptr);
  EXPECT_EQ(a.layer->keys().store()->reserved_bytes(), 0u);
  a.fill(10, 0, 3);
  EXPECT_EQ(a.save(0, 10), written(10, 3));
}

// Cells that a full store has no room for are exact while they are in the window; then they are coded, and are saved
// and loaded as codes.
TEST(Store, AFullOneLeavesCellsTheirCodes) {
  TestLayer full(2, 1, 100, {6, 2, 0}, true, 0), plain(2, 1, 100, {6, 2, 0});
  full.fill(50);
  plain.fill(50);
  EXPECT_TRUE(full.layer->keys().store()->is_full());
  EXPECT_EQ(full.layer->keys().store()->reserved_bytes(), 0u);
  int n_exact = 0;
  for (int cell = 0; cell < 50; cell++) {
    const bool in_window = full.layer->window().find(cell) >= 0;
    EXPECT_EQ(full.layer->exact_row(Kind::value, cell) != nullptr, in_window) << cell;
    n_exact += in_window;
  }
  EXPECT_EQ(n_exact, 8);
  EXPECT_EQ(full.save(0, 50), plain.save(0, 50));

  TestLayer loaded(2, 1, 100, {6, 2, 0}, true, 0);
  loaded.load(full.save(0, 50), 0, 50);
  EXPECT_EQ(loaded.save(0, 50), plain.save(0, 50));
  loaded.layer->clear();
  EXPECT_FALSE(loaded.layer->keys().store()->is_full());

  TestLayer streams(2, 2, 100, {6, 2, 0}, true, 0);
  streams.fill(50);
  for (Kind kind : {Kind::key, Kind::value}) streams.layer->copy_stream(kind, 0, 1);
  EXPECT_EQ(streams.save(100, 50), plain.save(0, 50));
  EXPECT_EQ(streams.save(0, 50), plain.save(0, 50));
}

TEST(Layer, ABatchThatNothingAttendedToIsCoded) {
  TestLayer a(2), b(2);
  a.fill(20);
  b.fill(12);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (int i = 0; i < 20; i++) {
    const int64_t cell = i;
    for (Kind kind : {Kind::key, Kind::value}) {
      std::vector<uint16_t> row(b.layer->side(kind).row_size());
      for (auto& h : row) h = float_to_half(normal(random));
      if (i < 12) continue;
      b.layer->begin_write(kind, {&cell, 1});
      b.layer->write_row(kind, 0, row.data());
    }
  }
  const int64_t next = 50;
  b.layer->begin_write(Kind::key, {&next, 1});
  std::vector<float> x(128), y(128);
  for (int cell = 12; cell < 14; cell++) {  // those that left the window of the other, too
    for (Kind kind : {Kind::key, Kind::value}) {
      a.layer->side(kind).decode_row(cell, x.data());
      b.layer->side(kind).decode_row(cell, y.data());
      EXPECT_EQ(x, y) << cell;
      EXPECT_NE(x, std::vector<float>(128, 0.0f));
    }
  }
}

TEST(Layer, KeysAndValuesInEitherOrderMakeOneBatch) {
  TestLayer a(2), b(2);
  const int64_t cells[2] = {0, 1};
  const std::vector<uint16_t> row(128, 0x3c00);
  for (auto [t, first, second] : {std::tuple{&a, Kind::key, Kind::value}, {&b, Kind::value, Kind::key}}) {
    for (Kind kind : {first, second}) {
      t->layer->begin_write(kind, cells);
      for (int r : {0, 1}) t->layer->write_row(kind, r, row.data());
    }
    EXPECT_EQ(t->layer->window().rows().size(), 2u);
    t->layer->commit([](int, int64_t) { return true; });
  }
  EXPECT_EQ(a.save(0, 2), b.save(0, 2));
}

}  // namespace
}  // namespace thimble
