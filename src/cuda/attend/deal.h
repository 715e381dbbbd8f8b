// Decode attention: how work is dealt out to thread blocks. No CUDA in it, so that tests tell what is chosen where.
#pragma once

#include <algorithm>

#include "cuda/attend/shape.h"

namespace thimble::cuda {

/// Blocks of coded cells that take as long as a stream's exact rows, which are one split's; where that is more than a
/// split's share, all of it.
inline int exact_blocks(int n_blocks, int n_exact, int splits) {
  constexpr int kFixed = 32, kRowsPerBlock = 32;
  return splits == 1 || n_exact == 0 ? 0 : std::min(kFixed + n_exact / kRowsPerBlock, n_blocks / (splits - 1));
}

/// How a stream's cells are split, or how many streams a thread block takes at once.
struct Deal {
  int n_splits = 1, batch_shift = 0, cost = 0;
};

/// What a device and a format allow.
struct DealOptions {
  int lanes, warps;     // thread blocks that share a KV head and a row group; warps of each
  bool pairs, batches;  // of streams
};

inline DealOptions deal_options(int head_dim, int key_width, int value_width, int lanes, bool batches) {
  return {lanes, attend_warps(head_dim, key_width, value_width), batches && has_pairs(head_dim, key_width),
          batches && has_direct(head_dim, key_width)};
}

/// The deal that makes the busiest thread block end first. Each warp of a block takes blocks of 64 cells in turns; an
/// item costs about three turns for its score table and for adding up, a batch of them the same, or a fourth for the
/// second of a pair's tables, and where the cells are split, thread blocks meet. Without score tables, as in batches, a
/// turn takes a fifth longer where those would be of bytes (formats that have pairs). In fifths of a turn:
inline Deal choose_deal(int n_streams, int n_blocks, int n_exact, const DealOptions& options) {
  constexpr int kTurn = 5, kItemCost = 3 * kTurn, kPairCost = 4 * kTurn, kMeetCost = kTurn;
  const int batch_turn = options.pairs ? 6 : kTurn;
  const auto rounds = [&](int n) { return (n + options.lanes - 1) / options.lanes; };
  Deal best;
  for (int splits = 1; splits <= std::max(1, std::min(options.lanes, n_blocks + (n_exact > 0))); splits++) {
    const int share = (n_blocks + exact_blocks(n_blocks, n_exact, splits) + splits - 1) / splits;
    const int turns = (share + options.warps - 1) / options.warps;
    const int cost = rounds(n_streams * splits) * (turns * kTurn + kItemCost) + (splits > 1 ? kMeetCost : 0);
    if (splits == 1 || cost < best.cost) best = {splits, 0, cost};
  }
  for (int shift = 1; 1 << shift <= std::min(kMaxBatch, n_streams); shift++) {
    const bool is_pair = shift == 1 && options.pairs;
    if (!is_pair && !options.batches) continue;
    const int share = options.warps >> shift, turns = (n_blocks + share - 1) / share;
    const int cost = rounds((n_streams + (1 << shift) - 1) >> shift) *
                     (is_pair ? turns * kTurn + kPairCost : turns * batch_turn + kItemCost);
    if (cost < best.cost) best = {1, shift, cost};
  }
  return best;
}

}  // namespace thimble::cuda
