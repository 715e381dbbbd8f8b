// Decode attention: how many thread blocks share a stream, or how many streams share a thread block. No CUDA in it, so
// that tests run it anywhere.
#pragma once

#include <algorithm>

#include "cuda/attend/shape.h"

namespace thimble::cuda {

/// How many blocks of 64 coded cells take as long as a stream's exact rows. The stream's first split attends to these
/// rows and so gets that many blocks fewer than the other splits, at most its whole share.
inline int exact_blocks(int n_blocks, int n_exact, int splits) {
  constexpr int kFixed = 32, kRowsPerBlock = 32;
  return splits == 1 || n_exact == 0 ? 0 : std::min(kFixed + n_exact / kRowsPerBlock, n_blocks / (splits - 1));
}

/// Either n_splits thread blocks share each stream's cells, or each thread block takes 2^batch_shift streams at once.
/// `cost` is the time that the busiest thread block takes, in fifths of a turn (see choose_deal).
struct Deal {
  int n_splits = 1, batch_shift = 0, cost = 0;
};

/// What a device and a format allow choose_deal to choose.
struct DealOptions {
  int lanes, warps;     // thread blocks for one KV head and row group; warps of each
  bool pairs, batches;  // whether there are kernels for two streams at once, and for up to kMaxBatch
};

inline DealOptions deal_options(int head_dim, int key_width, int value_width, int lanes, bool batches) {
  return {lanes, attend_warps(head_dim, key_width, value_width), batches && has_pairs(head_dim, key_width),
          batches && has_direct(head_dim, key_width)};
}

/// Chooses the deal with which the busiest thread block ends first.
///
/// A turn is the time that a warp takes for a block of 64 cells. Costs are counted in fifths of a turn:
///   an item        3 turns for its score table and for adding up the warps' results, and its share of turns
///   a split stream 1 turn more, in which its thread blocks add up their results
///   a pair         4 turns, as it has two score tables, and its turns
///   a batch        3 turns and its turns. It has no score table; in formats whose score tables are of bytes (those
///   that
///                  have pairs) each of its turns takes a fifth longer
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
