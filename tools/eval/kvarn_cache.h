// Emulates KVarN (arXiv 2606.03458, and the vLLM backend of its authors, issue 46613 there), for comparison. It needs
// no calibration. Tokens form tiles of 128. Of each sequence the first tile stays exact, and so does a tile that is not
// full; the others are coded, one KV head's keys or values of a tile at a time:
//   - Vectors are rotated by a Hadamard matrix.
//   - Rows and columns of the tile are divided by scales, in turns, 16 times, until both have like standard deviations;
//     the scales of the best turn count.
//   - Each row, which is a channel of keys or a token of values, is rounded to 2^bits equally spaced levels from its
//     least to its greatest number.
// A row's scale and least number and a column's scale are f16. Published are 4 bits for keys and 2 for values; the
// scales of a tile take 3 * 128 f16 numbers where the head size is 128.
#pragma once

#include <map>
#include <utility>
#include <vector>

#include "eval/emulated_cache.h"

namespace thimble {

namespace kvarn {

inline constexpr int kTile = 128;         // cells
inline constexpr int kExact = 2 * kTile;  // the first tile, and one that is not full
inline constexpr int kTurns = 16;         // in which a tile is balanced

/// Bits that a number takes, with the tile's scales.
double bits(Kind kind, int head_dim, int bits);

/// Scales for which a matrix [n_rows][n_columns], divided by them, has rows and columns of like standard deviations.
struct Scales {
  std::vector<float> row, column;
};
Scales balance(const std::vector<float>& matrix, int n_rows, int n_columns);

/// Codes and decodes a tile of one KV head, [kTile][head_dim], in place.
void code_tile(float* tile, int head_dim, Kind kind, int bits);

}  // namespace kvarn

class KvarnCache : public EmulatedCache {
public:
  /// `layers`: whether each layer is coded; `head_dims` [n_layers][2], by Kind.
  KvarnCache(int key_bits, int value_bits, std::vector<bool> layers, std::vector<std::pair<int, int>> head_dims)
      : bits_{key_bits, value_bits}, layers_(std::move(layers)), head_dims_(std::move(head_dims)) {}

  void clear() override { n_coded_.clear(); }

private:
  void stored(const ggml_tensor* cache, int layer, Kind kind, int first_written, int n_written) override;
  void attended(ggml_tensor*, int) override {}
  bool attends(int) const override { return false; }

  int bits_[2];
  std::vector<bool> layers_;
  std::vector<std::pair<int, int>> head_dims_;
  std::map<std::pair<int, Kind>, int> n_coded_;  // tiles, counted with the first
};

}  // namespace thimble
