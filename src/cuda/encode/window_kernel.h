// Bookkeeping of the window: the kernel's body. It follows the rule of cache/window.h without a judge, so that a
// sequence's last and its oldest cells stay. A thread block serves one stream.
//
// The host commits a batch when it has been attended to. Here, one launch at the beginning of a batch does what the
// host's `commit` of the batch before and its `begin_batch` and `settle` of this one do. Batches of more than
// kMaxTokens tokens, whose tokens are encoded at once, are committed in the same launch.
#pragma once

#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

struct WindowKernel {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr uint32_t kGone = 0;  // older than any sequence

  enum : uint8_t { kMember = 1, kKeep = 2, kSeen = 4, kRewritten = 8 };
  enum : uint32_t {
    kTokenMember = 1,
    kTokenKeep = 2,
    kTokenClaimed = 4,
    kTokenShift = 3
  };  // then the sequence's number

  struct Shared {
    int32_t cell[kMaxWindowRows];  // as in WindowArgs
    uint32_t order[kMaxWindowRows], sequence[kMaxWindowRows];
    int rank[kMaxWindowRows];
    uint16_t unused[kMaxWindowRows];
    uint8_t flags[kMaxWindowRows];
    int greatest[kWarps], count, n_old, n_new, n_unused, n_arriving;
  };
  static constexpr size_t kSharedBytes = sizeof(Shared);

  /// A stream's share of the books.
  struct Stream {
    const WindowArgs& a;
    Shared& s;
    int index;
    int *n_leaving, first_token, end_token;  // tokens of the batch that may be of this stream

    SIMT int total() const { return a.last + a.pool + a.spare; }
    /// The stream's cell that token i goes to, or -1.
    SIMT int cell_of(int i) const {
      const int64_t cell = a.cells[i] - int64_t(index) * a.cells_per_stream;
      return cell >= 0 && cell < a.cells_per_stream ? int(cell) : -1;
    }
    SIMT bool sees(int token, int cell) const {
      if (cell < 0 || cell >= a.mask_cells) return false;
      if (!a.mask) return true;
      const uint16_t* row =
          a.mask + token / a.mask_tokens * a.mask_stream_stride + token % a.mask_tokens * a.mask_token_stride;
      return row[cell] != 0xfc00;  // -infinity
    }
    SIMT bool is(int row, uint8_t flags) const { return s.cell[row] >= 0 && (s.flags[row] & flags) == flags; }
    SIMT void drop(int row) const {
      const int cell = s.cell[row];
      simt::atomic_and(a.hidden + index * a.hidden_stream_stride + cell / 32, ~(1u << cell % 32));
      s.cell[row] = -1;
    }
    /// Takes a row's cell out of the window and lists it for code_leaving, which encodes it.
    SIMT void leave(int row) const {
      const int at = simt::atomic_add(n_leaving, 1);
      a.leaving_cells[at] = int64_t(index) * a.cells_per_stream + s.cell[row];
      a.leaving_slots[at] = row;
      drop(row);
    }
  };

  template <typename F>
  SIMT static void for_rows(const WindowArgs& a, F f) {
    for (int row = simt::thread(); row < a.capacity; row += kThreads) f(row);
  }
  /// Counts the rows that f is true of. It is also a barrier.
  template <typename F>
  SIMT static int count_rows(const Stream& stream, F f) {
    if (simt::thread() == 0) stream.s.count = 0;
    simt::sync();
    for_rows(stream.a, [&](int row) {
      if (f(row)) simt::atomic_add(&stream.s.count, 1);
    });
    simt::sync();
    const int n = stream.s.count;
    simt::sync();
    return n;
  }

  /// Sorts the rows that f is true of by order of writing, and makes number `first` to number `end` - 1 leave.
  template <typename F>
  SIMT static void leave_ranks(const Stream& stream, int first, int end, F f) {
    const Shared& s = stream.s;
    for_rows(stream.a, [&](int row) {
      int rank = 0;
      for (int other = 0; f(row) && other < stream.a.capacity; other++) {
        rank += f(other) && s.order[other] < s.order[row];
      }
      stream.s.rank[row] = f(row) && rank >= first && rank < end;
    });
    simt::sync();
    for_rows(stream.a, [&](int row) {
      if (stream.s.rank[row]) stream.leave(row);
    });
    simt::sync();
  }

