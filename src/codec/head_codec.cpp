#include "codec/head_codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "codec/half.h"

namespace thimble {
namespace {

// Of the mean square of all weights: what is added to that of each, since RoPE and chance make up for the least.
constexpr double kLeastWeight = 1e-3;

}  // namespace

void HeadCodec::derive_tables() {
  if (transform.head_dim() != format.head_dim) throw std::invalid_argument("transform does not fit the head size");
  if (format.f16) return;
  const size_t n_subspaces = format.n_subspaces();
  if (codebook.scale.size() != n_subspaces || codebook.words.size() != size_t(format.head_dim) * kCodewords) {
    throw std::invalid_argument("codebook does not fit the format");
  }
  if (!error.empty() && error.size() != size_t(format.head_dim)) {
    throw std::invalid_argument("errors do not fit the head size");
  }
  words.assign(codebook.words.size(), 0.0f);
  half_norms.assign(n_subspaces * kCodewords, 0.0f);
  for (size_t m = 0; m < n_subspaces; m++) {
    const int offset = format.offset(int(m)), width = format.width(int(m));
    for (int d = offset; d < offset + width; d++) {
      for (int c = 0; c < kCodewords; c++) {
        const float w = codebook.scale[m] * codebook.word(d, c);
        words[size_t(d) * kCodewords + c] = w;
        half_norms[m * kCodewords + c] += 0.5f * w * w;
      }
    }
  }
}

float HeadCodec::score_bias(const float* y) const {
  float variance = 0;
  for (size_t d = 0; d < error.size(); d++) variance += y[d] * y[d] * error[d];
  return variance / 2;
}

HeadCodec make_uncalibrated_codec(Kind kind, const Format& format, const std::vector<float>& stretch) {
  HeadCodec codec;
  codec.kind = kind;
  codec.format = format;
  if (format.f16) {
    codec.transform = Transform::identity(format.head_dim);
  } else {
    codec.transform = stretch.empty() ? Transform::hadamard(format.head_dim) : Transform::stretched_hadamard(stretch);
    codec.codebook = builtin_codebook(format);
  }
  codec.derive_tables();
  return codec;
}

std::vector<float> key_stretch(const float* key_weights, const float* query_weights, int n, int head_dim) {
  std::vector<double> keys(head_dim), queries(head_dim, 0.0);  // squares
  double key_sum = 0, query_sum = 0;
  for (int d = 0; d < head_dim; d++) {
    keys[d] = double(key_weights[d]) * key_weights[d];
    for (int i = 0; i < n; i++) queries[d] += std::pow(double(query_weights[size_t(i) * head_dim + d]), 2) / n;
    key_sum += keys[d];
    query_sum += queries[d];
  }
  if (!std::isfinite(key_sum) || !std::isfinite(query_sum) || key_sum == 0 || query_sum == 0) return {};
  std::vector<float> stretch;
  for (int d = 0; d < head_dim; d++) {
    const double query = queries[d] + kLeastWeight * query_sum / head_dim;
    const double key = keys[d] + kLeastWeight * key_sum / head_dim;
    stretch.push_back(float(std::sqrt(std::sqrt(query / key))));
  }
  return stretch;
}

std::vector<std::vector<float>> key_stretches(const std::vector<float>& query_weights,
                                              const std::vector<float>& key_weights, int n_kv_heads, int head_dim) {
  const size_t dim = size_t(head_dim), n = size_t(n_kv_heads);
  const bool of_one_key = key_weights.size() == dim, of_one_query = query_weights.size() == dim;
  if ((!of_one_key && key_weights.size() != n * dim) ||
      (!of_one_query && (query_weights.empty() || query_weights.size() % (n * dim) != 0))) {
    return {};
  }
  const size_t group = of_one_query ? 1 : query_weights.size() / (n * dim);
  std::vector<std::vector<float>> stretches;
  for (size_t h = 0; h < n; h++) {
    stretches.push_back(key_stretch(&key_weights[of_one_key ? 0 : h * dim],
                                    &query_weights[of_one_query ? 0 : h * group * dim], int(group), head_dim));
    if (stretches.back().empty()) return {};
  }
  return stretches;
}

uint16_t encode_vector(const HeadCodec& codec, const float* y, uint8_t* codes) {
  const Format& format = codec.format;
  float square = 0;
  for (int d = 0; d < format.head_dim; d++) square += y[d] * y[d];
  if (square == 0 || !std::isfinite(square)) {
    std::fill_n(codes, format.n_subspaces(), uint8_t{0});
    return square == 0 ? uint16_t{0} : uint16_t{0x7e00};
  }
  const float inverse_rms = 1.0f / std::sqrt(square / float(format.head_dim));
  float along = 0, length = 0;  // <y,c>, <c,c>
  for (int m = 0; m < format.n_subspaces(); m++) {
    const int offset = format.offset(m), width = format.width(m);
    const float* words = &codec.words[size_t(offset) * kCodewords];
    const float* half_norms = &codec.half_norms[size_t(m) * kCodewords];
    float dots[kCodewords] = {};
    for (int j = 0; j < width; j++) {
      const float z = y[offset + j] * inverse_rms;
      for (int c = 0; c < kCodewords; c++) dots[c] += z * words[size_t(j) * kCodewords + c];
    }
    // |z - s c|^2 = |z|^2 - 2 (s z.c - |c|^2 / 2), smallest for s = sign(z.c)
    int best = 0;
    float best_gain = std::fabs(dots[0]) - half_norms[0];
    for (int c = 1; c < kCodewords; c++) {
      const float gain = std::fabs(dots[c]) - half_norms[c];
      if (gain > best_gain) {
        best_gain = gain;
        best = c;
      }
    }
    const bool negative = dots[best] < 0;
    codes[m] = uint8_t(best | (negative ? 0x80 : 0));
    for (int j = 0; j < width; j++) {
      const float w = words[size_t(j) * kCodewords + best];
      along += y[offset + j] * (negative ? -w : w);
      length += w * w;
    }
  }
  const float scale = length > 0 ? along / length : 0.0f;
  return float_to_half(std::min(scale, 65504.0f));
}

void decode_vector(const HeadCodec& codec, const uint8_t* codes, uint16_t scale, float* y) {
  const Format& format = codec.format;
  const float s = half_to_float(scale);
  for (int m = 0; m < format.n_subspaces(); m++) {
    const int offset = format.offset(m), width = format.width(m);
    const int index = codes[m] & 0x7f;
    const float signed_scale = codes[m] & 0x80 ? -s : s;
    for (int d = offset; d < offset + width; d++) y[d] = signed_scale * codec.words[size_t(d) * kCodewords + index];
  }
}

void copy_cell_out(const Format& format, Kind kind, const uint8_t* block, int cell, uint8_t* row) {
  if (format.f16) {
    std::memcpy(row, block + size_t(cell) * format.head_dim * 2, size_t(format.head_dim) * 2);
    return;
  }
  const int m_count = format.n_subspaces(), position = code_position(kind, cell);
  for (int m = 0; m < m_count; m++) row[m] = block[size_t(m) * kBlockCells + position];
  std::memcpy(row + m_count, block + format.codes_bytes() + size_t(cell) * 2, 2);
}

void copy_cell_in(const Format& format, Kind kind, const uint8_t* row, uint8_t* block, int cell) {
  if (format.f16) {
    std::memcpy(block + size_t(cell) * format.head_dim * 2, row, size_t(format.head_dim) * 2);
    return;
  }
  const int m_count = format.n_subspaces(), position = code_position(kind, cell);
  for (int m = 0; m < m_count; m++) block[size_t(m) * kBlockCells + position] = row[m];
  std::memcpy(block + format.codes_bytes() + size_t(cell) * 2, row + m_count, 2);
}

void encode_cell(const HeadCodec& codec, const float* y, uint8_t* block, int cell) {
  uint8_t row[kMaxHeadDim * 2];
  const Format& format = codec.format;
  if (format.f16) {
    for (int d = 0; d < format.head_dim; d++) {
      const uint16_t h = float_to_half(y[d]);
      std::memcpy(row + 2 * d, &h, 2);
    }
  } else {
    const uint16_t scale = encode_vector(codec, y, row);
    std::memcpy(row + format.n_subspaces(), &scale, 2);
  }
  copy_cell_in(format, codec.kind, row, block, cell);
}

void decode_cell(const HeadCodec& codec, const uint8_t* block, int cell, float* y) {
  uint8_t row[kMaxHeadDim * 2];
  const Format& format = codec.format;
  copy_cell_out(format, codec.kind, block, cell, row);
  if (format.f16) {
    for (int d = 0; d < format.head_dim; d++) {
      uint16_t h;
      std::memcpy(&h, row + 2 * d, 2);
      y[d] = half_to_float(h);
    }
    return;
  }
  uint16_t scale;
  std::memcpy(&scale, row + format.n_subspaces(), 2);
  decode_vector(codec, row, scale, y);
}

}  // namespace thimble
