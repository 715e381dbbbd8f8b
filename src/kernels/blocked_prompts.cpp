// Attention of many query tokens from codes: a block is decoded once for all of them.
//
// Where an instruction set has fast products of 16-bit numbers, codewords (of 8 bits) are multiplied by queries and by
// weights of 16 bits. The scales of cells, components and queries are multiplied on later, to sums. Else blocks are
// decoded to tiles of floats.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/blocked_parts.h"

namespace thimble::blocked {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int kRows = 48;  // so few that their scores and weights and a tile stay in the first-level cache

// The cells of a block that some query token attends to.
uint64_t attended(const IsaOps& ops, const CodedCells& cells, int block, const Mask& mask, int n_tokens) {
  const int n_cells = std::min(kBlockCells, cells.n_cells - block * kBlockCells);
  const uint64_t present = first_bits(n_cells) & ~(cells.hidden ? cells.hidden[block] : 0);
  uint64_t seen = mask.data ? 0 : present;
  for (int t = 0; t < n_tokens && seen != present; t++) {
    seen |= visible(ops, mask.data + t * mask.stride, n_cells) & present;
  }
  return seen;
}

void attend_floats(const IsaOps& ops, const Queries& queries, const CodedCells& cells, const Mask& mask,
                   Softmax& softmax, Scratch& scratch) {
  std::vector<float> k(size_t(kBlockCells) * queries.dim), v(size_t(kBlockCells) * softmax.dim);
  for (int b = cells.first_block; b < cells.last_block; b++) {
    const Mask block_mask = mask.at(ptrdiff_t(b) * kBlockCells);
    const uint64_t seen = attended(ops, cells, b, block_mask, queries.n_rows / queries.group);
    if (!seen) continue;
    decode_block(ops, *cells.values, cells.v_block(b), v.data());
    if (queries.of_values > 0) values_as_keys(v.data(), queries.of_values, k.data());
    decode_block(ops, *cells.keys, cells.k_block(b), k.data() + size_t(queries.of_values) * kBlockCells);
    // A cell that no token sees may never have been written. Its bytes may be a NaN, and a weight of 0 times NaN is
    // NaN.
    for (uint64_t left = ~seen; left; left &= left - 1) {
      std::fill_n(&v[size_t(std::countr_zero(left)) * softmax.dim], softmax.dim, 0.0f);
    }
    const int n_cells = std::min(kBlockCells, cells.n_cells - b * kBlockCells);
    attend_tile(ops, queries, {n_cells, k.data(), v.data(), ~seen}, block_mask, softmax, scratch);
  }
}

class Words {
public:
  Words(const IsaOps& ops, const Queries& queries, const CodedCells& cells, const Mask& mask, Softmax& softmax,
        Scratch& scratch)
      : ops_(ops),
        queries_(queries),
        cells_(cells),
        mask_(mask),
        softmax_(softmax),
        k_rows_(*cells.keys),
        v_rows_(*cells.values) {
    carve(scratch.room(carve(nullptr)));
    round_queries();
  }

  void attend() {
    for (int b = cells_.first_block; b < cells_.last_block; b++) attend_block(b);
  }

private:
  size_t carve(uint8_t* memory) {
    Carver carver(memory);
    const int n_rows = queries_.n_rows, dim = queries_.dim;
    q_ = carver.take<int16_t>(size_t(n_rows) * dim);
    steps_ = carver.take<float>(n_rows);
    k_ = carver.take<int16_t>(size_t(dim) * kBlockCells);
    v_ = carver.take<int16_t>(size_t(padded_columns(softmax_.dim)) * kBlockCells);
    scores_ = carver.take<float>(kRows * kBlockCells);
    weights_ = carver.take<int16_t>(kRows * kBlockCells);
    k_scales_ = carver.take<float>(kBlockCells);
    v_scales_ = carver.take<float>(kBlockCells);
    v_logs_ = carver.take<float>(kBlockCells);
    return carver.used();
  }

  // Queries times the components' scales, as numbers of 16 bits. q.k is a row's step times the sum of their products
  // with codewords, which fits 32 bits: 512 * 32767 * 127 < 2^31.
  void round_queries() {
    for (int row = 0; row < queries_.n_rows; row++) {
      float scaled[kMaxHeadDim], greatest = 0, size = 0;
      for (int d = 0; d < queries_.dim; d++) {
        scaled[d] = queries_.q[size_t(row) * queries_.dim + d] * k_rows_.scale[d];
        greatest = std::max(greatest, std::fabs(scaled[d]));
        size += std::fabs(scaled[d]);
      }
      const bool finite = std::isfinite(size);
      const float step = std::max(greatest / 32767.0f, 1e-30f);
      for (int d = 0; d < queries_.dim; d++) {
        q_[size_t(row) * queries_.dim + d] = finite ? int16_t(std::lrintf(scaled[d] / step)) : int16_t(0);
      }
      steps_[row] = finite ? step : kNaN;
    }
  }

  // Tokens' masks lie so far apart that no processor foresees the next block's.
  void ask_for_mask(const Mask& mask) const {
    for (int t = 0; t < queries_.n_rows / queries_.group; t++) {
      for (int i = 0; i < kBlockCells; i += 32) __builtin_prefetch(mask.data + t * mask.stride + i, 0, 2);
    }
  }

