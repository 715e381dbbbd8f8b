// Bookkeeping of the windows: the kernel's body. It follows the rule of cache/window.h, judged by content (judge.h). A
// thread block serves one stream of one layer; layers differ in what they keep.
//
// The host commits a batch when it has been attended to. Here, one launch at the beginning of a batch does for all
// layers what the host's `commit` of the batch before and its `begin_batch` and `settle` of this one do. Attention has
// kept the queries that decide for it. Batches of more than kMaxTokens tokens, whose tokens are encoded at once, are
// committed by two launches: one before a layer attends to them, and one behind the layer's judge_cells, which may be
// behind all layers.
#pragma once

#include "cuda/encode/judge.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

struct WindowKernel {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr uint32_t kGone = 0;  // older than any sequence

  enum : uint8_t { kKeep = 1, kSeen = 2, kRewritten = 4, kTurnShift = 4 };
  enum : uint32_t {
    kTokenMember = 1,
    kTokenKeep = 2,
    kTokenClaimed = 4,
    kTokenShift = 3
  };  // then the sequence's number

  struct Shared {
    int32_t cell[kMaxWindowRows];  // as in LayerWindow
    uint32_t order[kMaxWindowRows], sequence[kMaxWindowRows];
    uint32_t score[kMaxWindowRows];  // of sorted rows, as they matter; of listed ones, their order; or marks
    uint16_t list[kMaxWindowRows], sorted[kMaxWindowRows];
    uint8_t flags[kMaxWindowRows];
    int of_warp[kWarps], n_jobs, n_entries;
    JudgeTiles<kThreads>::Shared tiles;
  };
  static constexpr size_t kSharedBytes = sizeof(Shared);

  /// A layer's stream.
  struct Stream {
    const WindowArgs& a;
    const LayerWindow& w;
    Shared& s;
    int index;
    int* n_leaving;
    int32_t* token_slots;
    uint32_t* marks;
    JudgeList judges;
    int n_rows;  // rows from this one on are unused

    SIMT int total() const { return w.last + w.pool + w.spare; }
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
    SIMT uint32_t* hidden(int cell) const { return w.hidden + index * a.hidden_stream_stride + cell / 32; }
    SIMT void drop(int row) const {
      const int cell = s.cell[row];
      simt::atomic_and(hidden(cell), ~(1u << cell % 32));
      s.cell[row] = -1;
    }
    /// Takes a row's cell out of the window and lists it for code_leaving, which encodes it.
    SIMT void leave(int row) const {
      const int at = simt::atomic_add(n_leaving, 1);
      w.leaving_cells[at] = int64_t(index) * a.cells_per_stream + s.cell[row];
      w.leaving_slots[at] = row;
      drop(row);
    }
    /// Kept queries of number i of the sequences that are judged, or null.
    SIMT const float* queries(int i) const {
      if (!w.queries || i < 0 || i >= a.n_judges) return nullptr;
      return w.queries + (size_t(index) * a.n_judges + i) * w.n_kv_heads * w.group * w.head_dim;
    }
  };

  template <typename F>
  SIMT static void for_rows(int n, F f) {
    SIMT_NO_UNROLL
    for (int row = simt::thread(); row < n; row += kThreads) f(row);
  }
  /// Calls f(i, k) for those of n numbers i that `is` is true of, k of them being before. Returns how many there are.
  /// All threads call it; it ends with a barrier.
  template <typename Is, typename F>
  SIMT static int in_order(Shared& s, int n, Is is, F f) {
    const int warp = simt::thread() / 32, lane = simt::thread() % 32;
    int before = 0;
    SIMT_NO_UNROLL
    for (int first = 0; first < n; first += kThreads) {
      const int i = first + simt::thread();
      const bool mine = i < n && is(i);
      const uint32_t lanes = simt::ballot(mine);
      if (lane == 0) s.of_warp[warp] = simt::popcount(lanes);
      simt::sync();
      int k = before + simt::popcount(lanes & ((1u << lane) - 1));
      for (int other = 0; other < kWarps; other++) {
        if (other < warp) k += s.of_warp[other];
        before += s.of_warp[other];
      }
      if (mine) f(i, k);
      simt::sync();
    }
    return before;
  }
  template <typename Is>
  SIMT static int count_rows(const Stream& stream, Is is) {
    int n = 0;
    SIMT_NO_UNROLL
    for (int first = 0; first < stream.n_rows; first += kThreads) {
      const int row = first + simt::thread();
      n += simt::count_in_block(row < stream.n_rows && is(row));
    }
    return n;
  }

