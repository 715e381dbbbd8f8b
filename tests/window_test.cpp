// The window's books: which cells stay exact, for one and for several sequences.
#include "cache/window.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

namespace thimble {
namespace {

// A cache as llama.cpp keeps it: cells with a sequence and a position; masks are causal within a sequence.
class Sequences {
public:
  Sequences(WindowSize size, int max_slots, int64_t cells) : window(size, max_slots, cells) {}

  // Writes one token for each given sequence, at the lowest free cells.
  void decode(const std::vector<int>& sequences) {
    std::vector<int64_t> batch;
    for (int s : sequences) {
      int64_t cell = 0;
      while (owner_.count(cell)) cell++;
      owner_[cell] = {s, positions_[s]++};
      batch.push_back(cell);
    }
    window.begin_batch(batch);
    EXPECT_GE(window.rows().size(), batch.size());
    window.commit([&](int row, int64_t cell) {
      const auto it = owner_.find(cell);
      const auto& self = owner_.at(batch[row]);
      return it != owner_.end() && it->second.first == self.first && it->second.second <= self.second;
    });
  }
  void remove(int sequence) {
    std::erase_if(owner_, [&](const auto& e) { return e.second.first == sequence; });
    positions_[sequence] = 0;
  }
  void remove(int sequence, int from, int to) {
    std::erase_if(owner_, [&](const auto& e) {
      return e.second.first == sequence && e.second.second >= from && e.second.second < to;
    });
  }
  // Positions of a sequence that are exact.
  std::set<int> exact(int sequence) const {
    std::set<int> positions;
    for (const auto& row : window.rows()) {
      const auto it = owner_.find(row.cell);
      if (it != owner_.end() && it->second.first == sequence) positions.insert(it->second.second);
    }
    return positions;
  }
  static std::set<int> expected(int length, WindowSize size) {
    std::set<int> positions;
    for (int p = 0; p < length; p++) {
      if (p < size.first || p >= length - size.last) positions.insert(p);
    }
    return positions;
  }

