// Chats that take turns in one cache, as llama-server's do: each is saved and cleared when another begins, and comes
// back into other cells. Which of a chat's cells are exact, and what each holds, must be as if it had never been away.
// The numbers in rows and codes here name the token that they are of.
#define THIMBLE_SIMT_HOST
#include <gtest/gtest.h>

#include <cstring>
#include <map>

#include "cuda/state/saved_orders.h"
#include "test_window.h"

namespace thimble::cuda {
namespace {

constexpr WindowSize kWindow{16, 5, 2};
constexpr int kSlots = 4 * (16 + 5 + 2 * 2), kNothing = -1;
constexpr size_t kRowBytes = 16;

/// A stream that chats share, with one layer whose rows and codes are tokens' numbers.
class Cache {
public:
  explicit Cache(int n_cells)
      : window_(kWindow, kSlots, n_cells, 1), owner_(n_cells, kNothing), position_(n_cells), codes_(n_cells, kNothing) {
    rows_.resize(window_.a.capacity, kNothing);
  }
  Cache(const Cache&) = delete;

  struct State {
    std::vector<int> tokens, positions;
    std::vector<bool> exact;
  };

  /// As llama.cpp looks for them: from where it left off, or from the beginning where little is used.
  std::vector<int64_t> free_cells(int n) {
    const int used = int(owner_.size() - std::count(owner_.begin(), owner_.end(), kNothing));
    if (next_ > used + 2 * n) next_ = 0;
    std::vector<int64_t> cells;
    for (; int(cells.size()) < n; next_ = (next_ + 1) % int(owner_.size())) {
      if (owner_[next_] == kNothing) cells.push_back(next_);
    }
    return cells;
  }

  /// A batch of a chat's next tokens; token p of chat c is the number 1000 * c + p.
  void append(int chat, int n) {
    const std::vector<int64_t> cells = free_cells(n);
    const int first = length(chat);
    for (int i = 0; i < n; i++) set(cells[i], chat, first + i);
    std::vector<uint16_t> mask;
    for (int i = 0; i < n; i++) {
      for (size_t cell = 0; cell < owner_.size(); cell++) {
        mask.push_back(owner_[cell] == chat && position_[cell] <= first + i ? 0 : 0xfc00);
      }
    }
    window_.update(cells, mask);
    code_leaving();
    for (int i = 0; i < n; i++) {
      if (n > kMaxTokens) codes_[cells[i]] = 1000 * chat + first + i;
      if (window_.token_slots[i] >= 0) rows_[window_.token_slots[i]] = 1000 * chat + first + i;
    }
  }

  State save(int chat) {
    finish();
    const HostWindow host = window_.read();
    State state;
    for (size_t cell = 0; cell < owner_.size();) {
      const size_t first = cell;
      std::vector<uint8_t> rows;
      for (; cell < owner_.size() && owner_[cell] == chat; cell++) {
        state.exact.push_back(host.slot_of(int64_t(cell)) >= 0);
        state.tokens.push_back(token(cell));
        state.positions.push_back(position_[cell]);
        append_row(rows, state.tokens.back());
      }
      if (cell > first) orders_.save(host, int64_t(first), int64_t(cell - first), rows.data(), kRowBytes);
      cell += cell == first;
    }
    orders_.end();
    return state;
  }
  void clear(int chat) { std::replace(owner_.begin(), owner_.end(), chat, kNothing); }

  void load(int chat, const State& state) {
    const std::vector<int64_t> cells = free_cells(int(state.tokens.size()));
    std::vector<uint8_t> rows;
    for (int token : state.tokens) append_row(rows, token);
    finish();
    HostWindow host = window_.read();
    const auto leaving = host.place(cells, state.exact, orders_.find(state.exact, rows.data(), kRowBytes));
    for (size_t i = 0; i < leaving.cells.size(); i++) codes_[leaving.cells[i]] = rows_[leaving.slots[i]];
    for (size_t i = 0; i < cells.size(); i++) {
      set(cells[i], chat, state.positions[i]);
      const int slot = host.slot_of(cells[i]);
      ASSERT_TRUE(state.exact[i] || slot < 0);
      (slot >= 0 ? rows_[slot] : codes_[cells[i]]) = state.tokens[i];
    }
    window_.write(host);
  }