  /// Makes n rows leave, of sequences with numbers below `seen_from`: first rows of sequences that are gone, then, the
  /// sequence that was seen longest ago first, rows behind the pool, then rows of the pool.
  SIMT static void make_room(const Stream& stream, int n, uint32_t seen_from) {
    Shared& s = stream.s;
    const auto may_go = [&](int row) { return s.cell[row] >= 0 && s.sequence[row] < seen_from; };
    for_rows(stream.a, [&](int row) {
      int in_sequence = 0;
      for (int other = 0; may_go(row) && other < stream.a.capacity; other++) {
        in_sequence += may_go(other) && s.sequence[other] == s.sequence[row] && s.order[other] < s.order[row];
      }
      s.flags[row] = uint8_t((s.flags[row] & 15) | (s.sequence[row] == kGone       ? 0
                                                    : in_sequence >= stream.a.pool ? 16
                                                                                   : 32));  // its turn
    });
    simt::sync();
    for_rows(stream.a, [&](int row) {
      int rank = 0;
      for (int other = 0; may_go(row) && other < stream.a.capacity; other++) {
        if (!may_go(other)) continue;
        const int turn = s.flags[row] >> 4, others = s.flags[other] >> 4;
        const bool before = others != turn                         ? others < turn
                            : s.sequence[other] != s.sequence[row] ? s.sequence[other] < s.sequence[row]
                                                                   : s.order[other] < s.order[row];
        rank += before;
      }
      s.rank[row] = may_go(row) && rank < n;
    });
    simt::sync();
    for_rows(stream.a, [&](int row) {
      if (s.rank[row]) stream.leave(row);
    });
    simt::sync();
  }

  /// Ends the batch before: makes rows leave of sequences that had one token in it and have too many rows now, then,
  /// where the stream still has more rows than slots, of sequences that the batch did not see.
  SIMT static void finish(const Stream& stream, WindowBooks& books) {
    const WindowArgs& a = stream.a;
    for (int i = 0; i < int(books.n_single); i++) {
      const auto member = [&](int row) { return stream.s.cell[row] >= 0 && stream.s.sequence[row] == books.single[i]; };
      const int n = count_rows(stream, member);
      if (n > stream.total()) leave_ranks(stream, a.pool, stream.total() + 1 - a.last, member);
    }
    const int excess = count_rows(stream, [&](int row) { return stream.s.cell[row] >= 0; }) - a.slots;
    if (excess > 0) make_room(stream, excess > a.spare ? excess : a.spare, books.seen_from);
  }

  /// The last token that belongs to no sequence yet, or -1.
  SIMT static int next_head(const Stream& stream) {
    int mine = 0;
    for (int i = stream.first_token + simt::thread(); i < stream.end_token; i += kThreads) {
      if (stream.cell_of(i) >= 0 && !(stream.a.marks[i] & kTokenClaimed)) mine = i + 1;
    }
    const uint32_t of_warp = simt::max_of_warp(uint32_t(mine));
    if (simt::thread() % 32 == 0) stream.s.greatest[simt::thread() / 32] = int(of_warp);
    simt::sync();
    int head = 0;
    for (int warp = 0; warp < kWarps; warp++) head = stream.s.greatest[warp] > head ? stream.s.greatest[warp] : head;
    simt::sync();
    return head - 1;
  }

