// Attention of a batch of query tokens over one layer's cache: coded cells from their codes, the window and the batch
// in flight from their exact rows, one softmax over both. Look-ups from codes are VecInfer's (arXiv 2510.06175).
//
// With retrieval (after TailorKV, arXiv 2505.19586), few query tokens (decoding) also attend exactly to the cells that
// matter most to them. For each query token and KV head, all cells outside the window are scored from their codes, and
// the `top` cells with the greatest scores are chosen. A cell's score is the greatest over the heads of the group; of
// equal scores the lower cell is chosen. All other cells, the tail, are attended to from codes, or not at all. Many
// query tokens (prefill) attend exactly to all cells.
//
// Tokens that are decoded at once and treated as if they had come one by one (Window::stages) each get what they would
// have got alone, but for the rounding of sums.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "attention/problem.h"
#include "cache/layer.h"
#include "kernels/kernels.h"

namespace thimble {

/// How a decode step (few query tokens) attends to the cells outside the window.
struct Retrieval {
  int top = 0;             // cells to retrieve for each KV head; above 0 only where the layer has an exact store
  bool drop_tail = false;  // cells that are neither retrieved nor in the window are not attended to
};

/// Runs a problem on a team of threads:
///   one thread: attention.prepare(layer, problem, retrieval, n_threads, kernels)
///   barrier; where attention.retrieves(): all: attention.retrieve(i); barrier
///   all: attention.attend(i)
/// The same inputs and n_threads give the same bits. An object may be used for one problem after another.
class Attention {
public:
  void prepare(const CacheLayer& layer, const AttentionProblem& problem, const Retrieval& retrieval, int n_threads,
               const Kernels& kernels);
  bool retrieves() const { return retrieval_.top > 0 && !prefills(); }
  void retrieve(int thread);
  void attend(int thread);

private:
  // Query tokens of one view and KV head that are computed together. Their work is counted in units of about equal
  // time: one for each block of the stream, then units_of_tile() for each tile of exact rows, then as many for each
  // tile of retrieved rows.
  struct Item {
    int view, kv_head, first_token, n_tokens;
    int n_units;
    int first_part, n_parts;
    // Threads count these down. The one that brings scorers_left to 0 chooses the item's cells; the one that brings
    // parts_left to 0 combines its parts.
    int scorers_left, parts_left;
  };
  // A thread's share of an item. Two results begin at results_[result], that of the coded cells and that of the exact
  // ones, each acc[rows][value_dim], max[rows], sum[rows], at a multiple of 64 bytes.
  struct Part {
    int item, thread;
    int first_unit, last_unit;
    size_t result;
  };
  // Exact rows, in order of cells, 64 to a tile.
  struct ExactTile {
    int n_cells = 0;
    int cells[kBlockCells];                // within the stream
    const uint16_t* rows[2][kBlockCells];  // by Kind, all KV heads
    bool adjacent() const { return cells[n_cells - 1] - cells[0] == n_cells - 1; }
  };
  // Query tokens of a stream that attend to the same cells exactly: a stage of the window's, or all.
  struct View {
    int stream, first_token, n_tokens;
    std::vector<uint64_t> hidden = {};  // by block: a bit for each cell that is attended to exactly, so not from codes
    std::vector<ExactTile> exact = {};
    int n_blocks = 0;  // without those of leave_out_blocks
  };
  struct Retrieved {
    std::vector<uint64_t> hidden;  // View::hidden and the retrieved cells
    std::vector<ExactTile> tiles;
  };
  struct Scored {
    float score;
    int cell;
  };
  struct ThreadMemory {
    std::vector<float> q, q_coded, bias, slope;
    std::vector<float> q_part, q_part_coded;  // of load_queries: what goes with one side of a latent layer
    Scratch k_tile, v_tile;                   // a block's keys and values as tiles
    std::vector<float> sums, out, weights;    // of combine
    std::vector<uint16_t> exact_mask;
    std::vector<float> maxima, ordered_maxima;  // of choose
    std::vector<Scored> cells;
    std::vector<uint64_t> chosen;   // by block; in a prefill from a full store: the cells of a block that have rows
    std::vector<int64_t> rows;      // of fetch
    std::vector<ExactTile> stored;  // of attend_stored
    Scratch scratch;
  };

