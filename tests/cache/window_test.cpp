// The window: which cells stay exact, for one and for several sequences.
#include "cache/window.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "support/window_vectors.h"

namespace thimble {
namespace {

// A cache as llama.cpp keeps it: cells with a sequence and a position; masks are causal within a sequence.
class Sequences {
public:
  Sequences(WindowSize size, int max_slots, int64_t cells) : window(size, max_slots, cells) {}

  // Writes one token for each given sequence, at the lowest free cells. Without a judge the oldest cells matter most.
  void decode(const std::vector<int>& sequences, const Window::Judge& judge = nullptr) {
    begin(sequences);
    window.commit([&](int row, int64_t cell) { return sees(row, cell); }, judge);
  }
  // Positions of a sequence that its next token finds exact.
  std::set<int> exact_of_next(int sequence) {
    begin({sequence});
    return exact(sequence);
  }
  void take_back(int sequence, int n) {
    remove(sequence, positions_[sequence] - n, positions_[sequence]);
    positions_[sequence] -= n;
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
      if (p < size.pool || p >= length - size.last) positions.insert(p);
    }
    return positions;
  }

  Window window;

private:
  void begin(const std::vector<int>& sequences) {
    batch_.clear();
    for (int s : sequences) {
      int64_t cell = 0;
      while (owner_.count(cell)) cell++;
      owner_[cell] = {s, positions_[s]++};
      batch_.push_back(cell);
    }
    window.begin_batch(batch_);
    EXPECT_GE(window.rows().size(), batch_.size());
    window.settle([&](int row, int64_t cell) { return sees(row, cell); });
  }
  bool sees(int row, int64_t cell) const {
    const auto it = owner_.find(cell);
    const auto& self = owner_.at(batch_[row]);
    return it != owner_.end() && it->second.first == self.first && it->second.second <= self.second;
  }

