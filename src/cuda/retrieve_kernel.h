// Retrieval: the k cells of greatest score, and their rows from an exact store. Kernels' bodies; a block serves one
// stream and KV head.
//
// Scoring leaves the greatest score of every block of 64 cells beside the scores. The k-th greatest of these is a bound
// that at least k cells reach, and few more; the scores of the other blocks are never read.
#pragma once

#include "cuda/layout.h"
#include "cuda/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

struct RetrieveKernel {
  static constexpr int kThreads = 512, kWarps = kThreads / 32, kBins = 256;

  static constexpr int kMaxListed = 4096;

  struct Shared {
    int bins[kBins];
    uint32_t prefix;  // of the k-th greatest key, as far as it is known
    int rank;         // of that key among those that share the prefix, from 1
    int counts[kWarps][2];
    uint32_t keys[kMaxListed];  // of blocks, then of candidates
    int32_t blocks[kMaxListed];
    int32_t candidates[kMaxListed];
  };
  static constexpr size_t kSharedBytes = sizeof(Shared);

  /// Order of floats as order of unsigned numbers. NaN counts as greatest, so that it is attended to and shows.
  SIMT static uint32_t key_of(float x) {
    const uint32_t bits = simt::float_to_bits(x + 0.0f);  // zeros are equal
    if ((bits & 0x7fffffffu) > 0x7f800000u) return ~0u;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  static constexpr uint32_t kLowest = 0x007fffffu;  // key of -infinity

  /// The greatest key over row groups, whose scores lie `stride` apart.
  SIMT static uint32_t key_at(const float* scores, int row_groups, size_t stride, int i) {
    uint32_t greatest = key_of(scores[i]);
    for (int r = 1; r < row_groups; r++) {
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
    // Where there are too few keys, the last bin.
    if (sum - mine >= rank || (sum < rank && lane < 31)) return;
    int bin = first, left = rank - (sum - mine);
    while (bin > first - kShare + 1 && left > s.bins[bin]) left -= s.bins[bin--];
    s.prefix |= uint32_t(bin) << shift;
    s.rank = left;
  }

  /// The k-th greatest of n keys, 8 bits a pass; `rank`: how many of its equals are among the first k. Keys of
  /// -infinity do not count; where there are fewer than k others, the result is 0.
  template <typename Key>
  SIMT static uint32_t kth_greatest(Shared& s, int n, int k, Key key, int& rank) {
    const int tid = simt::thread();
    simt::sync();
    if (tid == 0) {
      s.prefix = 0;
      s.rank = k;
    }
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
    rank = s.rank;
    return s.prefix;
  }

  /// Goes through i = 0 .. n - 1, a contiguous part to each warp, and calls take(i, number of earlier ones of class 1,
  /// of class 2) for every i with class_of(i) 1 or 2. Returns how many there are of either class.
  template <typename Class, typename Take>
  SIMT static int in_order(Shared& s, int n, Class class_of, Take take) {
    const int warp = simt::thread() / 32, lane = simt::thread() % 32;
    const int part = (n + kThreads - 1) / kThreads * 32, begin = warp * part, end = begin + part < n ? begin + part : n;
    int before[2] = {0, 0}, total = 0;
    simt::sync();
    // Many at a time, for the sake of the loads behind class_of.
    constexpr int kBatch = 8;
    const auto classes = [&](int first, int(&c)[kBatch]) {
      SIMT_UNROLL
      for (int k = 0; k < kBatch; k++) {
        const int i = first + k * 32 + lane;
        c[k] = i < end ? class_of(i) : 0;
      }
    };
    int c[kBatch];
    for (int first = begin; first < end; first += 32 * kBatch) {
      classes(first, c);
      SIMT_UNROLL
      for (int k = 0; k < kBatch; k++) {
        for (int i = 0; i < 2; i++) before[i] += simt::popcount(simt::ballot(c[k] == i + 1));
      }
    }
    if (lane == 0) {
      for (int i = 0; i < 2; i++) s.counts[warp][i] = before[i];
    }
    simt::sync();
    before[0] = before[1] = 0;
    for (int w = 0; w < kWarps; w++) {
      for (int i = 0; i < 2; i++) {
        if (w < warp) before[i] += s.counts[w][i];
        total += s.counts[w][i];
      }
    }
    for (int first = begin; first < end; first += 32 * kBatch) {
      if (end - begin > 32 * kBatch) classes(first, c);  // else they are still known
      SIMT_UNROLL
      for (int k = 0; k < kBatch; k++) {
        if (!simt::any(c[k] != 0)) continue;
        const uint32_t ones = simt::ballot(c[k] == 1), twos = simt::ballot(c[k] == 2), lower = (1u << lane) - 1;
        if (c[k] != 0) {
          take(first + k * 32 + lane, before[0] + simt::popcount(ones & lower),
               before[1] + simt::popcount(twos & lower));
        }
        before[0] += simt::popcount(ones);
        before[1] += simt::popcount(twos);
      }
    }
    simt::sync();
    return total;
  }

  /// Chooses the cells. Where fewer than k are to be seen, the rest is -1.
  SIMT static void choose(const RetrieveArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    Shared& s = *reinterpret_cast<Shared*>(simt::shared());
    const int pair = simt::block_y(), tid = simt::thread(), n_blocks = a.n_cells / kBlockCells;
    const float* scores = a.scores + size_t(pair) * a.row_groups * a.n_cells;
    const float* tops = a.tops + size_t(pair) * a.row_groups * n_blocks;
    uint32_t* hidden = a.all_hidden + size_t(pair) * (a.n_cells / 32);
    int32_t* cells = a.cells + size_t(pair) * a.top;
    for (int i = tid; i < a.top; i += kThreads) cells[i] = -1;

    const bool cached = n_blocks <= kMaxListed;
    for (int i = tid; cached && i < n_blocks; i += kThreads) s.keys[i] = key_at(tops, a.row_groups, n_blocks, i);
    const auto block_key = [&](int i) { return cached ? s.keys[i] : key_at(tops, a.row_groups, n_blocks, i); };
    int rank = 0;
    uint32_t bound = kth_greatest(s, n_blocks, a.top, block_key, rank);
    bound = bound > kLowest ? bound : kLowest + 1;
    const int n_listed = in_order(
        s, n_blocks, [&](int i) { return block_key(i) >= bound ? 1 : 0; },
        [&](int i, int at, int) {
          if (at < kMaxListed) s.blocks[at] = i;
        });

    const auto pick = [&](int n, auto cell_at, auto key) {
      const uint32_t threshold = kth_greatest(s, n, a.top, key, rank);
      const int wanted = rank;  // of those that equal the threshold: the first ones
      in_order(
          s, n,
          [&](int i) {
            const uint32_t x = key(i);
            return x <= kLowest ? 0 : x > threshold ? 1 : x == threshold ? 2 : 0;
          },
          [&](int i, int greater, int equal) {
            const int cell = cell_at(i);
            if (key(i) == threshold && equal >= wanted) return;
            cells[greater + (equal < wanted ? equal : wanted)] = cell;
            simt::atomic_or(hidden + cell / 32, 1u << cell % 32);
          });
    };
    const auto score_key = [&](int cell) { return key_at(scores, a.row_groups, a.n_cells, cell); };
    if (n_listed > kMaxListed) {  // many equals, or many to choose
      return pick(
          a.n_cells, [](int i) { return i; }, score_key);
    }
    const auto listed = [&](int i) { return s.blocks[i / kBlockCells] * kBlockCells + i % kBlockCells; };
    const auto listed_key = [&](int i) { return score_key(listed(i)); };
    const int n_candidates = in_order(
        s, n_listed * kBlockCells, [&](int i) { return listed_key(i) >= bound ? 1 : 0; },
        [&](int i, int at, int) {
          if (at >= kMaxListed) return;
          s.candidates[at] = listed(i);
          s.keys[at] = listed_key(i);
        });
    if (n_candidates > kMaxListed) return pick(n_listed * kBlockCells, listed, listed_key);
    pick(
        n_candidates, [&](int i) { return s.candidates[i]; }, [&](int i) { return s.keys[i]; });
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
