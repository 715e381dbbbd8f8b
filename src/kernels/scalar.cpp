// Plain C++: the specification of every kernel.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "codec/half.h"
#include "kernels/kernels.h"

namespace thimble {
namespace {

constexpr float kUnseen = -std::numeric_limits<float>::infinity();

void decode_block(const HeadCodec& codec, const uint8_t* block, float* tile) {
  const int dim = codec.format.head_dim;
  float y[kMaxHeadDim];
  for (int cell = 0; cell < kBlockCells; cell++) {
    decode_cell(codec, block, cell, y);
    for (int d = 0; d < dim; d++) {
      if (codec.kind == Kind::key) {
        tile[d * kBlockCells + cell] = y[d];
      } else {
        tile[cell * dim + d] = y[d];
      }
    }
  }
}

void load_rows(Kind kind, const uint8_t* const* rows, int n, int dim, float* tile) {
  if (kind == Kind::key) std::fill_n(tile, size_t(dim) * kBlockCells, 0.0f);
  for (int cell = 0; cell < n; cell++) {
    for (int d = 0; d < dim; d++) {
      uint16_t h;
      std::memcpy(&h, rows[cell] + 2 * d, 2);
      tile[kind == Kind::key ? d * kBlockCells + cell : cell * dim + d] = half_to_float(h);
    }
  }
}

uint64_t visible(const uint16_t* mask, int n_cells) {
  uint64_t bits = 0;
  for (int i = 0; i < n_cells; i++) bits |= uint64_t(mask[i] != 0xfc00) << i;
  return bits;
}

// Score of a cell from q.k: bias, softcap, ALiBi and mask.
float finish_score(const Queries& queries, int row, float dot, const Mask& mask, int cell) {
  float score = dot + (queries.bias ? queries.bias[row] : 0.0f);
  if (queries.softcap != 0) score = queries.softcap * std::tanh(score / queries.softcap);
  if (mask.data) {
    const float m = half_to_float(mask.data[(row / queries.group) * mask.stride + cell]);
    if (m == kUnseen) return kUnseen;
    score += (queries.slope ? queries.slope[row] : 1.0f) * m;
  }
  return score;
}

// Adds cells with these scores (kUnseen: left out) to the row's running softmax; `value(cell)` points to the value.
template <typename Value>
void accumulate(int row, const float* scores, int n_cells, Value value, Softmax& softmax) {
  float greatest = kUnseen;
  for (int t = 0; t < n_cells; t++) greatest = std::max(greatest, scores[t]);
  if (greatest == kUnseen) return;
  float* acc = softmax.acc + size_t(row) * softmax.dim;
  if (greatest > softmax.max[row]) {
    const float shrink = weight_of(softmax.max[row] - greatest);  // 0 at first
    for (int d = 0; d < softmax.dim; d++) acc[d] *= shrink;
    softmax.sum[row] *= shrink;
    softmax.max[row] = greatest;
  }
  for (int t = 0; t < n_cells; t++) {
    if (scores[t] == kUnseen) continue;
    const float weight = weight_of(scores[t] - softmax.max[row]);
    softmax.sum[row] += weight;
    const float* v = value(t);
    for (int d = 0; d < softmax.dim; d++) acc[d] += weight * v[d];
  }
}

void attend_tile(const Queries& queries, const Tile& tile, const Mask& mask, Softmax& softmax, Scratch&) {
  float scores[kBlockCells];
  for (int row = 0; row < queries.n_rows; row++) {
    const float* q = queries.q + size_t(row) * queries.dim;
    std::fill_n(scores, kBlockCells, 0.0f);
    for (int d = 0; d < queries.dim; d++) {
      for (int t = 0; t < kBlockCells; t++) scores[t] += q[d] * tile.k[d * kBlockCells + t];
    }
    for (int t = 0; t < tile.n_cells; t++) {
      scores[t] = tile.hidden >> t & 1 ? kUnseen : finish_score(queries, row, scores[t], mask, t);
    }
    accumulate(
        row, scores, tile.n_cells, [&](int t) { return tile.v + size_t(t) * softmax.dim; }, softmax);
  }
}

// One score table for each row and subspace, lut[m][code] = q . codeword; q.k of a cell is its scale times the sum of
// the entries of its codes (VecInfer, arXiv 2510.06175, section 4).
class LookUp {
public:
  /// `first`: the query's number that goes with the codec's first.
  LookUp(const Queries& queries, const HeadCodec& codec, int first)
      : kind_(codec.kind),
        codes_(codec.format.codes_bytes()),
        n_subspaces_(codec.format.n_subspaces()),
        luts_(size_t(queries.n_rows) * n_subspaces_ * 256, 0.0f) {
    for (int row = 0; row < queries.n_rows; row++) {
      for (int m = 0; m < n_subspaces_; m++) {
        float* lut = &luts_[(size_t(row) * n_subspaces_ + m) * 256];
        for (int d = codec.format.offset(m); d < codec.format.offset(m) + codec.format.width(m); d++) {
          const float q = queries.q[size_t(row) * queries.dim + first + d];
          for (int c = 0; c < kCodewords; c++) lut[c] += q * codec.words[size_t(d) * kCodewords + c];
        }
        for (int c = 0; c < kCodewords; c++) lut[c | 0x80] = -lut[c];
      }
    }
  }
  float dot(int row, const uint8_t* block, int cell) const {
    float sum = 0;
    for (int m = 0; m < n_subspaces_; m++) {
      sum += luts_[(size_t(row) * n_subspaces_ + m) * 256 + block[m * kBlockCells + code_position(kind_, cell)]];
    }
    const uint8_t* scale = block + codes_ + 2 * cell;
    return half_to_float(uint16_t(scale[0] | scale[1] << 8)) * sum;
  }

private:
  Kind kind_;
  size_t codes_;
  int n_subspaces_;
  std::vector<float> luts_;
};

// q.k from codes, of keys and, where rows are latent, of values as well.
class Scores {
public:
  Scores(const Queries& queries, const CodedCells& cells) : keys_(queries, *cells.keys, queries.of_values) {
    if (queries.of_values > 0) values_.emplace(queries, *cells.values, 0);
  }
  float dot(int row, const CodedCells& cells, int block, int cell) const {
    const float of_key = keys_.dot(row, cells.k_block(block), cell);
    return values_ ? values_->dot(row, cells.v_block(block), cell) + of_key : of_key;
  }

private:
  LookUp keys_;
  std::optional<LookUp> values_;
};

// Decodes the keys of a block as tiles have them.
void decode_keys(const Queries& queries, const CodedCells& cells, int block, const float* v_tile, float* k_tile) {
  if (queries.of_values > 0) values_as_keys(v_tile, queries.of_values, k_tile);
  decode_block(*cells.keys, cells.k_block(block), k_tile + size_t(queries.of_values) * kBlockCells);
}

void attend_codes(const Queries& queries, const CodedCells& cells, const Mask& mask, Softmax& softmax,
                  Scratch& scratch) {
  const Format& kf = cells.keys->format;
  std::vector<float> v_tile(size_t(kBlockCells) * cells.values->format.head_dim);
  if (kf.f16) {
    std::vector<float> k_tile(size_t(kBlockCells) * queries.dim);
    for (int b = cells.first_block; b < cells.last_block; b++) {
      decode_block(*cells.values, cells.v_block(b), v_tile.data());
      decode_keys(queries, cells, b, v_tile.data(), k_tile.data());
      const Tile tile{std::min(kBlockCells, cells.n_cells - b * kBlockCells), k_tile.data(), v_tile.data(),
                      cells.hidden ? cells.hidden[b] : 0};
      attend_tile(queries, tile, mask.at(ptrdiff_t(b) * kBlockCells), softmax, scratch);
    }
    return;
  }
  const RowScores& kept = cells.scores;
  const Scores look_up(queries, cells);
  for (int b = cells.first_block; b < cells.last_block; b++) {
    const int n_cells = std::min(kBlockCells, cells.n_cells - b * kBlockCells);
    const uint64_t hidden = cells.hidden ? cells.hidden[b] : 0;
    const Mask block_mask = mask.at(ptrdiff_t(b) * kBlockCells);
    decode_block(*cells.values, cells.v_block(b), v_tile.data());
    for (int row = 0; row < queries.n_rows; row++) {
      float scores[kBlockCells];
      for (int t = 0; t < n_cells; t++) {
        scores[t] = hidden >> t & 1 ? kUnseen
                    : kept.data     ? kept.data[row * kept.stride + b * kBlockCells + t]
                                    : finish_score(queries, row, look_up.dot(row, cells, b, t), block_mask, t);
      }
      accumulate(
          row, scores, n_cells, [&](int t) { return &v_tile[size_t(t) * softmax.dim]; }, softmax);
    }
  }
}

void score_codes(const Queries& queries, const CodedCells& cells, const Mask& mask, float* best_scores, Scratch&) {
  const Format& kf = cells.keys->format;
  const RowScores& kept = cells.scores;
  const Scores look_up(queries, cells);  // empty where keys are f16
  std::vector<float> tile(kf.f16 ? size_t(kBlockCells) * queries.dim : 0);
  std::vector<float> v_tile(kf.f16 ? size_t(kBlockCells) * queries.of_values : 0);
  for (int b = cells.first_block; b < cells.last_block; b++) {
    if (kf.f16 && queries.of_values > 0) decode_block(*cells.values, cells.v_block(b), v_tile.data());
    if (kf.f16) decode_keys(queries, cells, b, v_tile.data(), tile.data());
    for (int t = 0; t < kBlockCells; t++) {
      const int cell = b * kBlockCells + t;
      const bool there = cell < cells.n_cells && !(cells.hidden && cells.hidden[b] >> t & 1);
      float& best = best_scores[cell] = kUnseen;
      for (int row = 0; row < queries.n_rows; row++) {
        if (kept.data) kept.data[row * kept.stride + cell] = kUnseen;
        if (!there) continue;
        float dot = 0;
        for (int d = 0; d < queries.dim && kf.f16; d++) {
          dot += queries.q[size_t(row) * queries.dim + d] * tile[d * kBlockCells + t];
        }
        if (!kf.f16) dot = look_up.dot(row, cells, b, t);
        const float score = finish_score(queries, row, dot, mask.at(ptrdiff_t(b) * kBlockCells), t);
        if (kept.data) kept.data[row * kept.stride + cell] = score;
        best = std::max(best, std::isnan(score) ? -kUnseen : score);
      }
    }
  }
}

void block_maxima(const float* best, int n_blocks, float* maxima) {
  for (int b = 0; b < n_blocks; b++)
    maxima[b] = *std::max_element(best + b * kBlockCells, best + (b + 1) * kBlockCells);
}

uint64_t at_least(const float* best, float bound) {
  uint64_t bits = 0;
  for (int i = 0; i < kBlockCells; i++) bits |= uint64_t(best[i] >= bound) << i;
  return bits;
}

}  // namespace

const Kernels& scalar_kernels() {
  static const Kernels table{"scalar",    encode_vector, kPlainTransformOps, decode_block, load_rows, visible,
                             attend_tile, attend_codes,  score_codes,        block_maxima, at_least};
  return table;
}

}  // namespace thimble
