// Retrieval: the bodies of the kernels that choose the k cells of greatest score and fetch their rows from an exact
// store. A thread block serves one stream and KV head.
//
// Scoring also writes the greatest score of every block of 64 cells. The k best cells lie in the k blocks with the
// greatest of these, as each such block has a cell that is better than all cells of any other block. So only the scores
// of k blocks are read, and only cells that reach the least of these k maxima become candidates. A cell is better than
// another if its score is greater, or equal and its index lower.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/layout.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

struct RetrieveKernel {
  static constexpr int kThreads = 512, kBins = 256;
  static constexpr int kListed = 4096;

  struct Shared {
    int bins[kBins];
    uint32_t prefix;          // the leading bits of the k-th greatest key that are known so far
    int rank;                 // of that key among the keys with this prefix, from 1
    int count;                // entries of the list that is being made
    uint32_t keys[kListed];   // keys of blocks, then of candidates
    int32_t cells[kListed];   // cells of candidates
    int32_t blocks[kListed];  // the k best blocks, in any order
    int32_t chosen[kListed];  // the chosen cells, in any order
  };
  static constexpr size_t kSharedBytes = sizeof(Shared);
  static_assert(offsetof(Shared, prefix) == kBins * sizeof(int) && offsetof(Shared, keys) % 4 == 0);
  static_assert(kSharedBytes == (kBins + 3 + 4 * kListed) * 4);
  static_assert(kMaxTop <= kListed);

  /// Maps floats to unsigned numbers of the same order. NaN is the greatest, so that its cell is attended to and the
  /// error is seen.
  SIMT static uint32_t key_of(float x) {
    const uint32_t bits = simt::float_to_bits(x + 0.0f);  // zeros are equal
    if ((bits & 0x7fffffffu) > 0x7f800000u) return ~0u;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  static constexpr uint32_t kLowest = 0x007fffffu;  // key of -infinity

  /// The greatest key over row groups, whose scores lie `stride` apart. With one group there is no loop, so that the
  /// compiler issues the loads of several calls together.
  template <bool OneGroup>
  SIMT static uint32_t key_at(const float* scores, int row_groups, size_t stride, int i) {
    uint32_t greatest = key_of(scores[i]);
    for (int r = 1; !OneGroup && r < row_groups; r++) {
      const uint32_t key = key_of(scores[r * stride + i]);
      greatest = key > greatest ? key : greatest;
    }
    return greatest;
  }

  /// Finds the bin of the s.rank-th greatest key. One warp calls it.
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
    // With fewer keys than s.rank, the last lane takes the last bin.
    if (sum - mine >= rank || (sum < rank && lane < 31)) return;
    int bin = first, left = rank - (sum - mine);
    while (bin > first - kShare + 1 && left > s.bins[bin]) left -= s.bins[bin--];
    s.prefix |= uint32_t(bin) << shift;
    s.rank = left;
  }

  /// Finds the k-th greatest of n keys, 8 bits a pass. Afterwards s.rank is the number of keys equal to it among the
  /// first k, and s.bins[its low byte] is the number of all keys equal to it. Keys of -infinity do not count; with
  /// fewer than k other keys the result is 0.
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

  /// Admits the k best of some keys, or all of them if there are no more than k.
  struct Bound {
    uint32_t key;
    uint32_t last;  // the greatest index that is admitted with exactly this key
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

  /// Calls take(i, place in the list) for all i < n that qualify, in any order, and returns their number. A thread
  /// takes kBatch of them at a time, so that the loads in `qualifies` are under way together.
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

  /// Chooses the cells and writes them in order. If fewer than k are not masked or hidden, the rest is -1. `OneGroup`:
  /// a.row_groups is 1.
  template <bool OneGroup>
  SIMT static void choose(const RetrieveArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    Shared& s = *reinterpret_cast<Shared*>(simt::shared());
    const int pair = simt::block_y(), tid = simt::thread(), n_blocks = a.n_cells / kBlockCells;
    const float* scores = a.scores + size_t(pair) * a.row_groups * a.n_cells;
    const float* block_maxima = a.block_maxima + size_t(pair) * a.row_groups * n_blocks;

    const bool cached = n_blocks <= kListed;
    const auto maximum_key = [&](int i) { return key_at<OneGroup>(block_maxima, a.row_groups, n_blocks, i); };
    if (cached) {
      constexpr int kShare = kListed / kThreads;
      uint32_t key[kShare];
      SIMT_UNROLL
      for (int k = 0; k < kShare; k++) key[k] = tid + k * kThreads < n_blocks ? maximum_key(tid + k * kThreads) : 0;
      SIMT_UNROLL
      for (int k = 0; k < kShare; k++) s.keys[tid + k * kThreads] = key[k];
    }
    const auto block_key = [&](int i) { return cached ? s.keys[i] : maximum_key(i); };
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
    const bool fit = n_reach <= kListed;  // else scores are read again for every pass
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

  /// Fetches the rows of the chosen cells, 16 bytes a thread, from pinned host memory over the bus. Grid
  /// [pairs][blocks].
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
