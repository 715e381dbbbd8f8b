// Retrieval: the k cells of greatest score, and their rows from an exact store. Kernels' bodies; a block serves one
// stream and KV head.
//
// Scoring leaves the greatest score of every block of 64 cells beside the scores. Whatever the scores are, the k best
// cells lie in the k best blocks: each of these has a cell that is better than all of any other block. So the scores of
// k blocks are read, and of these only those cells are looked at twice that reach the least of the blocks' greatest.
// Better is who has the greater score, or of equals the lower index.
#pragma once

#include "cuda/layout.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

struct RetrieveKernel {
  static constexpr int kThreads = 512, kBins = 256;
  static constexpr int kListed = 4096;

  struct Shared {
    int bins[kBins];
    uint32_t prefix;          // of the k-th greatest key, as far as it is known
    int rank;                 // of that key among those that share the prefix, from 1
    int count;                // of the list that is being made
    uint32_t keys[kListed];   // of blocks, then of candidates
    int32_t cells[kListed];   // candidates
    int32_t blocks[kListed];  // that are among the k best, in any order
    int32_t chosen[kListed];  // in any order
  };
  static constexpr size_t kSharedBytes = sizeof(Shared);
  static_assert(kMaxTop <= kListed);

  /// Order of floats as order of unsigned numbers. NaN counts as greatest, so that it is attended to and shows.
  SIMT static uint32_t key_of(float x) {
    const uint32_t bits = simt::float_to_bits(x + 0.0f);  // zeros are equal
    if ((bits & 0x7fffffffu) > 0x7f800000u) return ~0u;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  static constexpr uint32_t kLowest = 0x007fffffu;  // key of -infinity

  /// The greatest key over row groups, whose scores lie `stride` apart. Without a loop, where there is but one, many of
  /// these loads are under way at once.
  template <bool OneGroup>
  SIMT static uint32_t key_at(const float* scores, int row_groups, size_t stride, int i) {
    uint32_t greatest = key_of(scores[i]);
    for (int r = 1; !OneGroup && r < row_groups; r++) {
      const uint32_t key = key_of(scores[r * stride + i]);
      greatest = key > greatest ? key : greatest;
    }
    return greatest;
  }

  /// One warp finds the bin that the s.rank-th greatest key falls into.
  SIMT static void find_bin(Shared& s, int shift) {
    constexpr int kShare = kBins / 32;
    const int lane = simt::thread() % 32, rank = s.rank, first = kBins - 1 - lane * kShare;  // lane 0: the greatest
    int mine = 0;
    SIMT_UNROLL
    for (int i = 0; i < kShare; i++) mine += s.bins[first - i];
    int sum = mine;
    SIMT_UNROLL
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int before = simt::shuffle(sum, lane - lanes);
      if (lane >= lanes) sum += before;
    }
    simt::sync_warp();  // all have read s.rank
    // Where there are too few keys, the last bin.
    if (sum - mine >= rank || (sum < rank && lane < 31)) return;
    int bin = first, left = rank - (sum - mine);
    while (bin > first - kShare + 1 && left > s.bins[bin]) left -= s.bins[bin--];
    s.prefix |= uint32_t(bin) << shift;
    s.rank = left;
  }