  /// Lists the rows that `is` is true of in Shared::list, and returns how many there are.
  template <typename Is>
  SIMT static int list_rows(const Stream& stream, Is is) {
    Shared& s = stream.s;
    return in_order(s, stream.n_rows, is, [&](int row, int k) {
      s.list[k] = uint16_t(row);
      s.score[k] = s.order[row];
    });
  }
  /// Shared::list by order of writing, in Shared::sorted.
  SIMT_CALL static void sort_rows(Stream stream, int n) {
    Shared& s = stream.s;
    SIMT_NO_UNROLL
    for (int i = simt::thread(); i < n; i += kThreads) {
      const uint32_t order = s.score[i];
      int rank = 0;
      SIMT_UNROLL_BY(8)
      for (int other = 0; other < n; other++) rank += s.score[other] < order;
      s.sorted[rank] = s.list[i];
    }
    simt::sync();
  }

  /// Of sorted rows, scores the first `n_others` by comparison with the `n_recent` behind them.
  SIMT static void judge(const Stream& stream, int n_others, int n_recent, const float* queries) {
    const LayerWindow& w = stream.w;
    Shared& s = stream.s;
    for (int i = simt::thread(); i < n_others; i += kThreads) s.score[i] = Judge::kNoScore;
    const JudgeTiles<kThreads> tiles{s.tiles, w.head_dim};
    SIMT_NO_UNROLL
    for (int kv_head = 0; kv_head < w.n_kv_heads; kv_head++) {
      const uint16_t* keys = w.keys + (size_t(stream.index) * w.n_kv_heads + kv_head) * stream.a.capacity * w.head_dim;
      const auto key = [&](int i) { return Judge::Key{keys + size_t(s.sorted[i]) * w.head_dim, nullptr}; };
      SIMT_NO_UNROLL
      for (int group = 0; group < w.group; group += tiles.heads()) {
        const int head = group + tiles.head();
        const float* query = head < w.group ? queries + (size_t(kv_head) * w.group + head) * w.head_dim : nullptr;
        const Judge::Spread spread = tiles.spread(query, n_recent, [&](int i) { return key(n_others + i); });
        tiles.multiply(query, n_others, key, [&](int i, float x) { Judge::score(x, spread, &s.score[i]); });
      }
    }
    simt::sync();
  }

  /// Makes those of a sequence's sorted rows leave that are neither among the last nor in the pool, as if the sequence
  /// had `end` rows. Without queries, older rows matter more.
  SIMT_CALL static void trim(Stream stream, int end, const float* queries) {
    const int n_others = end - stream.w.last, pool = stream.w.pool;
    const uint32_t* scores = stream.s.score;
    if (n_others <= pool) return;
    Judge::Choice choice{};
    const bool judged = queries && pool > 0;
    if (judged) {
      judge(stream, n_others, stream.w.last, queries);
      choice = Judge::choose<kThreads>(scores, n_others, pool);
    }
    SIMT_NO_UNROLL
    for (int i = simt::thread(); i < n_others; i += kThreads) {
      if (judged ? !choice.has(scores, i) : i >= pool) stream.leave(stream.s.sorted[i]);
    }
    simt::sync();
  }