  /// The positions of a chat's exact cells, in order, with the last batch behind it. All of its cells hold what was
  /// written of them.
  std::vector<int> exact(int chat) {
    finish();
    const HostWindow finished = window_.read();
    std::vector<int> positions;
    for (size_t cell = 0; cell < owner_.size(); cell++) {
      if (owner_[cell] != chat) continue;
      EXPECT_EQ(token(cell), 1000 * chat + position_[cell]) << "cell " << cell;
      if (finished.slot_of(int64_t(cell)) >= 0) positions.push_back(position_[cell]);
    }
    std::sort(positions.begin(), positions.end());
    return positions;
  }

private:
  void finish() {
    window_.finish();
    code_leaving();
  }
  void code_leaving() {
    for (int i = 0; i < window_.n_left(); i++) codes_[window_.leaving_cells[i]] = rows_[window_.leaving_slots[i]];
  }
  void set(int64_t cell, int chat, int position) {
    owner_[cell] = chat;
    position_[cell] = position;
  }
  int length(int chat) const { return int(std::count(owner_.begin(), owner_.end(), chat)); }
  int token(size_t cell) const {
    const int slot = window_.read().slot_of(int64_t(cell));
    return slot >= 0 ? rows_[slot] : codes_[cell];
  }
  static void append_row(std::vector<uint8_t>& rows, int token) {
    rows.resize(rows.size() + kRowBytes);
    std::memcpy(&rows[rows.size() - kRowBytes], &token, sizeof(token));
  }

  TestWindow window_;
  SavedOrders orders_;
  std::vector<int> owner_, position_;  // by cell
  std::vector<int> rows_, codes_;      // by slot; by cell
  int next_ = 0;
};

/// Chats of unequal lengths, `n_turns` more batches of `n` each. `check` gets what is exact of a chat, and what would
/// be.
void take_turns(int n_turns, int n) {
  Cache shared(320);
  std::map<int, Cache> alone;
  std::map<int, Cache::State> away;
  for (int chat : {1, 2}) {
    alone.try_emplace(chat, 320);
    if (chat == 2) {
      away[1] = shared.save(1);
      shared.clear(1);
    }
    shared.append(chat, 50 + chat);
    alone.at(chat).append(chat, 50 + chat);
  }
  for (int turn = 0; turn < n_turns; turn++) {
    for (int chat : {1, 2}) {
      shared.load(chat, away[chat]);
      away[3 - chat] = shared.save(3 - chat);
      shared.clear(3 - chat);
      shared.append(chat, n);
      alone.at(chat).append(chat, n);
      ASSERT_EQ(shared.exact(chat), alone.at(chat).exact(chat)) << "turn " << turn << " of chat " << chat;
    }
  }
}

TEST(CudaTurns, OfPrompts) {
  take_turns(8, 11);
}

TEST(CudaTurns, OfSingleTokens) {
  take_turns(24, 1);
}

// What was not saved here comes back in the order of its cells.
TEST(CudaTurns, OrdersAreOfStatesThatWereSaved) {
  SavedOrders orders;
  HostWindow window;
  window.cells_per_stream = 64;
  window.capacity = 3;
  window.cells = {5, 9, 1};
  window.order = {30, 10, 20};
  window.list_hidden(2);
  std::vector<uint8_t> rows(10 * kRowBytes);
  for (size_t i = 0; i < rows.size(); i++) rows[i] = uint8_t(i);
  orders.save(window, 1, 6, &rows[kRowBytes], kRowBytes);
  orders.save(window, 8, 2, &rows[8 * kRowBytes], kRowBytes);
  orders.end();
  std::vector<uint8_t> state(rows.begin() + kRowBytes, rows.begin() + 7 * kRowBytes);
  state.insert(state.end(), rows.begin() + 8 * kRowBytes, rows.end());
  const std::vector<bool> exact{true, false, false, false, true, false, false, true};
  EXPECT_EQ(orders.find(exact, state.data(), kRowBytes), (std::vector<uint32_t>{20, 0, 0, 0, 30, 0, 0, 10}));
  state[0]++;
  EXPECT_TRUE(orders.find(exact, state.data(), kRowBytes).empty());
}

}  // namespace
}  // namespace thimble::cuda