  std::vector<int64_t> batch_;
  std::map<int64_t, std::pair<int, int>> owner_;
  std::map<int, int> positions_;
};

constexpr WindowSize kSize{10, 4, 0};

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
  constexpr WindowSize kSpare{10, 4, 5};
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

// A new sequence in the cells of the one before: cells that it writes over are not coded first.
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

// When another sequence writes into a removed one's cells, the removed one's other cells leave before an idle
// sequence's.
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

// A sequence whose middle was removed and overwritten by others counts as a sequence again when a batch sees it.
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

// The numbers of cells say nothing: the last cells are those that were written last, wherever they lie.
TEST(Window, OrderOfWritingDecides) {
  const std::vector<int64_t> cells = {90, 3, 91, 2, 50, 1, 99, 0, 60, 4, 30, 31, 7, 6, 5, 80, 20, 10, 98, 40, 41};
  for (bool loaded : {false, true}) {
    Window window(kSize, kSize.total(), 100);
    std::vector<Window::Row> leaving;
    for (size_t i = 0; i < cells.size(); i++) {
      if (loaded && i < 12) {
        EXPECT_GE(window.place(cells[i], leaving), 0);
      } else {
        window.begin_batch({&cells[i], 1});
        window.commit([](int, int64_t) { return true; });
      }
      for (size_t j = 0; j <= i; j++) {
        EXPECT_EQ(window.find(cells[j]) >= 0, j < 4 || j + 10 > i) << "cell " << j << " of " << i;
      }
    }
  }
}

TEST(Window, TheJudgeSaysWhatMattersMost) {
  Sequences s(kSize, kSize.total(), 1000);
  const auto matters = [](int cell) { return cell * 37 % 101; };
  for (int n = 1; n <= 100; n++) {
    s.decode({0}, [&](std::span<const int> batch_rows, std::span<const Window::Row> rows,
                      std::span<const Window::Row> recent, std::span<float> scores) {
      EXPECT_EQ(batch_rows.size(), 1u);
      EXPECT_EQ(recent.size(), size_t(kSize.last));
      for (size_t i = 0; i < rows.size(); i++) scores[i] = float(matters(rows[i].cell));
    });
    std::vector<int> others;
    for (int p = 0; p < n - kSize.last; p++) others.push_back(p);
    std::sort(others.begin(), others.end(), [&](int a, int b) { return matters(a) > matters(b); });
    others.resize(std::min<size_t>(others.size(), kSize.pool));
    std::set<int> expected(others.begin(), others.end());
    for (int p = std::max(0, n - kSize.last); p < n; p++) expected.insert(p);
    EXPECT_EQ(s.exact(0), expected) << n;
  }
}

// After batches of several tokens, drafts among them, a token sees the same cells exactly as if all tokens that stayed
// had come one by one.
TEST(Window, AfterSeveralTokensAtOnceWhatStaysIsAsOneByOne) {
  constexpr WindowSize kSpare{10, 4, 5};
  for (int wrong : {0, 1, 3}) {
    for (int batch = 2; batch <= kSpare.spare; batch++) {
      if (wrong >= batch) continue;
      Sequences together(kSpare, kSpare.slots(), 1000), alone(kSpare, kSpare.slots(), 1000);
      const auto judge = [](std::span<const int> batch_rows, std::span<const Window::Row> rows,
                            std::span<const Window::Row>, std::span<float> scores) {
        EXPECT_EQ(batch_rows.size(), 1u);
        for (size_t i = 0; i < rows.size(); i++) scores[i] = float(rows[i].cell * 37 % 101);
      };
      for (int n = 0; n < 100; n += batch - wrong) {
        together.decode(std::vector<int>(batch, 0), judge);
        for (int i = 0; i < batch - wrong; i++) alone.decode({0}, judge);
        together.take_back(0, wrong);
        // Compares at the next token, which makes cells leave.
        Sequences next = together, next_alone = alone;
        const std::set<int> exact = next.exact_of_next(0), exact_alone = next_alone.exact_of_next(0);
        EXPECT_EQ(exact, exact_alone) << n << " + " << batch << " - " << wrong;
      }
    }
  }
}

// Cells that wait for a draft go on waiting while other sequences decode, and leave or stay as the draft did.
TEST(Window, CellsWaitForTheirOwnSequence) {
  constexpr WindowSize kSpare{10, 4, 5};
  for (bool taken_back : {false, true}) {
    Sequences s(kSpare, 4 * kSpare.slots(), 1000);
    for (int n = 0; n < kSpare.total() - 1; n++) s.decode({0});
    s.decode({0, 0, 0});  // cells leave with the second
    EXPECT_EQ(s.exact(0).size(), size_t(kSpare.total() + 2));
    if (taken_back) s.take_back(0, 2);
    for (int n = 0; n < 3; n++) s.decode({1, 1});
    EXPECT_EQ(s.exact_of_next(0).size(), size_t(taken_back ? kSpare.total() + 1 : kSpare.last + kSpare.pool + 2));
  }
}

// What a token makes leave, tokens behind it attend to from codes; a sequence's first token is no draft.
TEST(Window, StagesBeginBehindATokenThatIsOneTooMany) {
  constexpr WindowSize kSpare{10, 4, 5};
  const auto sees_all = [](int row, int64_t cell) { return cell < 500 || cell - 500 <= row; };
  for (int before : {kSpare.total() - 3, kSpare.total() - 2, kSpare.total() - 1, kSpare.total()}) {
    Window window(kSpare, kSpare.slots(), 1000);
    for (int64_t cell = 0; cell < before; cell++) {
      window.begin_batch({&cell, 1});
      EXPECT_TRUE(window.begin_commit(sees_all).leaving.empty());
      EXPECT_TRUE(window.stages().empty());
      window.end_commit();
    }
    window.begin_batch(std::vector<int64_t>{500, 501, 502});
    window.settle(sees_all);
    const size_t n_left = window.begin_commit(sees_all).leaving.size();
    const int last = kSpare.total() - before;  // the row that cells leave with
    EXPECT_EQ(n_left, last < 3 ? size_t(kSpare.spare + 1) : 0);
    std::vector<int> firsts;
    for (const Window::Stage& stage : window.stages()) firsts.push_back(stage.first);
    EXPECT_EQ(firsts, last < 2 ? (std::vector<int>{0, last + 1}) : std::vector<int>{0});
    size_t n_marked = 0;
    for (const Window::Row& row : window.rows()) n_marked += row.exact_to == last;
    EXPECT_EQ(n_marked, n_left);
    window.end_commit();
    // Those that left with the first token are gone, others wait.
    EXPECT_EQ(window.rows().size(), before + 3 - (last == 0 ? n_left : 0));
    EXPECT_EQ(window.waits(4), last == 1 || last == 2);
  }
}

// An idle sequence gives up its last cells first, and its pool only where that does not make enough room.
TEST(Window, IdleSequencesKeepThePool) {
  Sequences s(kSize, 2 * kSize.total(), 1000);
  for (int n = 0; n < 30; n++) s.decode({0});
  for (int n = 0; n < 30; n++) s.decode({1});
  for (int n = 0; n < 30; n++) s.decode({2});
  EXPECT_EQ(s.exact(2), Sequences::expected(30, kSize));
  EXPECT_EQ(s.exact(1), (std::set<int>{0, 1, 2, 3, 24, 25, 26, 27, 28, 29}));
  EXPECT_EQ(s.exact(0), (std::set<int>{0, 1, 2, 3}));
  for (int n = 0; n < 30; n++) s.decode({3});
  EXPECT_EQ(s.exact(3), Sequences::expected(30, kSize));
  for (int q : {0, 1}) EXPECT_EQ(s.exact(q), (std::set<int>{0, 1, 2, 3})) << q;
}

TEST(Window, MoreSequencesAtOnceThanThereIsRoomForShareIt) {
  Sequences s(kSize, 2 * kSize.total(), 1000);
  for (int n = 1; n <= 30; n++) {
    s.decode({0, 1, 2});
    EXPECT_LE(s.window.rows().size(), size_t(2 * kSize.total()));
    for (int q = 0; q < 3; q++) {
      for (int p : {0, 3, n - 1, n - 5}) {
        if (p < 0 || p >= n) continue;
        EXPECT_TRUE(s.exact(q).count(p)) << q << " " << p << " of " << n;
      }
    }
  }
}

// Two states that are loaded one after the other are two sequences.
TEST(Window, EachStateThatArrivesIsASequence) {
  Window window(kSize, 2 * kSize.total(), 1000);
  std::vector<Window::Row> leaving;
  for (int64_t first : {100, 400}) {
    window.end_arrival();
    for (int64_t cell = first; cell < first + 40; cell++) window.place(cell, leaving);
  }
  EXPECT_EQ(leaving.size(), size_t(2 * (40 - kSize.total())));
  for (int64_t first : {100, 400}) {
    for (int i = 0; i < 40; i++) EXPECT_EQ(window.find(first + i) >= 0, i < 4 || i >= 30) << first + i;
  }
}

TEST(Window, SlotsOfAStream) {
  const WindowSize size{128, 40, 16};
  EXPECT_EQ(Window::slots_of_stream(size, 4096, 1), 4 * 200);
  EXPECT_EQ(Window::slots_of_stream(size, 65536, 1), 64 * 200);
  EXPECT_EQ(Window::slots_of_stream(size, 1024, 64), 200);
  EXPECT_EQ(Window::slots_of_stream(size, 256, 1), 256);
  EXPECT_EQ(Window::slots_of_stream({0, 0, 0}, 4096, 1), 0);
}

TEST(Window, ActiveSequencesWinOverIdleOnes) {
  Sequences s(kSize, kSize.total(), 1000);  // room for one
  for (int n = 0; n < 30; n++) s.decode({0});
  for (int n = 0; n < 30; n++) s.decode({1});
  EXPECT_EQ(s.exact(1), Sequences::expected(30, kSize));
  EXPECT_TRUE(s.exact(0).empty());
}

TEST(Window, NoWindowKeepsOnlyTheBatch) {
  Window window({0, 0, 0}, 0, 100);
  window.begin_batch(std::vector<int64_t>{1, 2, 3});
  EXPECT_EQ(window.rows().size(), 3u);
  const Window::Changes changes = window.commit([](int, int64_t) { return true; });
  EXPECT_TRUE(changes.moves.empty());
  EXPECT_EQ(changes.leaving.size(), 3u);
  EXPECT_TRUE(window.rows().empty());
  std::vector<Window::Row> leaving;
  EXPECT_EQ(window.place(1, leaving), -1);
  EXPECT_TRUE(leaving.empty());
}

TEST(Window, RewrittenCellsAreForgotten) {
  Sequences s(kSize, kSize.total(), 1000);
  for (int n = 0; n < 10; n++) s.decode({0});
  ASSERT_GE(s.window.find(3), 0);
  s.window.begin_batch(std::vector<int64_t>{3});
  EXPECT_EQ(s.window.find(3), -1);
}

// A stream that needs slots takes those of its own removed sequences, not those of a stream that has been idle for
// longer.
TEST(Window, StreamsRecycleTheirOwnSlots) {
  Window window({4, 1, 0}, 10, 100, 2);
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
  std::vector<Window::Row> leaving;
  for (int64_t cell = 40; cell < 49; cell++) window.place(cell, leaving);  // a loaded state
  for (int64_t cell : {100, 101, 102, 103, 104}) EXPECT_GE(window.find(cell), 0) << cell;
}

// 64 chats of a thousand tokens take turns in one unified cache: each has the same exact cells as alone.
TEST(Window, ManyIdleSequencesKeepAllTheirs) {
  const WindowSize size;
  constexpr int64_t kCells = 65536;
  Window window(size, Window::slots_of_stream(size, kCells, 1), kCells);
  const auto write = [&](int chat, int first, int n) {
    std::vector<int64_t> cells;
    for (int i = first; i < first + n; i++) cells.push_back(int64_t(i) * 64 + chat);
    window.begin_batch(cells);
    window.commit([&](int row, int64_t cell) { return cell % 64 == chat && cell <= cells[row]; });
  };
  for (int round = 0; round < 3; round++) {
    for (int chat = 0; chat < 64; chat++) write(chat, round * 300, 300);
  }
  for (int chat = 0; chat < 64; chat++) {
    for (int i = 0; i < 900; i++) {
      EXPECT_EQ(window.find(int64_t(i) * 64 + chat) >= 0, i < size.pool || i >= 900 - size.last) << chat << " " << i;
    }
  }
}

// The scripts that every implementation is held to.
TEST(Window, Vectors) {
  const std::vector<WindowScript> scripts = read_window_scripts(THIMBLE_TEST_DATA "/window_vectors.txt");
  ASSERT_EQ(scripts.size(), 18u);
  for (const WindowScript& script : scripts) {
    Window window(script.size, script.slots * script.n_streams, script.cells_per_stream, script.n_streams);
    WindowOwners owners;
    const auto judge = [&](std::span<const int>, std::span<const Window::Row> rows, std::span<const Window::Row>,
                           std::span<float> scores) {
      for (size_t i = 0; i < rows.size(); i++) scores[i] = float(owners.importance(rows[i].cell));
    };
    int n_writes = 0;
    for (const WindowScript::Step& step : script.steps) {
      const std::vector<int64_t> cells = owners.take(step);
      if (step.what == WindowScript::Step::remove) continue;
      if (step.what == WindowScript::Step::arrive) {
        std::vector<Window::Row> leaving;
        window.end_arrival();
        for (int64_t cell : cells) window.place(cell, leaving);
        continue;
      }
      const auto sees = [&](int row, int64_t cell) { return owners.sees(cells[row], cell); };
      window.begin_batch(cells);
      window.settle(sees);
      std::vector<int64_t> exact;
      for (const Window::Row& row : window.rows()) exact.push_back(row.cell);
      ASSERT_EQ(exact, step.exact) << script.name << ", batch " << n_writes;
      window.commit(sees, judge);
      n_writes++;
    }
    EXPECT_GT(n_writes, 5);
  }
}

}  // namespace
}  // namespace thimble