  /// Makes n rows leave, of sequences with numbers below `seen_from`: first rows of sequences that are gone, then, the
  /// sequence that was seen longest ago first, rows behind the pool, then rows of the pool.
  SIMT_CALL static void make_room(Stream stream, int n, uint32_t seen_from) {
    Shared& s = stream.s;
    const auto may_go = [&](int row) { return s.cell[row] >= 0 && s.sequence[row] < seen_from; };
    const int n_rows = list_rows(stream, may_go);
    SIMT_NO_UNROLL
    for (int i = simt::thread(); i < n_rows; i += kThreads) {
      const int row = s.list[i];
      int in_sequence = 0;
      SIMT_NO_UNROLL
      for (int k = 0; k < n_rows; k++) {
        const int other = s.list[k];
        in_sequence += s.sequence[other] == s.sequence[row] && s.order[other] < s.order[row];
      }
      const int turn = s.sequence[row] == kGone ? 0 : in_sequence >= stream.w.pool ? 1 : 2;
      s.flags[row] = uint8_t((s.flags[row] & ((1 << kTurnShift) - 1)) | turn << kTurnShift);
    }
    simt::sync();
    SIMT_NO_UNROLL
    for (int i = simt::thread(); i < n_rows; i += kThreads) {
      const int row = s.list[i], turn = s.flags[row] >> kTurnShift;
      int rank = 0;
      SIMT_NO_UNROLL
      for (int k = 0; k < n_rows; k++) {
        const int other = s.list[k], others = s.flags[other] >> kTurnShift;
        rank += others != turn                         ? others < turn
                : s.sequence[other] != s.sequence[row] ? s.sequence[other] < s.sequence[row]
                                                       : s.order[other] < s.order[row];
      }
      s.score[row] = rank < n;
    }
    simt::sync();
    SIMT_NO_UNROLL
    for (int i = simt::thread(); i < n_rows; i += kThreads) {
      if (s.score[s.list[i]]) stream.leave(s.list[i]);
    }
    simt::sync();
  }

  /// Ends the batch before: makes rows leave of sequences that have too many rows since, then, where the stream still
  /// has more rows than slots, of sequences that the batch did not see.
  SIMT static void finish_batch(const Stream& stream, WindowBooks& books) {
    const WindowArgs& a = stream.a;
    SIMT_NO_UNROLL
    for (int i = 0; i < int(books.n_judged); i++) {
      if (!(books.finishes >> i & 1)) continue;
      const int n = list_rows(
          stream, [&](int row) { return stream.s.cell[row] >= 0 && stream.s.sequence[row] == books.judged[i]; });
      if (n <= stream.total()) continue;
      sort_rows(stream, n);
      trim(stream, books.waits >> (i + 1) & 1 ? n : stream.total() + 1, stream.queries(i));
    }
    books.finishes = 0;
    const int excess = count_rows(stream, [&](int row) { return stream.s.cell[row] >= 0; }) - a.slots;
    if (excess > 0) make_room(stream, excess > stream.w.spare ? excess : stream.w.spare, books.seen_from);
  }

  /// The last token that belongs to no sequence yet, or -1.
  SIMT static int next_head(const Stream& stream) {
    int mine = 0;
    SIMT_NO_UNROLL
    for (int i = simt::thread(); i < stream.a.n_tokens; i += kThreads) {
      if (stream.cell_of(i) >= 0 && !(stream.marks[i] & kTokenClaimed)) mine = i + 1;
    }
    const uint32_t of_warp = simt::max_of_warp(uint32_t(mine));
    if (simt::thread() % 32 == 0) stream.s.of_warp[simt::thread() / 32] = int(of_warp);
    simt::sync();
    int head = 0;
    for (int warp = 0; warp < kWarps; warp++) head = stream.s.of_warp[warp] > head ? stream.s.of_warp[warp] : head;
    simt::sync();
    return head - 1;
  }

  /// Room for the job of a sequence of n entries, or -1.
  SIMT static int add_job(const Stream& stream, const JudgeJob& job) {
    const JudgeList& list = stream.judges;
    Shared& s = stream.s;
    if (!list.jobs || !stream.w.queries || stream.w.pool == 0) return -1;
    const int first = s.n_entries, n = (job.n + kJudgeTile - 1) / kJudgeTile * kJudgeTile, at = s.n_jobs;
    simt::sync();
    if (at == kMaxJudgeJobs || first + n > list.max_entries) return -1;
    if (simt::thread() == 0) {
      JudgeJob& to = list.jobs[size_t(stream.index) * kMaxJudgeJobs + at];
      to = job;
      to.first = first;
      s.n_jobs = at + 1;
      s.n_entries = first + n;
    }
    simt::sync();
    return first;
  }

