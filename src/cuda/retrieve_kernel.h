// Retrieval: the k cells of greatest score, and their rows from an exact store. Kernels' bodies; a block serves one
// stream and KV head.
#pragma once

#include "cuda/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

struct RetrieveKernel {
  static constexpr int kThreads = 512, kWarps = kThreads / 32, kBins = 256;

  static constexpr int kMaxCandidates = 4096;

  struct Shared {
    int bins[kBins];
    uint32_t prefix;  // of the k-th greatest key, as far as it is known
    int rank;         // of that key among those that share the prefix, from 1
    int counts[kWarps][2];
    int32_t candidates[kMaxCandidates];
  };
  static constexpr size_t kSharedBytes = sizeof(Shared);

  /// Order of floats as order of unsigned numbers. NaN counts as greatest, so that it is attended to and shows.
  SIMT static uint32_t key_of(float x) {
    const uint32_t bits = simt::float_to_bits(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  static constexpr uint32_t kLowest = 0x007fffffu;  // key of -infinity

  /// The k-th greatest of n keys, 8 bits a pass; `rank`: how many of its equals are among the first k. Keys of
  /// -infinity do not count; where there are fewer than k others, the result is 0.
  template <typename Key>
  SIMT static uint32_t kth_greatest(Shared& s, int n, int k, Key key_at, int& rank) {
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
        const uint32_t key = key_at(i);
        if ((key & known) == prefix && key > kLowest) simt::atomic_add(&s.bins[key >> shift & 255], 1);
      }
      simt::sync();
      if (tid == 0) {
        int bin = kBins - 1, left = s.rank;
        while (bin > 0 && left > s.bins[bin]) left -= s.bins[bin--];
        s.prefix |= uint32_t(bin) << shift;
        s.rank = left;
      }
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
        before[0] += simt::popcount(simt::ballot(c[k] == 1));
        before[1] += simt::popcount(simt::ballot(c[k] == 2));
      }
    }
    if (lane == 0) {
      s.counts[warp][0] = before[0];
      s.counts[warp][1] = before[1];
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
      classes(first, c);
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
    const int pair = simt::block_y(), tid = simt::thread();
    const float* scores = a.scores + size_t(pair) * a.n_cells;

    // Bits of what is exact already.
    const int n_words = a.n_cells / 32, stream = pair / a.n_kv_heads;
    uint32_t* hidden = a.all_hidden + size_t(pair) * n_words;
    for (int i = tid; i < n_words; i += kThreads) {
      hidden[i] = a.hidden ? a.hidden[stream * a.hidden_stream_stride + i] : 0;
    }
    int32_t* cells = a.cells + size_t(pair) * a.top;
    for (int i = tid; i < a.top; i += kThreads) cells[i] = -1;

    // The k-th greatest of the threads' greatest keys is a bound that k cells reach, and few more.
    uint32_t greatest = 0;
    SIMT_UNROLL_SOME
    for (int i = tid; i < a.n_cells; i += kThreads) {
      const uint32_t key = key_of(scores[i]);
      greatest = key > greatest ? key : greatest;
    }
    int rank = 0;
    uint32_t bound = a.top <= kThreads ? kth_greatest(
                                             s, kThreads, a.top, [&](int) { return greatest; }, rank)
                                       : 0;
    bound = bound > kLowest ? bound : kLowest + 1;
    const int n_candidates = in_order(
        s, a.n_cells, [&](int i) { return key_of(scores[i]) >= bound ? 1 : 0; },
        [&](int i, int at, int) {
          if (at < kMaxCandidates) s.candidates[at] = i;
        });

    const auto pick = [&](int n, auto cell_at) {
      const auto key_at = [&](int i) { return key_of(scores[cell_at(i)]); };
      const uint32_t threshold = kth_greatest(s, n, a.top, key_at, rank);
      const int wanted = rank;  // of those that equal the threshold: the first ones
      in_order(
          s, n,
          [&](int i) {
            const uint32_t key = key_at(i);
            return key <= kLowest ? 0 : key > threshold ? 1 : key == threshold ? 2 : 0;
          },
          [&](int i, int greater, int equal) {
            const int cell = cell_at(i);
            if (key_at(i) == threshold && equal >= wanted) return;
            cells[greater + (equal < wanted ? equal : wanted)] = cell;
            simt::atomic_or(hidden + cell / 32, 1u << cell % 32);
          });
    };
    if (n_candidates <= kMaxCandidates) {
      pick(n_candidates, [&](int i) { return s.candidates[i]; });
    } else {  // many equals
      pick(a.n_cells, [](int i) { return i; });
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