  /// The k-th greatest of n keys, 8 bits a pass; afterwards s.rank tells how many of its equals are among the first k,
  /// and s.bins[its low byte] how many there are. Keys of -infinity do not count; where there are fewer than k others,
  /// the result is 0.
  template <typename Key>
  SIMT static uint32_t kth_greatest(Shared& s, int n, int k, Key key) {
    const int tid = simt::thread();
    simt::sync();
    if (tid == 0) {
      s.prefix = 0;
      s.rank = k;
    }
    SIMT_NO_UNROLL
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int i = tid; i < kBins; i += kThreads) s.bins[i] = 0;
      simt::sync();
      const uint32_t known = shift == 24 ? 0 : ~0u << (shift + 8), prefix = s.prefix;
      for (int i = tid; i < n; i += kThreads) {
        const uint32_t x = key(i);
        if ((x & known) == prefix && x > kLowest) simt::atomic_add(&s.bins[x >> shift & 255], 1);
      }
      simt::sync();
      if (tid < 32) find_bin(s, shift);
      simt::sync();
    }
    return s.prefix;
  }

  /// What the k best of some keys have in common; all of them, where there are no more than k.
  struct Bound {
    uint32_t key;
    uint32_t last;  // greatest index of those with that very key
    SIMT bool admits(uint32_t x, int index) const {
      return x > kLowest && (x > key || (x == key && uint32_t(index) <= last));
    }
  };
  template <typename Key, typename Index>
  SIMT static Bound bound_of(Shared& s, int n, int k, Key key, Index index) {
    Bound b{kth_greatest(s, n, k, key), ~0u};
    const int wanted = s.rank;
    if (b.key != 0 && wanted < s.bins[b.key & 255]) {
      b.last = ~kth_greatest(s, n, wanted, [&](int i) { return key(i) == b.key ? ~uint32_t(index(i)) : 0; });
    }
    return b;
  }

  /// Calls take(i, place in a list) for all i that qualify, in no order. Returns how many there were. Many a time, for
  /// the sake of the loads behind `qualifies`.
  template <typename Qualifies, typename Take>
  SIMT static int list(Shared& s, int n, Qualifies qualifies, Take take) {
    constexpr int kBatch = 8;
    simt::sync();
    if (simt::thread() == 0) s.count = 0;
    simt::sync();
    SIMT_NO_UNROLL
    for (int first = simt::thread(); first < n; first += kThreads * kBatch) {
      bool good[kBatch];
      SIMT_UNROLL
      for (int k = 0; k < kBatch; k++) good[k] = first + k * kThreads < n && qualifies(first + k * kThreads);
      SIMT_UNROLL
      for (int k = 0; k < kBatch; k++) {
        if (good[k]) take(first + k * kThreads, simt::atomic_add(&s.count, 1));
      }
    }
    simt::sync();
    return s.count;
  }

  /// Chooses the cells and puts them in order. Where fewer than k are to be seen, the rest is -1. `OneGroup`: of query
  /// rows.
  template <bool OneGroup>
  SIMT static void choose(const RetrieveArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    Shared& s = *reinterpret_cast<Shared*>(simt::shared());
    const int pair = simt::block_y(), tid = simt::thread(), n_blocks = a.n_cells / kBlockCells;
    const float* scores = a.scores + size_t(pair) * a.row_groups * a.n_cells;
    const float* tops = a.tops + size_t(pair) * a.row_groups * n_blocks;

    const bool cached = n_blocks <= kListed;
    const auto top_key = [&](int i) { return key_at<OneGroup>(tops, a.row_groups, n_blocks, i); };
    if (cached) {
      constexpr int kShare = kListed / kThreads;
      uint32_t key[kShare];
      SIMT_UNROLL
      for (int k = 0; k < kShare; k++) key[k] = tid + k * kThreads < n_blocks ? top_key(tid + k * kThreads) : 0;
      SIMT_UNROLL
      for (int k = 0; k < kShare; k++) s.keys[tid + k * kThreads] = key[k];
    }
    const auto block_key = [&](int i) { return cached ? s.keys[i] : top_key(i); };
    const auto itself = [](int i) { return i; };
    const Bound blocks = bound_of(s, n_blocks, a.top, block_key, itself);
    const int n_listed = list(
        s, n_blocks, [&](int i) { return blocks.admits(block_key(i), i); }, [&](int i, int at) { s.blocks[at] = i; });

    const auto cell_in = [&](int i) { return s.blocks[i / kBlockCells] * kBlockCells + i % kBlockCells; };
    const auto key_in = [&](int i) { return key_at<OneGroup>(scores, a.row_groups, a.n_cells, cell_in(i)); };
    const int n_reach = list(
        s, n_listed * kBlockCells,
        [&](int i) {
          const uint32_t x = key_in(i);
          return x > kLowest && x >= blocks.key;
        },
        [&](int i, int at) {
          if (at >= kListed) return;
          s.cells[at] = cell_in(i);
          s.keys[at] = key_in(i);
        });
    const bool fit = n_reach <= kListed;  // else there are many to choose, and many equals
    const int n = fit ? n_reach : n_listed * kBlockCells;
    const auto key = [&](int i) { return fit ? s.keys[i] : key_in(i); };
    const auto cell = [&](int i) { return fit ? s.cells[i] : cell_in(i); };
    const Bound bound = bound_of(s, n, a.top, key, cell);
    const int n_chosen = list(
        s, n, [&](int i) { return bound.admits(key(i), cell(i)); }, [&](int i, int at) { s.chosen[at] = cell(i); });

    uint32_t* hidden = a.all_hidden + size_t(pair) * (a.n_cells / 32);
    for (int i = tid; i < a.top; i += kThreads) {
      const int mine = i < n_chosen ? s.chosen[i] : -1;
      int place = i;
      if (mine >= 0) {
        place = 0;
        for (int k = 0; k < n_chosen; k++) place += s.chosen[k] < mine;
        simt::atomic_or(hidden + mine / 32, 1u << mine % 32);
      }
      a.cells[size_t(pair) * a.top + place] = mine;
    }
  }

  /// Fetches the chosen rows, 16 bytes a thread; from pinned host memory, straight over the bus. Grid [pairs][blocks].
  SIMT static void gather(const RetrieveArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    const int pair = simt::block_y(), parts = a.head_dim / 8;  // of 16 bytes, a row
    for (int i = simt::block_x() * kThreads + simt::thread(); i < a.top * parts * 2; i += simt::blocks_x() * kThreads) {
      const bool is_key = i < a.top * parts;
      const int row = i / parts % a.top, part = i % parts, cell = a.cells[size_t(pair) * a.top + row];
      if (cell < 0) continue;
      const uint16_t* from =
          (is_key ? a.store_keys : a.store_values) + (size_t(pair) * a.store_cells + cell) * a.head_dim + part * 8;
      uint16_t* to = (is_key ? a.keys : a.values) + (size_t(pair) * a.top + row) * a.head_dim + part * 8;
      *reinterpret_cast<uint4*>(to) = simt::load_vector(from);
    }
  }
};

}  // namespace thimble::cuda