  /// Gives all exact rows of one sequence of the batch its number, and marks those that stay, its tokens' too; those
  /// that are to be judged first become a job. `before`: the books as the batch before left them.
  SIMT static void take_sequence(const Stream& stream, WindowBooks& books, const WindowBooks& before, int head,
                                 bool commits) {
    const WindowArgs& a = stream.a;
    const LayerWindow& w = stream.w;
    Shared& s = stream.s;
    const uint32_t number = ++books.n_sequences;
    const int total = stream.total();
    const auto is_seen = [&](int row) { return s.cell[row] >= 0 && stream.sees(head, s.cell[row]); };
    int n_old = list_rows(stream, is_seen);
    if ((before.waits & 1) && n_old > total) {
      sort_rows(stream, n_old);
      const int row = s.sorted[total];  // the one too many
      int judge = -1;
      SIMT_NO_UNROLL
      for (int i = 0; i < int(before.n_judged); i++) {
        if (before.judged[i] == s.sequence[row] && s.order[row] > before.n_before) judge = i;
      }
      trim(stream, total + 1, stream.queries(judge));
      n_old = list_rows(stream, is_seen);
    }
    SIMT_NO_UNROLL
    for (int i = simt::thread(); i < n_old; i += kThreads) {
      s.sequence[s.list[i]] = number;
      s.flags[s.list[i]] |= kSeen;
    }
    const auto is_member = [&](int i) {
      const int cell = stream.cell_of(i);
      const bool member = cell >= 0 && stream.sees(head, cell);
      const uint32_t kept = stream.marks[i] & (kTokenKeep | kTokenClaimed);
      if (cell >= 0) {
        stream.marks[i] = member ? kept | kTokenMember | kTokenClaimed | number << kTokenShift
                                 : stream.marks[i] & ~uint32_t(kTokenMember);
      }
      return member;
    };
    const int n_new = in_order(s, a.n_tokens, is_member, [](int, int) {}), n = n_old + n_new;

    const bool few = n_new > 1 && n_new <= w.spare;
    const bool by_draft = few && n_old < total;  // cells leave with a token that may be taken back
    const bool all = !commits || n <= (by_draft ? total + w.spare : total);
    int decides = -1;  // which of the new tokens, where attention is to keep its queries
    if (few && n > total) {
      decides = by_draft ? total - n_old : 0;
      if (by_draft) books.waits |= 1;
    }
    if (!commits && !few && n > total) decides = n_new - 1;
    const int judge = int(books.n_judged);
    if (decides >= 0 && all && judge < kMaxTokens) {
      if (simt::thread() == 0) books.judged[judge] = number;
      if (!by_draft) books.finishes |= 1u << judge;
      if (n_new > w.spare) books.waits |= 2u << judge;  // all its tokens count
      books.n_judged++;
    } else {
      decides = -1;
    }
    // Few tokens are treated as if they had come one by one.
    const int end = n_new <= w.spare || n_new == 1 ? total + 1 : n, n_others = end - w.last;
    int first = -1;
    if (!all) {
      const bool is_prompt = n_new > w.spare;
      const int one = end - 1 >= n_old ? end - 1 : n_old;
      first = add_job(stream, {0, n, n_others, w.last, is_prompt ? n_old : one, is_prompt ? n_new : 1});
      sort_rows(stream, n_old);
    }
    const auto stays = [&](int rank) { return all || rank >= n_others || (first < 0 && rank < w.pool); };
    const auto note = [&](int rank, int entry) {
      if (first < 0) return;
      const size_t at = size_t(stream.index) * stream.judges.max_entries + first + rank;
      stream.judges.entries[at] = entry;
      stream.judges.scores[at] = Judge::kNoScore;
    };
    SIMT_NO_UNROLL
    for (int i = simt::thread(); i < n_old; i += kThreads) {
      const int row = all ? s.list[i] : s.sorted[i];
      if (stays(i)) s.flags[row] |= kKeep;
      note(i, row);
    }
    in_order(
        s, a.n_tokens, [&](int i) { return stream.cell_of(i) >= 0 && (stream.marks[i] & kTokenMember); },
        [&](int i, int k) {
          if (stays(n_old + k)) stream.marks[i] |= kTokenKeep;
          note(n_old + k, a.capacity + i);
          if (k == decides && judge < a.n_judges) w.judges[stream.index * a.n_judges + judge] = i % a.mask_tokens;
        });
  }