  Window window;

private:
  std::map<int64_t, std::pair<int, int>> owner_;
  std::map<int, int> positions_;
};

constexpr WindowSize kSize{4, 10};

TEST(Window, KeepsFirstAndLastOfOneSequence) {
  Sequences s(kSize, kSize.total(), 1000);
  for (int n = 1; n <= 100; n++) {
    s.decode({0});
    EXPECT_EQ(s.exact(0), Sequences::expected(n, kSize)) << n;
  }
}

TEST(Window, BatchesOfAnySizeLeaveTheSameWindow) {
  for (int batch : {2, 3, 7, 20, 50}) {
    Sequences s(kSize, kSize.total(), 1000);
    for (int n = 0; n < 100; n += batch) {
      s.decode(std::vector<int>(batch, 0));
      EXPECT_EQ(s.exact(0), Sequences::expected(n + batch, kSize)) << batch;
    }
  }
}

TEST(Window, SpareCellsLeaveTogether) {
  constexpr WindowSize kSpare{4, 10, 5};
  Sequences s(kSpare, kSpare.total(), 1000);
  size_t most = 0;
  int departures = 0;
  for (int n = 1; n <= 100; n++) {
    const size_t before = s.exact(0).size();
    s.decode({0});
    const std::set<int> exact = s.exact(0), least = Sequences::expected(n, kSize);
    EXPECT_TRUE(std::includes(exact.begin(), exact.end(), least.begin(), least.end())) << n;
    most = std::max(most, exact.size());
    departures += exact.size() < before;
  }
  EXPECT_EQ(most, size_t(kSpare.total()));
  EXPECT_EQ(departures, 1 + (100 - kSpare.total() - 1) / (kSpare.spare + 1));
  s.remove(0);
  for (int n = 1; n <= 30; n++) {
    s.decode({1});
    const std::set<int> exact = s.exact(1), least = Sequences::expected(n, kSize);
    EXPECT_TRUE(std::includes(exact.begin(), exact.end(), least.begin(), least.end())) << n;
    EXPECT_LE(s.window.rows().size(), size_t(kSpare.total()));
  }
}

TEST(Window, EverySequenceHasItsOwn) {
  Sequences s(kSize, 4 * kSize.total(), 1000);
  for (int n = 1; n <= 60; n++) {
    s.decode({0, 1, 2, 3});
    for (int q = 0; q < 4; q++) EXPECT_EQ(s.exact(q), Sequences::expected(n, kSize)) << n;
  }
  for (int n = 61; n <= 90; n++) s.decode({2});  // the others' stay while one goes on
  EXPECT_EQ(s.exact(2), Sequences::expected(90, kSize));
  EXPECT_EQ(s.exact(1), Sequences::expected(60, kSize));
}

TEST(Window, CellsOfRemovedSequencesGiveWay) {
  Sequences s(kSize, kSize.total(), 1000);
  for (int round = 0; round < 5; round++) {
    for (int n = 1; n <= 40; n++) s.decode({round});
    EXPECT_EQ(s.exact(round), Sequences::expected(40, kSize)) << round;
    s.remove(round);
  }
}

// A new conversation in the place of the last: what it writes over is not coded first.
TEST(Window, WhatIsWrittenOverNeverLeaves) {
  Window window(kSize, kSize.total(), 1000);
  const auto write = [&](int64_t cell) {
    window.begin_batch({&cell, 1});
    return window.commit([&](int, int64_t other) { return other <= cell; }).leaving.size();
  };
  for (int64_t cell = 0; cell < kSize.total(); cell++) EXPECT_EQ(write(cell), 0u);
  for (int64_t cell = 0; cell < kSize.total(); cell++) EXPECT_EQ(write(cell), 0u) << cell;
  EXPECT_EQ(write(kSize.total()), 1u);
}

// What a removed sequence has left goes before an idle one's window, once another takes over its cells.
TEST(Window, LeftoversOfRemovedSequencesGoFirst) {
  Sequences s(kSize, 2 * kSize.total(), 1000);
  for (int n = 0; n < 30; n++) s.decode({0});
  for (int round = 1; round <= 8; round++) {
    for (int n = 0; n < 40 - 2 * round; n++) s.decode({round});  // does not reach the end of the one before
    EXPECT_EQ(s.exact(0), Sequences::expected(30, kSize)) << round;
    EXPECT_EQ(s.exact(round), Sequences::expected(40 - 2 * round, kSize)) << round;
    s.remove(round);
  }
}

// A sequence whose middle is removed while others write there lives on, as soon as it is seen again.
TEST(Window, ASequenceThatGaveCellsAwayKeepsItsWindow) {
  Sequences s(kSize, 2 * kSize.total(), 1000);
  for (int n = 0; n < 30; n++) s.decode({0});
  s.remove(0, 24, 28);
  for (int n = 0; n < 6; n++) s.decode({0, 1});
  EXPECT_EQ(s.exact(1).size(), 6u);
  std::set<int> window = s.exact(0);
  EXPECT_EQ(window.size(), size_t(kSize.total()));
  for (int p : {0, 1, 2, 3, 22, 23, 28, 29, 30, 35}) EXPECT_TRUE(window.count(p)) << p;
}

// Only which cells are exact and which is the newest decides what stays: not the order in which they came.
TEST(Window, NoHistoryDecides) {
  const auto sees_all = [](int, int64_t) { return true; };
  Window written(kSize, kSize.total(), 100), loaded(kSize, kSize.total(), 100);
  for (int64_t cell : {90, 91, 92, 93, 94, 95, 96, 20, 21, 22, 23}) {
    written.begin_batch({&cell, 1});
    written.commit(sees_all);
  }
  int64_t leaving;
  for (int64_t cell : {20, 21, 22, 23, 90, 91, 92, 93, 94, 95, 96}) loaded.place(cell, &leaving);
  for (int64_t cell = 24; cell < 50; cell++) {
    std::set<int64_t> exact[2];
    for (Window* window : {&written, &loaded}) {
      window->begin_batch({&cell, 1});
      window->commit(sees_all);
      for (const auto& row : window->rows()) exact[window == &loaded].insert(row.cell);
    }
    EXPECT_EQ(exact[0], exact[1]) << cell;
    EXPECT_TRUE(exact[0].count(20)) << "of " << kSize.last << " behind " << cell;
    if (cell == 29) break;  // from here on 20 is too old
  }
}

TEST(Window, ActiveSequencesWinOverIdleOnes) {
  Sequences s(kSize, kSize.total(), 1000);  // room for one
  for (int n = 0; n < 30; n++) s.decode({0});
  for (int n = 0; n < 30; n++) s.decode({1});
  EXPECT_EQ(s.exact(1), Sequences::expected(30, kSize));
  EXPECT_TRUE(s.exact(0).empty());
}

TEST(Window, NoWindowKeepsOnlyTheBatch) {
  Window window({0, 0}, 0, 100);
  window.begin_batch(std::vector<int64_t>{1, 2, 3});
  EXPECT_EQ(window.rows().size(), 3u);
  const Window::Changes changes = window.commit([](int, int64_t) { return true; });
  EXPECT_TRUE(changes.moves.empty());
  EXPECT_EQ(changes.leaving.size(), 3u);
  EXPECT_TRUE(window.rows().empty());
  int64_t leaving;
  EXPECT_EQ(window.place(1, &leaving), -1);
  EXPECT_EQ(leaving, -1);
}

TEST(Window, RewrittenCellsAreForgotten) {
  Sequences s(kSize, kSize.total(), 1000);
  for (int n = 0; n < 10; n++) s.decode({0});
  ASSERT_GE(s.window.find(3), 0);
  s.window.begin_batch(std::vector<int64_t>{3});
  EXPECT_EQ(s.window.find(3), -1);
}

// What a removed sequence left in its stream goes before the window of a stream that has been idle for longer.
TEST(Window, StreamsRecycleTheirOwnSlots) {
  Window window({1, 4}, 10, 100, 2);
  const auto write = [&](int64_t first, int n) {
    for (int64_t cell = first; cell < first + n; cell++) {
      window.begin_batch({&cell, 1});
      window.commit([&](int, int64_t other) { return other >= first && other <= cell; });
    }
  };
  write(100, 5);
  write(0, 9);
  write(20, 9);  // of another sequence: sees none of the first nine
  for (int64_t cell : {100, 101, 102, 103, 104, 20, 25, 26, 27, 28}) EXPECT_GE(window.find(cell), 0) << cell;
  int64_t leaving;
  for (int64_t cell = 40; cell < 49; cell++) window.place(cell, &leaving);  // a loaded state
  for (int64_t cell : {100, 101, 102, 103, 104}) EXPECT_GE(window.find(cell), 0) << cell;
}

}  // namespace
}  // namespace thimble
