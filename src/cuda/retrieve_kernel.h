// Retrieval: the k cells of greatest score, and their rows from an exact store. Kernels' bodies; a block serves one
// stream and KV head.
#pragma once

#include "cuda/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

struct RetrieveKernel {
  static constexpr int kThreads = 512, kWarps = kThreads / 32, kBins = 256;

  struct Shared {
    int bins[kBins];
    uint32_t prefix;  // of the k-th greatest key, as far as it is known
    int rank;         // of that key among those that share the prefix, from 1
    int counts[kWarps][2];
  };
  static constexpr size_t kSharedBytes = sizeof(Shared);

  /// Order of floats as order of unsigned numbers. NaN counts as greatest, so that it is attended to and shows.
  SIMT static uint32_t key_of(float x) {
    const uint32_t bits = simt::float_to_bits(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  static constexpr uint32_t kLowest = 0x007fffffu;  // key of -infinity

  /// Chooses the cells: the key of the k-th by radix, 8 bits a pass, then all greater ones and the first equal ones.
  /// Cells come out in ascending order; where fewer than k are to be seen, the rest is -1.
  SIMT static void choose(const RetrieveArgs& a) {
    simt::launch_dependents();
    simt::wait_for_previous_grid();
    Shared& s = *reinterpret_cast<Shared*>(simt::shared());
    const int pair = simt::block_y(), tid = simt::thread();
    const float* scores = a.scores + size_t(pair) * a.n_cells;
    if (tid == 0) {
      s.prefix = 0;
      s.rank = a.top;
    }
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int i = tid; i < kBins; i += kThreads) s.bins[i] = 0;
      simt::sync();
      const uint32_t known = shift == 24 ? 0 : ~0u << (shift + 8), prefix = s.prefix;
      for (int i = tid; i < a.n_cells; i += kThreads) {
        const uint32_t key = key_of(scores[i]);
        if ((key & known) == prefix && key > kLowest) simt::atomic_add(&s.bins[key >> shift & 255], 1);
      }
      simt::sync();
      if (tid == 0) {
        int bin = kBins - 1, rank = s.rank;
        while (bin > 0 && rank > s.bins[bin]) rank -= s.bins[bin--];
        s.prefix |= uint32_t(bin) << shift;
        s.rank = rank;
      }
      simt::sync();
    }
    const uint32_t threshold = s.prefix;
    const int equal_wanted = s.rank;  // of those that equal the threshold

    // Bits of what is exact already; then the chosen ones, in order of cells.
    const int n_words = a.n_cells / 32, stream = pair / a.n_kv_heads;
    uint32_t* hidden = a.all_hidden + size_t(pair) * n_words;
    for (int i = tid; i < n_words; i += kThreads) {
      hidden[i] = a.hidden ? a.hidden[stream * a.hidden_stream_stride + i] : 0;
    }
    int32_t* cells = a.cells + size_t(pair) * a.top;
    for (int i = tid; i < a.top; i += kThreads) cells[i] = -1;
    simt::sync();
    int greater_before = 0, equal_before = 0;  // in earlier rounds, the same in all threads
    const int warp = tid / 32, lane = tid % 32;
    for (int first = 0; first < a.n_cells; first += kThreads) {
      const int cell = first + tid;
      const uint32_t key = cell < a.n_cells ? key_of(scores[cell]) : 0;
      const bool seen = key > kLowest, greater = seen && key > threshold, equal = seen && key == threshold;
      const uint32_t greater_lanes = simt::ballot(greater), equal_lanes = simt::ballot(equal);
      if (lane == 0) {
        s.counts[warp][0] = popcount(greater_lanes);
        s.counts[warp][1] = popcount(equal_lanes);
      }
      simt::sync();
      int greater_here = greater_before, equal_here = equal_before;
      for (int w = 0; w < kWarps; w++) {
        if (w < warp) {
          greater_here += s.counts[w][0];
          equal_here += s.counts[w][1];
        }
        greater_before += s.counts[w][0];
        equal_before += s.counts[w][1];
      }
      const uint32_t lower = (1u << lane) - 1;
      greater_here += popcount(greater_lanes & lower);
      equal_here += popcount(equal_lanes & lower);
      if (greater || (equal && equal_here < equal_wanted)) {
        cells[greater_here + (equal_here < equal_wanted ? equal_here : equal_wanted)] = cell;
        simt::atomic_or(hidden + cell / 32, 1u << cell % 32);
      }
      simt::sync();
    }
  }

  SIMT static int popcount(uint32_t x) {
    x = x - (x >> 1 & 0x55555555u);
    x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
    return int(((x + (x >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
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