  /// Gives unused rows to the tokens that stay, in order.
  SIMT static void assign(const Stream& stream, WindowBooks& books) {
    const WindowArgs& a = stream.a;
    Shared& s = stream.s;
    const int n_unused = list_rows(stream, [&](int row) { return s.cell[row] < 0; });
    const auto stays = [&](int i) {
      if (stream.cell_of(i) < 0) return false;
      stream.token_slots[i] = -1;
      return (stream.marks[i] & kTokenKeep) != 0;
    };
    const int n_judges = books.n_judged > 0 && stream.w.queries ? a.n_judges : 0;
    const int32_t* judges = stream.w.judges + stream.index * a.n_judges;
    const int n = in_order(s, a.n_tokens, stays, [&](int i, int k) {
      const int row = k < n_unused ? s.list[k] : stream.n_rows + k - n_unused, cell = stream.cell_of(i);
      if (row >= a.capacity) return;
      stream.token_slots[i] = row;
      s.cell[row] = cell;
      s.order[row] = books.n_written + 1 + uint32_t(i);
      s.sequence[row] = stream.marks[i] >> kTokenShift;
      int token = i;
      SIMT_NO_UNROLL
      for (int j = 0; j < n_judges; j++) {
        if (judges[j] == i % a.mask_tokens) token |= (j + 1) << kJudgeShift;
      }
      stream.w.tokens[size_t(stream.index) * a.capacity + row] = token;
      simt::atomic_or(stream.hidden(cell), 1u << cell % 32);
    });
    const int end = stream.n_rows + n - n_unused;
    if (end > stream.n_rows) books.n_rows = uint32_t(end < a.capacity ? end : a.capacity);
  }

  SIMT static void run(const WindowArgs& a) {
    simt::launch_dependents();
    const int layer = simt::block_x();
    const LayerWindow w = a.layers[layer];
    simt::wait_for_previous_grid();
    Shared& s = *reinterpret_cast<Shared*>(simt::shared());
    const int index = simt::block_y();
    const size_t first = size_t(index) * a.capacity;
    uint8_t* flags = a.flags ? a.flags + layer * a.layer_rows() : nullptr;
    WindowBooks books = w.books[index];
    const bool begins = a.part != WindowArgs::end;
    const int n_rows = int(books.n_rows);
    for_rows(n_rows, [&](int row) {
      s.cell[row] = w.cells[first + row];
      s.order[row] = w.order[first + row];
      s.sequence[row] = w.sequence[first + row];
      s.flags[row] = begins ? 0 : flags[first + row];
    });
    if (begins) for_rows(a.capacity, [&](int row) { w.tokens[first + row] = -1; });
    if (begins) {
      for (int i = simt::thread(); i < a.n_judges; i += kThreads) w.judges[index * a.n_judges + i] = -1;
      books.n_batches++;
    }
    const int parity = int((books.n_batches - 1) & 1);
    if (begins && simt::thread() == 0 && index == 0) w.n_leaving[1 - parity] = 0;  // of the next batch
    const Stream stream{a,
                        w,
                        s,
                        index,
                        w.n_leaving + parity,
                        a.token_slots ? a.token_slots + layer * a.layer_tokens() : w.token_slots,
                        a.marks ? a.marks + layer * a.layer_tokens() : w.marks,
                        a.judge_of(layer),
                        n_rows};
    bool any = false;
    for (int i = simt::thread(); i < a.n_tokens; i += kThreads) any = any || stream.cell_of(i) >= 0;
    any = simt::any_in_block(any);
    if (a.part == WindowArgs::finish) finish_batch(stream, books);
    if (any && begins) begin(stream, books);
    if (a.kept_cells && begins) {
      for_rows(a.capacity, [&](int row) { a.kept_cells[first + row] = row < n_rows ? s.cell[row] : -1; });
    }
    if (a.part == WindowArgs::begin) {
      for_rows(n_rows, [&](int row) { flags[first + row] = s.flags[row]; });
      if (!any && stream.judges.n_jobs && simt::thread() == 0) stream.judges.n_jobs[index] = 0;
    } else if (any) {
      end(stream, books);
    }
    simt::sync();
    if (any || a.part == WindowArgs::finish) {
      for_rows(int(books.n_rows), [&](int row) {
        w.cells[first + row] = s.cell[row];
        w.order[first + row] = s.order[row];
        w.sequence[first + row] = s.sequence[row];
      });
    }
    if (simt::thread() == 0) w.books[index] = books;
  }

  SIMT static bool commits(const WindowArgs& a) { return a.n_tokens > kMaxTokens * a.n_batch_streams; }