  void prepare_views();
  void list_exact(View& view) const;
  void leave_out_blocks();
  void prepare_parts();
  void add_items(int view, int first_token, int end_token, int tokens_per_item);
  void deal_items(size_t first, size_t* result);
  void prepare_retrieval();
  /// Calls f(item, first block, last block) for each range of blocks that a thread has to score.
  template <typename F>
  void for_stretch(int thread, F f) const {
    const int64_t total = int64_t(items_.size()) * n_blocks_, end = total * (thread + 1) / n_threads_;
    for (int64_t at = total * thread / n_threads_; at < end;) {
      const int64_t item = at / n_blocks_, first = at % n_blocks_,
                    last = std::min<int64_t>(n_blocks_, first + end - at);
      f(int(item), int(first), int(last));
      at += last - first;
    }
  }
  bool prefills() const { return prefills_; }
  bool from_store() const { return retrieval_.top > 0 && prefills(); }
  int cells_of_block(int block) const {
    return int(std::min<int64_t>(kBlockCells, p_.n_cells - int64_t(block) * kBlockCells));
  }
  int block_units(const View& view) const { return retrieves() && retrieval_.drop_tail ? 0 : view.n_blocks; }
  // 64 exact rows take as long as six blocks of codes, but the last tile is seldom full.
  int units_of_tile() const { return prefills() ? 1 : 5; }
  int retrieved_tiles() const {
    return retrieves() ? int((std::min<int64_t>(retrieval_.top, p_.n_cells) + kBlockCells - 1) / kBlockCells) : 0;
  }
  size_t softmax_size(int n_rows) const { return (size_t(n_rows) * (2 + p_.value_dim) + 15) / 16 * 16; }
  Softmax softmax_at(float* at, int n_rows) const {
    float* max = at + size_t(n_rows) * p_.value_dim;
    return {p_.value_dim, max, max + n_rows, at};
  }
  float* tile(ThreadMemory& memory, Kind kind) const {
    const size_t floats = size_t(kBlockCells) * (kind == Kind::key ? layer_->key_dim() : p_.value_dim);
    return reinterpret_cast<float*>((kind == Kind::key ? memory.k_tile : memory.v_tile).room(floats * sizeof(float)));
  }
  size_t index_of(const Item& item) const { return size_t(&item - items_.data()); }
  float* scores_of(const Item& item) { return scores_.data() + index_of(item) * n_blocks_ * kBlockCells; }
  // Whether the scores by which cells are chosen are kept, so that attention does not look up the keys' codes again.
  // For one token they take 4 bytes for each head and cell, about as much as the keys' codes; for several tokens more.
  bool keeps_scores() const { return retrieves() && !retrieval_.drop_tail && p_.n_tokens == 1; }
  RowScores kept_scores(const Item& item) const {
    if (!keeps_scores()) return {};
    const size_t stride = size_t(n_blocks_) * kBlockCells;
    return {kept_scores_ + index_of(item) * group_ * stride, stride};
  }
  int stream_of(const Item& item) const { return views_[item.view].stream; }
  Item all_tokens(int view) const { return {view, 0, views_[view].first_token, views_[view].n_tokens, 0, 0, 0, 0, 0}; }
  Mask mask_of(const Item& item) const;
  uint64_t seen_by(const Item& item, const Mask& mask, int n_cells) const;

  CodedCells coded_cells(const Item& item, const uint64_t* hidden, int first_block, int last_block) const;
  static void add_row(std::vector<ExactTile>& tiles, int cell, const uint16_t* key, const uint16_t* value);
  void score(const Item& item, int first_block, int last_block, ThreadMemory& memory);
  void choose(const float* scores, ThreadMemory& memory) const;
  void fetch(const Item& item, ThreadMemory& memory);

  bool sees_codes(const Item& item, const uint64_t* hidden, int first_block, int last_block) const;
  const uint64_t* hidden_of(const Item& item) const;
  void load_queries(const Item& item, ThreadMemory& memory, Queries& plain, Queries* coded) const;
  void code_queries(const Item& item, int n_rows, ThreadMemory& memory) const;
  void attend_part(const Part& part, ThreadMemory& memory);
  void attend_coded(const Item& item, const uint64_t* hidden, int first_block, int last_block, const Queries& queries,
                    ThreadMemory& memory, Softmax& softmax) const;
  uint64_t attend_stored(const Item& item, int block, const Queries& queries, ThreadMemory& memory,
                         Softmax& softmax) const;
  void attend_exact(const Item& item, const ExactTile& exact, const Queries& queries, ThreadMemory& memory,
                    Softmax& softmax) const;
  void combine_token(const Item& item, int token, ThreadMemory& memory);

  const CacheLayer* layer_ = nullptr;
  AttentionProblem p_;
  Retrieval retrieval_;
  const Kernels* kernels_ = nullptr;
  int n_threads_ = 1;
  bool staged_ = false;  // by the window's stages
  bool prefills_ = false;
  int n_blocks_ = 0;  // the most of a view
  int group_ = 1;
  std::vector<View> views_;  // in order of streams and their tokens
  std::vector<Item> items_;
  std::vector<float> scores_;  // [item][block][64], where retrieves()
  Scratch kept_scores_memory_;
  float* kept_scores_ = nullptr;      // [item][row][block][64], where keeps_scores()
  std::vector<Retrieved> retrieved_;  // by item, where retrieves()
  std::vector<Part> parts_;           // in order of items and of their cells
  Scratch results_memory_;
  float* results_ = nullptr;
  std::vector<ThreadMemory> memory_;
};

}  // namespace thimble
