// Everything needed to code the keys or the values of one KV head of one layer, and the specification of doing so:
// encode_vector and decode_vector are the plain versions that every faster one must equal (codes bit for bit).
#pragma once

#include <cstdint>
#include <vector>

#include "codec/codebook.h"
#include "codec/format.h"
#include "codec/transform.h"

namespace thimble {

struct HeadCodec {
  Kind kind = Kind::key;
  Format format;
  Transform transform = Transform::identity(0);
  Codebook codebook;  // empty for f16
  /// Of keys, [head_dim]: the mean square of each transformed component's error; empty where it is not known.
  std::vector<float> error;

  // Derived from the codebook by derive_tables().
  std::vector<float> words;       // [head_dim][128], codewords with their subspace's scale applied
  std::vector<float> half_norms;  // [n_subspaces][128], half the squared norm of each codeword

  /// Fills the derived tables. Throws std::invalid_argument where codebook and transform do not fit the format.
  void derive_tables();

  /// What coded cells' scores lack on average: half the variance of the error of (scaled) q.k, where `y` is the
  /// transformed query. A code stands for the mean of the keys that it codes, so q.k has an error e of mean 0; yet
  /// softmax weighs a cell by exp(q.k), and the mean of exp(e) is exp(var(e) / 2) for a normal e.
  float score_bias(const float* y) const;
};

/// A codec without calibration: a Hadamard rotation and the built-in codebook. With format.f16 it changes nothing.
/// `stretch` [head_dim], as `key_stretch` has it, is what numbers are multiplied by before; empty: by 1.
HeadCodec make_uncalibrated_codec(Kind kind, const Format& format, const std::vector<float>& stretch = {});

/// What a KV head's keys are multiplied by before they are rotated, [head_dim], where the model normalizes queries and
/// keys and multiplies them by weights [head_dim] each, which tell how large their numbers are. A rotation spreads the
/// error of a key evenly over its numbers, and an error costs what the query's number makes of it: the sum of
/// (q_d / s_d)^2, times the key's power, the sum of (k_d s_d)^2, is least for s_d = sqrt(|q_d| / |k_d|).
/// `query_weights` [n][head_dim] are those of the query heads that attend to the KV head.
std::vector<float> key_stretch(const float* key_weights, const float* query_weights, int n, int head_dim);

/// The same for each KV head of a layer; `query_weights` and `key_weights` [head_dim] are of one head, which stands for
/// all, or of all heads. Empty where there are no weights, or not as many as the heads would have.
std::vector<std::vector<float>> key_stretches(const std::vector<float>& query_weights,
                                              const std::vector<float>& key_weights, int n_kv_heads, int head_dim);

/// Writes the codes of one transformed vector `y` [head_dim] to `codes` [n_subspaces]; returns its scale as f16.
///
/// y is normalized to a root mean square of 1, each subspace takes the codeword (of 256) nearest to it, the lowest
/// index among equals; the scale is then the least-squares one, <y,c>/<c,c>. A vector of zeros gets scale 0, one that
/// holds an infinity or a NaN gets scale NaN, which attention passes on as f16 would.
uint16_t encode_vector(const HeadCodec& codec, const float* y, uint8_t* codes);

/// Writes the transformed vector that codes and scale stand for to `y` [head_dim].
void decode_vector(const HeadCodec& codec, const uint8_t* codes, uint16_t scale, float* y);

// The same for one cell, 0 to 63, of a block (layout in format.h). `y` [head_dim] is transformed.
void encode_cell(const HeadCodec& codec, const float* y, uint8_t* block, int cell);
void decode_cell(const HeadCodec& codec, const uint8_t* block, int cell, float* y);

// Copy a cell between a block and `row`, format.vector_bytes() bytes: code[n_subspaces], then the f16 scale; or, with
// format.f16, the cell's [head_dim] f16 numbers.
void copy_cell_out(const Format& format, Kind kind, const uint8_t* block, int cell, uint8_t* row);
void copy_cell_in(const Format& format, Kind kind, const uint8_t* row, uint8_t* block, int cell);

}  // namespace thimble
