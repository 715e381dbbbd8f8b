// The profile of a model: what calibration learned about its keys and values, one codec for every layer, KV head, kind
// and rate. It is one GGUF file beside the model, `<model>.thimble.gguf`:
//
//   metadata  thimble.version            u32     2
//             thimble.transform          string  "klt", "vecinfer" or "oscar"
//             thimble.source             string  the text that it was calibrated on, for people to read
//             thimble.architecture       string  ) the fingerprint of the model, see ModelShape
//             thimble.heads              i32[n_layers][4]: KV heads, query heads, head size of keys, of values
//             thimble.rope.mode, .n_dims i32     )
//             thimble.rope.freq_base, .freq_scale f32
//             thimble.density            f32[n_layers]: see Profile::density
//             thimble.bits               f32[n_rates]
//             thimble.widths.<bits>      i32[n_layers][2][3]: subspaces of width 2, 4, 8 of keys, then of values
//   tensors   l<layer>.<k|v>.mean            f32 [n_kv_heads][head_dim]
//             l<layer>.<k|v>.matrix          f16 [n_kv_heads][head_dim][head_dim], A of y = (x - mean) A
//             l<layer>.<k|v>.order.<widths>  i16 [n_kv_heads][head_dim]: component d of a coded vector is column
//                                                order[d] of A, so that rates share a matrix
//             l<layer>.<k|v>.words.<widths>  i8  [n_kv_heads][head_dim][128], as Codebook::words
//             l<layer>.<k|v>.scale.<widths>  f32 [n_kv_heads][n_subspaces], as Codebook::scale
//             l<layer>.k.error.<widths>      f32 [n_kv_heads][head_dim], as HeadCodec::error; may be missing
//
// <widths> are the subspaces of width 2, 4 and 8 ("0-16-0"), so that rates at which a layer has the same format share
// its codebooks. Files of version 1 are read, too: their matrices are f32, and <bits> stands for <widths>.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "codec/head_codec.h"

namespace thimble {

inline constexpr int kMaxRates = 16;  // that a profile may hold

struct LayerShape {
  int n_kv_heads = 0;  // 0: the layer keeps no keys and values
  int n_heads = 0;
  int key_dim = 0;    // head size of keys
  int value_dim = 0;  // head size of values

  bool operator==(const LayerShape&) const = default;
  int dim(Kind kind) const { return kind == Kind::key ? key_dim : value_dim; }
};

/// How a model rotates its keys by their position; all zero where it does not.
struct RopeShape {
  int mode = 0;    // ggml's: 0 pairs neighbours, 2 pairs halves
  int n_dims = 0;  // leading components that are rotated
  float freq_base = 0;
  float freq_scale = 0;

  bool operator==(const RopeShape&) const = default;
};

/// The numbers in which a profile and the model that it is used with must agree.
struct ModelShape {
  std::string architecture;
  std::vector<LayerShape> layers;
  RopeShape rope;
};

/// The codebooks of one layer's keys or values at one rate, all KV heads.
struct LayerCodebooks {
  bool operator==(const LayerCodebooks&) const = default;

  Format format;
  std::vector<int16_t> order;  // [n_kv_heads][head_dim]
  std::vector<int8_t> words;   // [n_kv_heads][head_dim][128]
  std::vector<float> scale;    // [n_kv_heads][n_subspaces]
  std::vector<float> error;    // [n_kv_heads][head_dim], as HeadCodec::error; empty for values and where not known
};

/// One layer's keys or values.
struct LayerProfile {
  std::vector<float> mean;                   // [n_kv_heads][head_dim]
  std::vector<float> matrix;                 // [n_kv_heads][head_dim][head_dim]; a file keeps f16
  std::map<double, LayerCodebooks> by_bits;  // for every rate of Profile::bits
};

struct Profile {
  ModelShape shape;
  std::string transform;
  std::string source;
  std::vector<double> bits;  // the rates that the profile holds, highest first
  /// [n_layers]: share of attention outside the strongest 5 % of cells, for the last 32 queries of a prompt
  /// (TailorKV, arXiv 2505.19586, section 3). Above 0.2 a layer attends broadly: it is quantization-friendly.
  std::vector<float> density;
  std::vector<LayerProfile> keys, values;  // [n_layers]

  const LayerProfile& layer(int index, Kind kind) const { return (kind == Kind::key ? keys : values).at(index); }
  bool quantization_friendly(int index) const { return density.at(index) > 0.2f; }

  /// The format of a layer's keys or values. `bits` is the average of the whole cache: a profile may spend more on one
  /// layer than on another. Throws std::runtime_error where the profile does not hold this layer or rate.
  Format format(int layer, Kind kind, double bits) const;

  /// The codec of a KV head, its tables derived. Throws as `format` does, and where the matrix has no inverse.
  HeadCodec codec(int layer, int kv_head, Kind kind, double bits) const;

  /// Throws std::runtime_error where the profile was made for another model. Members that are empty or 0 in `model` are
  /// not compared, nor are layers that it does not list.
  void check_fits(const ModelShape& model) const;
};

/// Reads and checks everything: every size against the file's, every number for being finite, every order for being a
/// permutation. (`Profile::codec` refuses a matrix without an inverse.) Throws std::runtime_error with a sentence that
/// says what to do.
Profile read_profile(const std::string& path);

/// The same from memory.
Profile read_profile(const uint8_t* data, size_t size);

/// Throws std::runtime_error where the file cannot be written, the profile does not describe every layer, or its rates
/// have different codebooks of one format. Matrices are rounded to f16, which those that fit_profile makes are already.
void write_profile(const Profile& profile, const std::string& path);

}  // namespace thimble
