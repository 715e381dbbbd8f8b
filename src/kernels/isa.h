// What one instruction set has to provide: the loops over cells, on plain pointers. Everything around them (blocks,
// masks, skipping, the running softmax) is written once, in blocked.cpp, at the compiler's baseline.
//
// The units that define these tables are compiled with flags of their own. They include this header, intrinsics and
// code in an anonymous namespace (vector/), nothing else: the linker might keep their copy of a shared header's inline
// function, which would then run on machines without the instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace thimble {

inline constexpr float kLog2e = 1.44269504f;
inline constexpr float kUnseen = -__builtin_inff();        // score of a cell that a query row does not attend to
inline constexpr int kLine = 64;                           // cells of a block, bytes of a row of codes
inline constexpr int kSuperblock = 16;                     // blocks that one step of the softmax is done for
inline constexpr int kSuperblockCells = 64 * kSuperblock;  // also the stride between rows of scores and weights
inline constexpr int kRowsAtOnce = 4;                      // query rows that share one pass over codes

/// The first `lines` lines of 64 bytes of each block, to be prefetched while other blocks are worked on.
struct Prefetch {
  const uint8_t* const* blocks;
  int n_blocks;
  int lines;
};

/// Four components of a value (or its last two), and which rows of codes they are looked up with.
struct ValueGroup {
  int16_t component;   // first
  int16_t code_row;    // of the first two components
  int16_t code_row2;   // of the last two: the same for widths of 4 and 8
  int16_t components;  // 4 or 2
};

struct MaskBits {
  uint64_t visible;  // not -inf
  bool adds;         // some visible cell has a mask that is not 0
};

/// Dither that is added to weights before they are rounded: numbers between -1/2 and 1/2, in bit-reversed order, so
/// that those of adjacent cells are spread evenly.
struct Dither {
  alignas(64) float at[64];
  constexpr Dither() : at() {
    for (int cell = 0; cell < 64; cell++) {
      int reversed = 0;
      for (int bit = 0; bit < 6; bit++) reversed |= (cell >> bit & 1) << (5 - bit);
      at[cell] = (float(reversed) + 0.5f) / 64 - 0.5f;
    }
  }
};
inline constexpr Dither kDither;

/// Encoding, decoding and dense attention.
struct TileOps {
  // -- codec: bit-exact, a multiply and an add for every product, in index order --

  /// Writes the codes of `n_subspaces` adjacent subspaces of one width to `codes`. `y` [n_subspaces * width] times
  /// `inverse_rms` is what is coded; `words` and `half_norms` are those of HeadCodec, from the first subspace on.
  void (*nearest)(const float* y, float inverse_rms, const float* words, const float* half_norms, int width,
                  int n_subspaces, uint8_t* codes);
  /// out[r] = x[r] m, for rows of dim numbers and m [dim][dim].
  void (*times_matrix)(const float* x, int n_rows, const float* m, int dim, float* out);
  /// Walsh-Hadamard butterflies in place, in blocks of `block` numbers, then all times `norm`.
  void (*hadamard)(float* x, int n, int block, float norm);

  // -- tiles --

  /// Decodes a block to a tile: keys [dim][64], values [64][dim]. `cell_scales`: the block's 64 f16 scales. `code_row`
  /// and `scale` [dim]: the row of codes of each component and its subspace's scale.
  void (*decode_keys)(const uint8_t* block, const uint8_t* cell_scales, const int8_t* words, const uint8_t* code_row,
                      const float* scale, int dim, float* tile);
  void (*decode_values)(const uint8_t* block, const uint8_t* cell_scales, const int8_t* words, const uint8_t* code_row,
                        const float* scale, int dim, float* tile);
  /// Loads up to 64 rows of f16 (at any address) into a tile; cells n to 63 of a key tile become 0.
  void (*load_keys)(const uint8_t* const* rows, int n, int dim, float* tile);
  void (*load_values)(const uint8_t* const* rows, int n, int dim, float* tile);
  /// c[rows][n] = a[rows][k] b[k][n]; where `add`, c += the product.
  void (*multiply)(const float* a, int a_stride, const float* b, int b_stride, int rows, int k, int n, float* c,
                   int c_stride, bool add);

  // -- softmax --

  /// Reads 64 numbers of an f16 mask.
  MaskBits (*mask_bits)(const uint16_t* mask);
  /// Turns q.k of n_blocks * 64 cells into scores, in place: adds `bias`, applies the softcap, adds slope * mask
  /// (`masks` by block; null: nothing is added), and writes kUnseen where a cell's bit in `visible` (by block) is not
  /// set. Returns the greatest score. `log_weight`, if not null, has for each cell log2 of the factor that its weight
  /// will be multiplied by; *max_log then becomes the maximum of score * log2(e) + log_weight.
  float (*finish_scores)(float* scores, int n_blocks, const uint64_t* visible, const uint16_t* const* masks, float bias,
                         float slope, float softcap, const float* log_weight, float* max_log);
  /// Writes to best[i] the greatest of scores[row * stride + i] and, where `raises`, best[i]; +inf where a score is
  /// NaN. n_cells is a multiple of 64.
  void (*best_of_rows)(const float* scores, size_t stride, int n_rows, int n_cells, bool raises, float* best);
  /// Writes to maxima [n_blocks] the greatest of each 64 scores, of which none is NaN.
  void (*block_maxima)(const float* scores, int n_blocks, float* maxima);
  /// Which of 64 scores are `bound` or more: bit i for score i.
  uint64_t (*at_least)(const float* scores, float bound);
  /// Replaces scores by exp(score - max), in place; returns their sum.
  float (*exponentiate)(float* scores, int n_cells, float max);

