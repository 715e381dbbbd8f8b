// Shared by the tests of the CUDA kernels' source under emulation: random codecs, caches in both layouts, and the
// specification of attention in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "codec/half.h"
#include "codec/head_codec.h"
#include "cuda/host/tables.h"
#include "cuda/layout.h"
#include "cuda/types.h"

namespace thimble::cuda {

class Random {
public:
  explicit Random(unsigned seed) : engine_(seed) {}
  float normal() { return normal_(engine_); }
  int below(int n) { return int(engine_() % unsigned(n)); }
  std::vector<float> normals(size_t n) {
    std::vector<float> x(n);
    for (float& v : x) v = normal();
    return x;
  }

private:
  std::mt19937 engine_;
  std::normal_distribution<float> normal_;
};

/// Codebooks differ from subspace to subspace and from head to head, so that a mixed-up index shows.
inline HeadCodec random_codec(Kind kind, int head_dim, double bits, bool dense, Random& random) {
  HeadCodec codec = make_uncalibrated_codec(kind, make_format(head_dim, bits));
  for (int8_t& w : codec.codebook.words) w = int8_t(std::clamp(int(random.normal() * 45), -127, 127));
  for (float& s : codec.codebook.scale) s = 0.02f + 0.005f * float(random.below(4));
  if (dense) {
    std::vector<float> matrix(size_t(head_dim) * head_dim);
    for (float& v : matrix) v = random.normal() / std::sqrt(float(head_dim));
    for (int i = 0; i < head_dim; i++) matrix[size_t(i) * head_dim + i] += 2;
    codec.transform = Transform::dense(random.normals(head_dim), std::move(matrix));
    for (int d = 0; d < head_dim && kind == Kind::key; d++) codec.error.push_back(0.1f * float(random.below(8)));
  }
  codec.derive_tables();
  return codec;
}

/// One head's cells, coded: the blocks that the kernels read, and the transformed numbers that they stand for.
struct CodedHead {
  std::vector<uint8_t> blocks;  // CUDA order
  std::vector<float> decoded;   // [cells][head_dim]
};

inline CodedHead random_head(const HeadCodec& codec, int n_cells, Random& random, bool tiles = false) {
  const Format& format = codec.format;
  const int d = format.head_dim, n_blocks = n_cells / kBlockCells;
  CodedHead head;
  head.blocks.resize(n_blocks * format.block_bytes());
  head.decoded.resize(size_t(n_cells) * d);
  std::vector<uint8_t> block(format.block_bytes());
  for (int b = 0; b < n_blocks; b++) {
    for (int cell = 0; cell < kBlockCells; cell++) {
      const std::vector<float> y = random.normals(d);
      encode_cell(codec, y.data(), block.data(), cell);
      decode_cell(codec, block.data(), cell, &head.decoded[(size_t(b) * kBlockCells + cell) * d]);
    }
    block_to_cuda(format, codec.kind, block.data(), &head.blocks[b * format.block_bytes()], tiles);
  }
  return head;
}

inline double relative_error(const std::vector<float>& x, const std::vector<double>& expected) {
  double error = 0, size = 0;
  for (size_t i = 0; i < x.size(); i++) {
    error += (x[i] - expected[i]) * (x[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  return std::sqrt(error / size);  // NaN wherever x has one
}

/// The sizes of a case, from its members of these names.
template <typename Case>
AttendArgs attend_args(const Case& c, int head_dim) {
  AttendArgs a;
  a.n_streams = c.n_streams;
  a.n_tokens = c.n_tokens;
  a.n_kv_heads = c.n_kv_heads;
  a.group = c.group;
  a.head_dim = head_dim;
  a.n_cells = c.n_cells;
  a.softcap = c.softcap;
  return a;
}

/// The relative error that a format's arithmetic may add: less than a tenth of the codec's own error (see
/// CudaAttend.ArithmeticErrorIsATenthOfTheCodecs), and no more than on the CPU. Subspaces of two numbers have f16 score
/// tables and 16-bit weights, wider ones 8 bits for both.
inline constexpr double tolerance(int key_width, int value_width) {
  return key_width != 2 ? 0.03162 : value_width != 2 ? 0.015 : 1.5e-3;
}

/// The same where tiles are decoded: numbers of the codebook, and queries and weights in two halves each.
inline constexpr double kTileTolerance = 2e-5;

/// The cells of the k greatest scores, in order of cells. Of equal scores the lower cells are taken; cells of score
/// -infinity are not.
inline std::vector<int32_t> greatest(const std::vector<float>& scores, int k) {
  std::vector<int32_t> order;
  for (size_t i = 0; i < scores.size(); i++) {
    if (scores[i] > -INFINITY) order.push_back(int32_t(i));
  }
  std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return scores[x] > scores[y]; });
  if (order.size() > size_t(k)) order.resize(k);
  std::sort(order.begin(), order.end());
  return order;
}

}  // namespace thimble::cuda
