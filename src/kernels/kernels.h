// The inner loops of attention, one table of functions for each instruction set. scalar.cpp is the specification;
// `kernels()` picks the fastest that the machine has, once.
//
// Scores are natural logits: score = softcap(scale * q.k) + slope * mask. The softmax is online (Milakov and
// Gimelshein, arXiv 1805.02867): `Softmax` holds the running maximum, the sum of exp(score - max) and the values
// weighted by it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "codec/head_codec.h"

namespace thimble {

/// The weight of a cell whose score is `below` (<= 0) the greatest one: exp(below), but 0 where that is under 2^-64.
/// Such a weight changes no sum of floats, and its products may be denormal numbers, with which arithmetic takes a
/// hundred times as long.
inline float weight_of(float below) {
  return below < -44.3614f ? 0.0f : std::exp(below);
}

/// The query rows that attend to one KV head: `group` heads for each of n_rows / group tokens, row = token * group + g.
struct Queries {
  int n_rows = 0;
  int group = 1;
  int dim = 0;
  const float* q = nullptr;      // [n_rows][dim], times the attention scale, in the domain of the keys attended to
  const float* bias = nullptr;   // [n_rows], added to q.k (of codes: q.mean + HeadCodec::score_bias), or null
  const float* slope = nullptr;  // [n_rows], ALiBi, or null for 1
  float softcap = 0;             // 0: none
  /// So many of a row's first numbers are multiplied by the cell's value, the others by its key (a latent row, MLA); 0:
  /// all are by its key. `dim` counts both. In tiles, k has the values' numbers, then the keys'.
  int of_values = 0;

  int of_keys() const { return dim - of_values; }
};

/// Additive f16 mask: data[t * stride + i] for token t and cell i, counted from the first of the cells that a call is
/// about; -inf: token t does not see the cell. Null data: all cells are visible.
struct Mask {
  const uint16_t* data = nullptr;
  ptrdiff_t stride = 0;
  Mask at(ptrdiff_t cell) const { return {data ? data + cell : nullptr, stride}; }
};

/// The running softmax of each query row.
struct Softmax {
  int dim = 0;           // head size of values
  float* max = nullptr;  // [n_rows], -inf at first
  float* sum = nullptr;  // [n_rows], 0 at first
  float* acc = nullptr;  // [n_rows][dim], 0 at first
};

/// Up to 64 cells as floats. Keys have their components outermost, so that loops run over cells.
struct Tile {
  int n_cells = 0;
  const float* k = nullptr;  // [dim][64]
  const float* v = nullptr;  // [64][value dim]
  uint64_t hidden = 0;       // bit i: cell i is left out, as its exact row is attended to in another tile
};

/// Writes a tile's values, [64][dim], as keys, [dim][64].
inline void values_as_keys(const float* v, int dim, float* k) {
  for (int d = 0; d < dim; d++) {
    for (int t = 0; t < kBlockCells; t++) k[d * kBlockCells + t] = v[t * dim + d];
  }
}

/// Scores that each query row gives to the cells of a stream, data[row * stride + cell], whole blocks of cells. Null
/// data: scores are not kept.
struct RowScores {
  float* data = nullptr;
  size_t stride = 0;
};

/// Coded blocks of one KV head and stream. They lie one behind the other; with a table (a paged cache), the stream's
/// block b is block table[b] of the head's memory.
struct CodedCells {
  const HeadCodec* keys = nullptr;
  const HeadCodec* values = nullptr;
  const uint8_t* k_blocks = nullptr;  // block 0 of the stream; with a table, block 0 of the head's memory
  const uint8_t* v_blocks = nullptr;
  const uint64_t* hidden = nullptr;     // [n_blocks] as Tile::hidden, or null
  int first_block = 0, last_block = 0;  // attend to [first_block, last_block)
  int n_cells = 0;                      // of the stream, to attend to; the last block may have more
  RowScores scores = {};                // written by score_codes, read by attend_codes
  const int32_t* table = nullptr;       // [n_blocks], or null
  size_t k_stride = 0, v_stride = 0;    // bytes from one block of memory to the next; 0: the format's block_bytes()

  const uint8_t* k_block(int b) const {
    return k_blocks + place(b) * (k_stride ? k_stride : keys->format.block_bytes());
  }
  const uint8_t* v_block(int b) const {
    return v_blocks + place(b) * (v_stride ? v_stride : values->format.block_bytes());
  }
  size_t place(int b) const { return size_t(table ? table[b] : b); }
};

/// Memory that kernels work in, kept from call to call; one to a thread.
class Scratch {
public:
  /// At least `bytes` of memory, aligned to 64 bytes. Its contents are lost at the next call.
  uint8_t* room(size_t bytes);

private:
  struct Free {
    void operator()(uint8_t* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  std::unique_ptr<uint8_t[], Free> memory_;
  size_t size_ = 0;
};

/// Up to this many query tokens look codes up. For more it is faster to decode a block and share it among them.
inline constexpr int kMaxCodeTokens = 8;

struct Kernels {
  const char* name;
  /// As encode_vector, bit for bit.
  uint16_t (*encode)(const HeadCodec& codec, const float* y, uint8_t* codes);
  /// The loops of transforms; they give the same bits on every machine.
  TransformOps transform;
  /// Decodes a block to a tile's k or v, by the codec's kind.
  void (*decode_block)(const HeadCodec& codec, const uint8_t* block, float* tile);
  /// Loads up to 64 rows of `dim` f16 numbers, at any address, into a tile's k or v. Cells of k beyond n become 0.
  void (*load_rows)(Kind kind, const uint8_t* const* rows, int n, int dim, float* tile);
  /// Which of up to 64 cells a token's mask leaves visible: bit i for cell i.
  uint64_t (*visible)(const uint16_t* mask, int n_cells);
  /// Adds a tile of numbers to the running softmax: for prefill and exact rows.
  void (*attend_tile)(const Queries&, const Tile&, const Mask&, Softmax&, Scratch&);
  /// Adds coded cells to the running softmax. For more than kMaxCodeTokens query tokens (prefill) it decodes each block
  /// once for all of them. The mask starts at the stream's cell 0. Where
  /// cells.scores has data, score_codes wrote it for the same queries and mask, and attention uses these scores;
  /// cells.hidden may hide more cells than it did then.
  void (*attend_codes)(const Queries&, const CodedCells&, const Mask&, Softmax&, Scratch&);
  /// Scores the cells of the blocks from their codes. Writes to best [cell of the stream, whole blocks] the greatest
  /// score that any query row gives a cell; -inf for cells that are hidden or that no row sees, +inf where a score is
  /// NaN. Where cells.scores has data, writes each row's scores there, -inf for cells that the row does not see; not
  /// for blocks of which no row sees any cell.
  void (*score_codes)(const Queries&, const CodedCells&, const Mask&, float* best, Scratch&);
  // Of such best scores, which hold no NaN:
  /// Writes to maxima [n_blocks] the greatest score of each block.
  void (*block_maxima)(const float* best, int n_blocks, float* maxima);
  /// Which scores of a block are `bound` or more: bit i for cell i.
  uint64_t (*at_least)(const float* best, float bound);
};

const Kernels& scalar_kernels();

/// The fastest table for this machine, or the one that the environment variable THIMBLE_ISA names (scalar, avx2,
/// avx512, neon). Throws std::runtime_error where THIMBLE_ISA names one that this machine or build lacks.
const Kernels& kernels();
/// All tables that this machine can run, slowest first.
std::vector<const Kernels*> available_kernels();

}  // namespace thimble