  /// Gives all exact rows of one sequence of the batch its number, and marks those that stay, its tokens' too.
  SIMT static void take_sequence(const Stream& stream, WindowBooks& books, int head, bool waits, bool commits) {
    const WindowArgs& a = stream.a;
    Shared& s = stream.s;
    const uint32_t number = ++books.n_sequences;
    if (simt::thread() == 0) s.n_old = s.n_new = 0;
    simt::sync();
    for_rows(a, [&](int row) {
      const bool member = s.cell[row] >= 0 && stream.sees(head, s.cell[row]);
      s.flags[row] = uint8_t((s.flags[row] & ~kMember) | (member ? kMember | kSeen : 0));
      if (member) s.sequence[row] = number;
    });
    for (int i = stream.first_token + simt::thread(); i < stream.end_token; i += kThreads) {
      const bool member = stream.cell_of(i) >= 0 && stream.sees(head, stream.cell_of(i));
      const uint32_t kept = a.marks[i] & (kTokenKeep | kTokenClaimed);
      a.marks[i] = member ? kept | kTokenMember | kTokenClaimed | number << kTokenShift : a.marks[i] & ~kTokenMember;
      if (member) simt::atomic_add(&s.n_new, 1);
    }
    simt::sync();
    const auto member = [&](int row) { return stream.is(row, kMember); };
    int n_old = count_rows(stream, member);
    const int n_new = s.n_new, total = stream.total();
    if (waits && n_old > total) {
      leave_ranks(stream, a.pool, total + 1 - a.last, member);
      n_old = count_rows(stream, member);
    }
    const int n = n_old + n_new;
    const bool few = n_new > 1 && n_new <= a.spare;
    if (few && n > total) books.waits = 1;
    if (!commits && n_new == 1 && books.n_single < kMaxTokens) {
      if (simt::thread() == 0) books.single[books.n_single] = number;
      books.n_single++;
    }
    const bool all = !commits || n <= (few ? total + a.spare : total);
    const int end = n_new <= a.spare ? total + 1 : n;
    for_rows(a, [&](int row) {
      if (!member(row)) return;
      int rank = 0;
      for (int other = 0; !all && other < a.capacity; other++) rank += member(other) && s.order[other] < s.order[row];
      if (all || rank < a.pool || rank >= end - a.last) s.flags[row] |= kKeep;
    });
    for (int i = stream.first_token + simt::thread(); i < stream.end_token; i += kThreads) {
      if (!(a.marks[i] & kTokenMember)) continue;
      int rank = n_old;
      for (int other = stream.first_token; !all && other < i; other++) rank += a.marks[other] & kTokenMember ? 1 : 0;
      if (all || rank < a.pool || rank >= end - a.last) a.marks[i] |= kTokenKeep;
    }
    simt::sync();
  }

  /// Gives unused rows to the tokens that stay, in order. One warp calls it.
  SIMT static void assign(const Stream& stream, uint32_t written) {
    const WindowArgs& a = stream.a;
    Shared& s = stream.s;
    const int lane = simt::thread() % 32;
    int n_unused = 0, n_tokens = 0;
    for (int first = 0; first < a.capacity; first += 32) {
      const bool unused = first + lane < a.capacity && s.cell[first + lane] < 0;
      const uint32_t lanes = simt::ballot(unused);
      if (unused) s.unused[n_unused + simt::popcount(lanes & ((1u << lane) - 1))] = uint16_t(first + lane);
      n_unused += simt::popcount(lanes);
    }
    simt::sync_warp();
    for (int first = stream.first_token; first < stream.end_token; first += 32) {
      const int i = first + lane, cell = i < stream.end_token ? stream.cell_of(i) : -1;
      const bool stays = cell >= 0 && (a.marks[i] & kTokenKeep);
      const uint32_t lanes = simt::ballot(stays);
      const int at = n_tokens + simt::popcount(lanes & ((1u << lane) - 1));
      n_tokens += simt::popcount(lanes);
      if (cell < 0) continue;
      a.token_slots[i] = stays && at < n_unused ? s.unused[at] : -1;
      if (a.token_slots[i] < 0) continue;
      s.cell[a.token_slots[i]] = cell;
      s.order[a.token_slots[i]] = written + 1 + uint32_t(i);
      s.sequence[a.token_slots[i]] = a.marks[i] >> kTokenShift;
      a.tokens[size_t(stream.index) * a.capacity + a.token_slots[i]] = i;
      simt::atomic_or(a.hidden + stream.index * a.hidden_stream_stride + cell / 32, 1u << cell % 32);
    }
  }