  void attend_block(int block) {
    const Mask mask = mask_.at(ptrdiff_t(block) * kBlockCells);
    const uint64_t seen = attended(ops_, cells_, block, mask, queries_.n_rows / queries_.group);
    if (!seen) return;
    if (mask.data && block + 1 < cells_.last_block) ask_for_mask(mask.at(kBlockCells));
    const uint8_t *k_block = cells_.k_block(block), *v_block = cells_.v_block(block);
    const TileOps& tiles = ops_.tiles;
    tiles.key_words(k_block, cells_.keys->codebook.words.data(), k_rows_.row, queries_.dim, k_);
    tiles.value_words(v_block, cells_.values->codebook.words.data(), v_rows_.row, softmax_.dim, v_);
    const uint8_t* k_scales = k_block + cells_.keys->format.codes_bytes();
    tiles.load_values(&k_scales, 1, kBlockCells, k_scales_);
    uint64_t bad;
    ops_.codes.value_scales(&v_block, 1, int(cells_.values->format.codes_bytes()), v_scales_, v_logs_, &bad);
    float max_log = kUnseen;
    for (uint64_t left = seen; left; left &= left - 1) max_log = std::max(max_log, v_logs_[std::countr_zero(left)]);
    lift_ = std::min(std::floor(kWordWeightBits - max_log), 40.0f);
    const int n_cells = std::min(kBlockCells, cells_.n_cells - block * kBlockCells);
    for (int first = 0; first < queries_.n_rows; first += kRows) {
      attend_rows(first, std::min(kRows, queries_.n_rows - first), n_cells, seen, bad, mask);
    }
  }

  // Adds the decoded block to rows [first, first + n), of which some token sees the cells `wanted`.
  void attend_rows(int first, int n, int n_cells, uint64_t wanted, uint64_t bad, const Mask& mask) {
    const int dim = queries_.dim;
    float factor[kRows], shrink[kRows];
    ops_.tiles.multiply_words(q_ + size_t(first) * dim, dim / 2, k_, kBlockCells, n, dim / 2, kBlockCells,
                              steps_ + first, k_scales_, nullptr, scores_, kBlockCells);
    int token = -1;
    uint64_t seen = wanted;
    const uint16_t* token_mask = nullptr;
    uint16_t room[kBlockCells];
    for (int i = 0; i < n; i++) {
      const int row = first + i;
      if (mask.data && row / queries_.group != token) {
        token = row / queries_.group;
        const uint16_t* whole = padded(mask.data + token * mask.stride, n_cells, room);
        const MaskBits bits = ops_.tiles.mask_bits(whole);
        seen = bits.visible & wanted;
        token_mask = bits.adds ? whole : nullptr;
      }
      add_weights(row, scores_ + i * kBlockCells, seen, token_mask, weights_ + i * kBlockCells, factor[i], shrink[i]);
      if (bad & seen) softmax_.sum[row] = kNaN;
    }
    ops_.tiles.multiply_words(weights_, kBlockCells / 2, v_, padded_columns(softmax_.dim), n, kBlockCells / 2,
                              softmax_.dim, factor, v_rows_.scale, shrink, softmax_.acc + size_t(first) * softmax_.dim,
                              softmax_.dim);
  }

  // Turns a row's q.k into weights, and adds them to its sum. What the row has so far is to be multiplied by `shrink`,
  // and what is added to it by `factor`.
  void add_weights(int row, float* scores, uint64_t seen, const uint16_t* token_mask, int16_t* weights, float& factor,
                   float& shrink) {
    factor = 0;
    shrink = 1;
    const float greatest =
        seen ? ops_.tiles.finish_scores(scores, 1, &seen, token_mask ? &token_mask : nullptr,
                                        queries_.bias ? queries_.bias[row] : 0.0f,
                                        queries_.slope ? queries_.slope[row] : 1.0f, queries_.softcap, nullptr, nullptr)
             : kUnseen;
    if (greatest == kUnseen) {
      std::fill_n(weights, kBlockCells, int16_t(0));
      return;
    }
    const float sum = ops_.tiles.word_weights(scores, greatest, lift_, v_scales_, weights);
    if (greatest > softmax_.max[row]) {
      shrink = weight_of(softmax_.max[row] - greatest);  // 0 at first
      softmax_.max[row] = greatest;
    }
    factor = std::ldexp(weight_of(greatest - softmax_.max[row]), -int(lift_));
    softmax_.sum[row] = softmax_.sum[row] * shrink + sum * factor;
  }

  const IsaOps& ops_;
  const Queries& queries_;
  const CodedCells& cells_;
  const Mask& mask_;
  Softmax& softmax_;
  CodeRows k_rows_, v_rows_;
  int16_t *q_, *k_, *v_, *weights_;
  float *steps_, *scores_, *k_scales_, *v_scales_, *v_logs_;
  float lift_;  // weights of the block are lifted by this power of 2, so that they fill 16 bits
};

}  // namespace

void attend_decoded(const IsaOps& ops, const Queries& queries, const CodedCells& cells, const Mask& mask,
                    Softmax& softmax, Scratch& scratch) {
  // Of a latent row, the key's part and the value's have scales of their own, which would take two products.
  if (cells.keys->format.f16 || cells.values->format.f16 || queries.of_values > 0 || !ops.tiles.multiply_words) {
    return attend_floats(ops, queries, cells, mask, softmax, scratch);
  }
  Words(ops, queries, cells, mask, softmax, scratch).attend();
}

}  // namespace thimble::blocked