  /// The end of the batch before, and which rows of this batch's sequences stay as far as need not be judged.
  SIMT static void begin(const Stream& stream, WindowBooks& books) {
    const WindowArgs& a = stream.a;
    Shared& s = stream.s;
    finish_batch(stream, books);
    SIMT_NO_UNROLL
    for (int i = simt::thread(); i < a.n_tokens; i += kThreads) {
      const int cell = stream.cell_of(i);
      if (cell < 0) continue;
      stream.marks[i] = 0;
      if (!(*stream.hidden(cell) >> cell % 32 & 1)) continue;
      SIMT_NO_UNROLL
      for (int row = 0; row < stream.n_rows; row++) {
        if (s.cell[row] == cell) s.flags[row] |= kRewritten;
      }
    }
    simt::sync();
    for_rows(stream.n_rows, [&](int row) {
      if (s.flags[row] & kRewritten) stream.drop(row);
    });
    if (simt::thread() == 0) s.n_jobs = s.n_entries = 0;
    simt::sync();
    const WindowBooks before = books;
    books.waits = books.n_judged = books.finishes = 0;
    books.seen_from = books.n_sequences + 1;
    for (int head = next_head(stream); head >= 0; head = next_head(stream)) {
      take_sequence(stream, books, before, head, commits(a));
    }
    if (stream.judges.n_jobs && simt::thread() == 0) stream.judges.n_jobs[stream.index] = s.n_jobs;
  }

  /// Marks what the jobs' scores choose.
  SIMT static void choose(const Stream& stream) {
    const JudgeList& list = stream.judges;
    for (int i = 0; i < list.n_jobs[stream.index]; i++) {
      const JudgeJob job = list.jobs[size_t(stream.index) * kMaxJudgeJobs + i];
      const size_t first = size_t(stream.index) * list.max_entries + job.first;
      const Judge::Choice choice = Judge::choose<kThreads>(list.scores + first, job.n_others, stream.w.pool);
      SIMT_NO_UNROLL
      for (int k = simt::thread(); k < job.n_others; k += kThreads) {
        if (!choice.has(list.scores + first, k)) continue;
        const int entry = list.entries[first + k];
        if (entry < stream.a.capacity) {
          stream.s.flags[entry] |= kKeep;
        } else {
          stream.marks[entry - stream.a.capacity] |= kTokenKeep;
        }
      }
      simt::sync();
    }
  }

  /// Rows leave, and tokens get rows.
  SIMT static void end(const Stream& stream, WindowBooks& books) {
    const WindowArgs& a = stream.a;
    Shared& s = stream.s;
    simt::sync();
    if (a.part == WindowArgs::end && stream.judges.n_jobs) choose(stream);
    const bool any_rewritten = count_rows(stream, [&](int row) { return (s.flags[row] & kRewritten) != 0; }) > 0;
    for_rows(stream.n_rows, [&](int row) {
      s.score[row] = 0;
      if (s.cell[row] < 0) return;
      if (s.flags[row] & kSeen) {
        if (!(s.flags[row] & kKeep)) stream.leave(row);
        return;
      }
      SIMT_NO_UNROLL
      for (int other = 0; any_rewritten && other < stream.n_rows; other++) {
        if ((s.flags[other] & kRewritten) && s.sequence[other] == s.sequence[row]) s.score[row] = 1;
      }
    });
    simt::sync();
    for_rows(stream.n_rows, [&](int row) {
      if (s.score[row]) s.sequence[row] = kGone;
    });
    const int n_arriving = in_order(
        s, a.n_tokens, [&](int i) { return stream.cell_of(i) >= 0 && (stream.marks[i] & kTokenKeep); },
        [](int, int) {});
    const int n_used = count_rows(stream, [&](int row) { return s.cell[row] >= 0; });
    const int excess = n_used + n_arriving - a.slots;
    if (commits(a) && excess > 0) {
      make_room(stream, excess > stream.w.spare ? excess : stream.w.spare, books.seen_from);
    }
    // Where that was not enough, rows of sequences that the batch sees leave, too.
    const int n_left = count_rows(stream, [&](int row) { return s.cell[row] >= 0; });
    if (n_left + n_arriving > a.capacity) make_room(stream, n_left + n_arriving - a.capacity, UINT32_MAX);
    assign(stream, books);
    books.n_before = books.n_written;
    books.n_written += uint32_t(a.n_tokens);
  }
};

}  // namespace thimble::cuda
