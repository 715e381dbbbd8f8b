// Attention over coded cells, as a problem that every instruction set is given.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <tuple>
#include <vector>

#include "codec/half.h"
#include "kernels_on.h"
#include "support/random.h"

namespace thimble {

// Queries, coded cells and a mask that use every option of attention.
struct Problem {
  int dim = 64, group = 3, n_tokens = 1, n_cells = 200;
  double bits = 2;
  float query_size = 1;  // standard deviation of the logits
  // Every 64th of a key's and of a query's numbers is so many times as large as the others, before a Hadamard
  // transform.
  float outlying = 1;
  float softcap = 0;
  bool bias = false, slope = false, mask = true, hide = true;
  size_t misalign = 0;

  HeadCodec keys, values;
  std::vector<float> k, v, q, biases, slopes;  // k, v: what was coded
  std::vector<uint8_t> k_memory, v_memory;
  std::vector<uint16_t> mask_data;
  std::vector<uint64_t> hidden;

  int n_rows() const { return n_tokens * group; }
  int n_blocks() const { return (n_cells + kBlockCells - 1) / kBlockCells; }

  void fill(unsigned seed = 1) {
    keys = make_uncalibrated_codec(Kind::key, make_format(dim, bits));
    values = make_uncalibrated_codec(Kind::value, make_format(dim, bits));
    k = gaussian(size_t(n_cells) * dim, seed);
    v = gaussian(size_t(n_cells) * dim, seed + 1);
    q = gaussian(size_t(n_rows()) * dim, seed + 2);
    for (float& x : q) x *= query_size / std::sqrt(float(dim));
    if (outlying != 1) {
      for (size_t i = 7; i < k.size(); i += 64) k[i] *= outlying;
      for (size_t i = 7; i < q.size(); i += 64) q[i] *= outlying;
      const Transform spread = Transform::hadamard(dim);
      spread.forward(std::vector<float>(k).data(), k.data(), n_cells);
      spread.query(std::vector<float>(q).data(), q.data(), n_rows());
    }
    // Coding is slow, and most problems of a test have the same cells.
    static std::map<std::tuple<int, int, double, float, size_t, unsigned>, std::array<std::vector<uint8_t>, 2>> coded;
    auto& memories = coded[{dim, n_cells, bits, outlying, misalign, seed}];
    for (auto [memory, codec, x] : {std::tuple{&memories[0], &keys, &k}, {&memories[1], &values, &v}}) {
      if (!memory->empty()) continue;
      // Cells never written hold NaN.
      memory->assign(misalign + n_blocks() * codec->format.block_bytes(), 0xff);
      for (int i = 0; i < n_cells; i++) {
        encode_cell(*codec, &(*x)[size_t(i) * dim], block(*memory, *codec, i / kBlockCells), i % kBlockCells);
      }
    }
    k_memory = memories[0];
    v_memory = memories[1];
    biases = gaussian(n_rows(), seed + 3);
    slopes.resize(n_rows());
    for (int row = 0; row < n_rows(); row++) slopes[row] = 1.0f / float(1 + row % group);
    mask_data.assign(size_t(n_tokens) * n_cells, 0);
    for (int t = 0; t < n_tokens; t++) {
      for (int i = 0; i < n_cells; i++) {
        uint16_t& m = mask_data[size_t(t) * n_cells + i];
        if (slope) m = float_to_half(-float(n_cells - i) / 16);
        if ((i * 7 + t) % 13 == 3 || i / 150 % 4 == 2) m = 0xfc00;
      }
    }
    hidden.assign(n_blocks(), 0);
    for (int i = 0; hide && i < n_cells; i += 5) hidden[i / kBlockCells] |= uint64_t{1} << (i % kBlockCells);
  }

  uint8_t* block(std::vector<uint8_t>& memory, const HeadCodec& codec, int b) const {
    return memory.data() + misalign + b * codec.format.block_bytes();
  }
  Queries queries() const {
    return {n_rows(), group, dim, q.data(), bias ? biases.data() : nullptr, slope ? slopes.data() : nullptr, softcap};
  }
  Mask mask_view() const { return {mask ? mask_data.data() : nullptr, n_cells}; }
};

struct Result {
  std::vector<float> max, sum, acc;
  explicit Result(const Problem& p)
      : max(p.n_rows(), -kInfinity), sum(p.n_rows(), 0.0f), acc(size_t(p.n_rows()) * p.dim, 0.0f) {}
  Softmax softmax(const Problem& p) { return {p.dim, max.data(), sum.data(), acc.data()}; }
  double value(const Problem& p, int row, int d) const {
    return sum[row] == 0 ? 0 : double(acc[size_t(row) * p.dim + d]) / sum[row];
  }
};

inline CodedCells cells_of(const Problem& p, int first_block, int last_block) {
  return {&p.keys,
          &p.values,
          p.k_memory.data() + p.misalign,
          p.v_memory.data() + p.misalign,
          p.hide ? p.hidden.data() : nullptr,
          first_block,
          last_block,
          p.n_cells};
}

inline void attend_codes(const Kernels& kernels, const Problem& p, int first_block, int last_block, Result& result,
                         RowScores kept = {}) {
  CodedCells cells = cells_of(p, first_block, last_block);
  cells.scores = kept;
  Softmax softmax = result.softmax(p);
  Scratch scratch;
  kernels.attend_codes(p.queries(), cells, p.mask_view(), softmax, scratch);
}

inline Result attend_codes(const Kernels& kernels, const Problem& p) {
  Result result(p);
  attend_codes(kernels, p, 0, p.n_blocks(), result);
  return result;
}

inline double nmse(const Problem& p, const Result& result, const Result& expected) {
  double error = 0, size = 1e-30;
  for (int row = 0; row < p.n_rows(); row++) {
    for (int d = 0; d < p.dim; d++) {
      const double e = expected.value(p, row, d), difference = result.value(p, row, d) - e;
      error += difference * difference;
      size += e * e;
    }
  }
  return error / size;
}

// Tables and weights of 8 bits are for codes of 2 bits a number and less, whose own error is 100 times this. Sums of
// products are 16-bit numbers, whose steps are coarser the more numbers a head has.
inline double codes_bound(const Problem& p) {
  return (p.bits > 2 ? 1e-4 : 1e-3) * std::max(1.0, p.dim / 256.0);
}

}  // namespace thimble
