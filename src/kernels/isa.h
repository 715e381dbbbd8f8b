// What one instruction set has to provide: the loops over cells, on plain pointers. Everything around them (blocks,
// masks, skipping, the running softmax) is written once, in blocked.cpp, at the compiler's baseline.
//
// The units behind this table are compiled with flags of their own. They include this header, intrinsics and what lies in
// an anonymous namespace (vector/), nothing else: an inline function of a shared header, compiled there and kept by the
// linker, would run on machines without the instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace thimble {

inline constexpr float kLog2e = 1.44269504f;
inline constexpr float kHidden = -__builtin_inff();        // the score of a cell that a row does not see
inline constexpr int kLine = 64;                           // cells to a block, bytes to a row of codes
inline constexpr int kSuperblock = 16;                     // blocks whose softmax and value sums are done in one go
inline constexpr int kSuperblockCells = 64 * kSuperblock;  // also the stride between rows of scores and weights
inline constexpr int kRowsAtOnce = 4;                      // query rows that share one pass over codes

/// Lines of 64 bytes to ask for while computing: `lines` of each block.
struct Prefetch {
  const uint8_t* const* blocks;
  int n_blocks;
  int lines;
};

/// Four components (or the last two) of values, and the rows of codes they are looked up with.
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

/// Thresholds between -1/2 and 1/2 that weights are rounded with, evenly spread over any stretch of cells (bit-reversed
/// numbers).
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

  /// The codes of `n_subspaces` subspaces of one width; arguments as in encode_vector.
  void (*nearest)(const float* y, float inverse_rms, const float* words, const float* half_norms, int width,
                  int n_subspaces, uint8_t* codes);
  /// out[r] = x[r] m, for rows of dim numbers and m [dim][dim].
  void (*times_matrix)(const float* x, int n_rows, const float* m, int dim, float* out);
  /// Butterflies in blocks of `block` numbers, then all times `norm`.
  void (*hadamard)(float* x, int n, int block, float norm);

  // -- tiles --

  /// A coded block as a tile: keys [dim][64], values [64][dim]. `code_row` and `scale` [dim]: the row of codes of each
  /// component and its subspace's scale.
  void (*decode_keys)(const uint8_t* block, const uint8_t* cell_scales, const int8_t* words, const uint8_t* code_row,
                      const float* scale, int dim, float* tile);
  void (*decode_values)(const uint8_t* block, const uint8_t* cell_scales, const int8_t* words, const uint8_t* code_row,
                        const float* scale, int dim, float* tile);
  /// Up to 64 rows of f16 (at any address) as a tile; cells from n to 63 of a key tile become 0.
  void (*load_keys)(const uint8_t* const* rows, int n, int dim, float* tile);
  void (*load_values)(const uint8_t* const* rows, int n, int dim, float* tile);
  /// c[rows][n] = a[rows][k] b[k][n], added to c where `add`.
  void (*multiply)(const float* a, int a_stride, const float* b, int b_stride, int rows, int k, int n, float* c,
                   int c_stride, bool add);

  // -- softmax --

  /// Of 64 numbers of an f16 mask.
  MaskBits (*mask_bits)(const uint16_t* mask);
  /// Scores from q.k of n_blocks * 64 cells, in place; -inf where not visible. `masks` (by block) or null: nothing to
  /// add. Returns the largest score. Where `log_weight` is given ([cells], log2 of what a cell's weight is multiplied
  /// by), *max_log becomes the maximum of score * log2(e) + log_weight over visible cells.
  float (*finish_scores)(float* scores, int n_blocks, const uint64_t* visible, const uint16_t* const* masks, float bias,
                         float slope, float softcap, const float* log_weight, float* max_log);
  /// Scores become exp(score - max), in place; returns their sum.
  float (*exponentiate)(float* scores, int n_cells, float max);
};

/// Attention from codes: up to kRowsAtOnce rows; scores and weights have a stride of kSuperblockCells.
struct CodeOps {
  float weight_bits[2];  // log2 of the largest weight that code_weights takes: narrow, wide

  /// Bytes of one row's tables.
  size_t (*lut_bytes)(int dim, int n_subspaces, bool wide);
  /// Tables of one row, of 8 bits a look-up or, where `wide`, of 16; how they lie in `luts`, at a multiple of 64 bytes,
  /// is between this and look_up. `q` [dim] has the subspaces' scales applied. `room` is scratch of n_subspaces * 129
  /// floats. Returns the step, the unit of scores.
  float (*build_luts)(const float* q, const int8_t* words, const uint8_t* width, int n_subspaces, bool wide,
                      float* room, uint8_t* luts);
  /// scores[row][cell] = q.k. `luts` holds the rows' tables one after another.
  void (*look_up)(const uint8_t* luts, const float* steps, int n_rows, int n_subspaces, bool wide,
                  const uint8_t* const* blocks, int n_blocks, const Prefetch& prefetch, float* scores);
  /// The scales of n_blocks * 64 values and an upper bound of their log2, less than 0.1 above it. Scales that are not
  /// finite become 0 and a bit in `bad` (by block).
  void (*value_scales)(const uint8_t* const* blocks, int n_blocks, int codes_bytes, float* scales, float* log_scales,
                       uint64_t* bad);
  /// The weights of one row, exp2(score * log2(e) - offset) * scale, rounded with a fixed dither so that many small
  /// weights keep their sum; how they lie in `weights` ([2 * kRowsAtOnce * kSuperblockCells] for all rows) is between
  /// this and add_values. Bit b of *used tells that block b has a weight above 0. Returns the sum of the exp2.
  float (*code_weights)(const float* scores, int n_blocks, float offset, const float* scales, bool wide, int row,
                        uint8_t* weights, uint32_t* used);
  /// sums[row][group][16] = sums * shrink[row] + factor[row] * (sum of weight * codeword over cells), four partial sums
  /// of four components each; rows of sums lie n_groups * 16 apart. Only blocks with a bit in `used` are read.
  void (*add_values)(const uint8_t* const* blocks, int n_blocks, uint32_t used, const int8_t* words,
                     const ValueGroup* groups, int n_groups, const uint8_t* weights, bool wide, int n_rows,
                     const float* shrink, const float* factor, const Prefetch& prefetch, float* sums);
};

// Those of them exist whose units are in this build; what the machine has is dispatch.cpp's business.
extern const TileOps kAvx512TileOps, kAvx2TileOps, kNeonTileOps;
extern const CodeOps kAvx512CodeOps, kAvx2CodeOps, kNeonCodeOps;

}  // namespace thimble