  // -- prompts: products of whole numbers of 16 bits, of which a register holds twice as many as floats. Null where
  // the instruction set has no fast ones; prompts then go through tiles of floats. --

  /// Decodes a block's codewords, without any scale: keys to [dim / 2][64][2], values to [32][padded_columns(dim)][2],
  /// so that the two numbers that are multiplied for one sum lie together. Columns behind `dim` become 0.
  void (*key_words)(const uint8_t* block, const int8_t* words, const uint8_t* code_row, int dim, int16_t* tile);
  void (*value_words)(const uint8_t* block, const int8_t* words, const uint8_t* code_row, int dim, int16_t* tile);
  /// c[r][j] = c[r][j] * shrink[r] + factor[r] * scale[j] * the sum over i < pairs of the products of a[r][i] and
  /// b[i][j], both pairs. Null `shrink`: c is not read. Strides of a and b count pairs. Sums must fit 32 bits.
  void (*multiply_words)(const int16_t* a, int a_stride, const int16_t* b, int b_stride, int rows, int pairs, int n,
                         const float* factor, const float* scale, const float* shrink, float* c, int c_stride);
  /// Writes exp(score - max) * 2^lift * scale of 64 cells as whole numbers, rounded with kDither. Returns the sum of
  /// exp(score - max) * 2^lift.
  float (*word_weights)(const float* scores, float max, float lift, const float* scales, int16_t* weights);
};

/// Columns of a tile of 16-bit numbers.
constexpr int padded_columns(int n) {
  return (n + 15) / 16 * 16;
}
inline constexpr float kWordWeightBits = 14.98f;  // log2 of the largest weight that word_weights takes

/// Attention from codes, for up to kRowsAtOnce query rows at once. Scores and weights of a row lie kSuperblockCells
/// behind those of the row before.
struct CodeOps {
  float weight_bits[2];  // log2 of the largest weight that code_weights takes: narrow, wide

  /// Bytes of the tables that build_luts makes for one query row.
  size_t (*lut_bytes)(int dim, int n_subspaces, bool wide);
  /// Makes one query row's tables in `luts` (at a multiple of 64 bytes): for every subspace and codeword its product
  /// with the query in whole steps, as a number of 8 bits or, where `wide`, of 16. Only look_up reads them, so each
  /// instruction set lays them out as it likes. `q` [dim] is the query times the subspaces' scales; `words` and `width`
  /// are the codebook's. `room` is scratch of n_subspaces * 129 floats. Returns the step.
  float (*build_luts)(const float* q, const int8_t* words, const uint8_t* width, int n_subspaces, bool wide,
                      float* room, uint8_t* luts);
  /// Writes q.k to scores[row * stride + cell]: the cell's scale times the row's step times the sum of the entries that
  /// its codes select in the row's tables. `luts` holds the rows' tables one after another. `of_values`: codes lie in
  /// the order of values, not of keys.
  void (*look_up)(const uint8_t* luts, const float* steps, int n_rows, int n_subspaces, bool wide, bool of_values,
                  const uint8_t* const* blocks, int n_blocks, const Prefetch& prefetch, float* scores, size_t stride);
  /// Reads the scales of n_blocks * 64 values, and writes upper bounds of their log2, at most 0.1 above. A scale that
  /// is not finite becomes 0, and the cell's bit in `bad` (by block) is set.
  void (*value_scales)(const uint8_t* const* blocks, int n_blocks, int codes_bytes, float* scales, float* log_scales,
                       uint64_t* bad);
  /// Makes one row's weights, exp2(score * log2(e) - offset) * scale, as whole numbers. They are rounded with kDither,
  /// so that the sum of many small ones is right. Only add_values reads `weights` ([2 * kRowsAtOnce * kSuperblockCells]
  /// bytes for all rows), so each instruction set lays them out as it likes. Sets bit b of *used where block b has a
  /// weight above 0. Returns the sum of the exp2.
  float (*code_weights)(const float* scores, int n_blocks, float offset, const float* scales, bool wide, int row,
                        uint8_t* weights, uint32_t* used);
  /// Multiplies sums[row] by shrink[row] and adds factor[row] times the sum of weight * codeword over the cells. Each
  /// row has, for each group, 16 floats: four partial sums of each of its four components. Only blocks whose bit in
  /// `used` is set are read.
  void (*add_values)(const uint8_t* const* blocks, int n_blocks, uint32_t used, const int8_t* words,
                     const ValueGroup* groups, int n_groups, const uint8_t* weights, bool wide, int n_rows,
                     const float* shrink, const float* factor, const Prefetch& prefetch, float* sums);
};

// A build defines the tables of its instruction sets only. dispatch.cpp finds out which the machine can run.
extern const TileOps kAvx512TileOps, kAvx2TileOps, kNeonTileOps;
extern const CodeOps kAvx512CodeOps, kAvx2CodeOps, kNeonCodeOps;

}  // namespace thimble