  SIMT static void run(const WindowArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    Shared& s = *reinterpret_cast<Shared*>(simt::shared());
    const int index = simt::block_y();
    int32_t* cells = a.window_cells + size_t(index) * a.capacity;
    uint32_t *order = a.order + size_t(index) * a.capacity, *sequence = a.sequence + size_t(index) * a.capacity;
    WindowBooks books = a.books[index];
    for_rows(a, [&](int row) {
      s.cell[row] = cells[row];
      s.order[row] = order[row];
      s.sequence[row] = sequence[row];
      s.flags[row] = 0;
      a.tokens[size_t(index) * a.capacity + row] = -1;
    });
    const int parity = int(books.n_batches++ & 1);
    if (simt::thread() == 0 && index == 0) a.n_leaving[1 - parity] = 0;  // of the next batch
    // In streams of their own, a stream's tokens are adjacent.
    const Stream stream{a, s, index, a.n_leaving + parity, 0, a.n_tokens};
    bool any = false;
    for (int i = simt::thread(); i < a.n_tokens; i += kThreads) any = any || stream.cell_of(i) >= 0;
    any = simt::any_in_block(any);
    if (any) {
      update(stream, books);
      for_rows(a, [&](int row) {
        cells[row] = s.cell[row];
        order[row] = s.order[row];
        sequence[row] = s.sequence[row];
      });
    }
    if (simt::thread() == 0) a.books[index] = books;
  }

  SIMT static void update(const Stream& stream, WindowBooks& books) {
    const WindowArgs& a = stream.a;
    Shared& s = stream.s;
    finish(stream, books);

    for_rows(a, [&](int row) {
      bool again = false;
      for (int i = 0; i < a.n_tokens; i++) again = again || (s.cell[row] >= 0 && stream.cell_of(i) == s.cell[row]);
      if (!again) return;
      s.flags[row] |= kRewritten;
      stream.drop(row);
    });
    for (int i = simt::thread(); i < a.n_tokens; i += kThreads) {
      if (stream.cell_of(i) >= 0) a.marks[i] = 0;
    }
    simt::sync();
    const bool waits = books.waits != 0, commits = a.n_tokens > kMaxTokens * a.n_batch_streams;
    books.waits = books.n_single = 0;
    books.seen_from = books.n_sequences + 1;
    for (int head = next_head(stream); head >= 0; head = next_head(stream)) {
      take_sequence(stream, books, head, waits, commits);
    }
    for_rows(a, [&](int row) {
      if (stream.is(row, kSeen)) {
        if (!(s.flags[row] & kKeep)) stream.leave(row);
        return;
      }
      bool gone = false;
      for (int other = 0; s.cell[row] >= 0 && other < a.capacity; other++) {
        gone = gone || ((s.flags[other] & kRewritten) && s.sequence[other] == s.sequence[row]);
      }
      s.rank[row] = gone;
    });
    simt::sync();
    for_rows(a, [&](int row) {
      if (s.cell[row] >= 0 && !(s.flags[row] & kSeen) && s.rank[row]) s.sequence[row] = kGone;
    });
    if (simt::thread() == 0) s.n_arriving = 0;
    simt::sync();
    for (int i = simt::thread(); i < a.n_tokens; i += kThreads) {
      if (stream.cell_of(i) >= 0 && (a.marks[i] & kTokenKeep)) simt::atomic_add(&s.n_arriving, 1);
    }
    const int n_used = count_rows(stream, [&](int row) { return s.cell[row] >= 0; });
    const int n_wanted = n_used + s.n_arriving;
    if (commits && n_wanted > a.slots) {
      make_room(stream, n_wanted - a.slots > a.spare ? n_wanted - a.slots : a.spare, books.seen_from);
    }
    // Where that was not enough, rows of sequences that the batch sees leave, too.
    const int n_left = count_rows(stream, [&](int row) { return s.cell[row] >= 0; });
    if (n_left + s.n_arriving > a.capacity) make_room(stream, n_left + s.n_arriving - a.capacity, UINT32_MAX);
    if (simt::thread() < 32) assign(stream, books.n_written);
    books.n_written += uint32_t(a.n_tokens);
    simt::sync();
  }
};

}  // namespace thimble::cuda
