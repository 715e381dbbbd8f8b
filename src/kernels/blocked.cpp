#include "kernels/blocked.h"

#include <algorithm>
#include <cmath>

#include "codec/half.h"
#include "kernels/blocked_parts.h"

namespace thimble {

uint8_t* Scratch::room(size_t bytes) {
  if (bytes > size_) {
    memory_.reset();
    memory_.reset(static_cast<uint8_t*>(::operator new[](bytes, std::align_val_t{64})));
    size_ = bytes;
  }
  return memory_.get();
}

namespace blocked {
constexpr uint16_t kHiddenHalf = 0xfc00;

// -- encoding and decoding --

uint16_t encode(const IsaOps& ops, const HeadCodec& codec, const float* y, uint8_t* codes) {
  const Format& f = codec.format;
  float square = 0;
  for (int d = 0; d < f.head_dim; d++) square += y[d] * y[d];
  if (square == 0 || !std::isfinite(square)) return encode_vector(codec, y, codes);
  const float inverse_rms = 1.0f / std::sqrt(square / float(f.head_dim));
  int m = 0, d = 0;
  for (const auto& [width, n] : {std::pair{2, f.n_width2}, {4, f.n_width4}, {8, f.n_width8}}) {
    if (n == 0) continue;
    ops.tiles.nearest(y + d, inverse_rms, &codec.words[size_t(d) * kCodewords],
                      &codec.half_norms[size_t(m) * kCodewords], width, n, codes + m);
    m += n;
    d += n * width;
  }
  float along = 0, length = 0;  // <y,c>, <c,c>
  d = 0;
  for (m = 0; m < f.n_subspaces(); m++) {
    for (const int end = d + f.width(m); d < end; d++) {
      const float w = codec.words[size_t(d) * kCodewords + (codes[m] & 0x7f)];
      along += y[d] * (codes[m] & 0x80 ? -w : w);
      length += w * w;
    }
  }
  const float scale = length > 0 ? along / length : 0.0f;
  return float_to_half(std::min(scale, 65504.0f));
}

void load_rows(const IsaOps& ops, Kind kind, const uint8_t* const* rows, int n, int dim, float* tile) {
  (kind == Kind::key ? ops.tiles.load_keys : ops.tiles.load_values)(rows, n, dim, tile);
}

CodeRows::CodeRows(const HeadCodec& codec) {
  const Format& f = codec.format;
  for (int m = 0, d = 0; m < f.n_subspaces(); m++) {
    for (const int end = d + f.width(m); d < end; d++) {
      row[d] = uint8_t(m);
      scale[d] = codec.codebook.scale[m];
    }
  }
}

void decode_block(const IsaOps& ops, const HeadCodec& codec, const uint8_t* block, float* tile) {
  const Format& f = codec.format;
  if (f.f16) {
    const uint8_t* rows[kBlockCells];
    for (int i = 0; i < kBlockCells; i++) rows[i] = block + size_t(i) * f.head_dim * 2;
    return load_rows(ops, codec.kind, rows, kBlockCells, f.head_dim, tile);
  }
  const CodeRows components(codec);
  const auto decode = codec.kind == Kind::key ? ops.tiles.decode_keys : ops.tiles.decode_values;
  decode(block, block + f.codes_bytes(), codec.codebook.words.data(), components.row, components.scale, f.head_dim,
         tile);
}

// -- masks --

const uint16_t* padded(const uint16_t* mask, int n, uint16_t* room) {
  if (n >= kBlockCells) return mask;
  std::copy_n(mask, n, room);
  std::fill_n(room + n, kBlockCells - n, kHiddenHalf);
  return room;
}

uint64_t visible(const IsaOps& ops, const uint16_t* mask, int n_cells) {
  uint16_t room[kBlockCells] = {};
  return ops.tiles.mask_bits(padded(mask, n_cells, room)).visible & first_bits(n_cells);
}

// -- dense --

void attend_tile(const IsaOps& ops, const Queries& queries, const Tile& tile, const Mask& mask, Softmax& softmax,
                 Scratch& scratch) {
  constexpr int kRows = 48;  // so few that their scores and the tile's keys or values stay in the first-level cache
  float* scores = reinterpret_cast<float*>(scratch.room(kRows * kBlockCells * sizeof(float)));
  const uint64_t present = first_bits(tile.n_cells) & ~tile.hidden;
  // Columns behind the cells' own keep old scores, which `present` leaves out.
  const int n_columns = tile.n_cells > 32 ? kBlockCells : (tile.n_cells + 15) / 16 * 16;
  uint16_t room[kBlockCells];
  int token = -1;
  uint64_t seen = present;
  const uint16_t* token_mask = nullptr;
  for (int begin = 0; begin < queries.n_rows; begin += kRows) {
    const int n_rows = std::min(kRows, queries.n_rows - begin);
    ops.tiles.multiply(queries.q + size_t(begin) * queries.dim, queries.dim, tile.k, kBlockCells, n_rows, queries.dim,
                       n_columns, scores, kBlockCells, false);
    for (int i = 0; i < n_rows; i++) {
      const int row = begin + i;
      if (mask.data && row / queries.group != token) {
        token = row / queries.group;
        const uint16_t* whole = padded(mask.data + token * mask.stride, tile.n_cells, room);
        const MaskBits bits = ops.tiles.mask_bits(whole);
        seen = bits.visible & present;
        token_mask = bits.adds ? whole : nullptr;
      }
      float* s = scores + i * kBlockCells;
      const float greatest =
          seen ? ops.tiles.finish_scores(s, 1, &seen, token_mask ? &token_mask : nullptr,
                                         queries.bias ? queries.bias[row] : 0.0f,
                                         queries.slope ? queries.slope[row] : 1.0f, queries.softcap, nullptr, nullptr)
               : kUnseen;
      if (greatest == kUnseen) {
        std::fill_n(s, kBlockCells, 0.0f);
        continue;
      }
      if (greatest > softmax.max[row]) {
        const float shrink = weight_of(softmax.max[row] - greatest);  // 0 at first
        float* acc = softmax.acc + size_t(row) * softmax.dim;
        for (int d = 0; d < softmax.dim; d++) acc[d] *= shrink;
        softmax.sum[row] *= shrink;
        softmax.max[row] = greatest;
      }
      softmax.sum[row] += ops.tiles.exponentiate(s, kBlockCells, softmax.max[row]);
    }
    ops.tiles.multiply(scores, kBlockCells, tile.v, softmax.dim, n_rows, tile.n_cells, softmax.dim,
                       softmax.acc + size_t(begin) * softmax.dim, softmax.dim, true);
  }
}

template <const IsaOps& kOps>
const Kernels& kernels_of() {
  static const Kernels table{
      kOps.name,
      [](const HeadCodec& codec, const float* y, uint8_t* codes) { return encode(kOps, codec, y, codes); },
      {kOps.tiles.times_matrix, kOps.tiles.hadamard},
      [](const HeadCodec& codec, const uint8_t* block, float* tile) { decode_block(kOps, codec, block, tile); },
      [](Kind kind, const uint8_t* const* rows, int n, int dim, float* tile) {
        load_rows(kOps, kind, rows, n, dim, tile);
      },
      [](const uint16_t* mask, int n_cells) { return visible(kOps, mask, n_cells); },
      [](const Queries& q, const Tile& tile, const Mask& mask, Softmax& softmax, Scratch& scratch) {
        attend_tile(kOps, q, tile, mask, softmax, scratch);
      },
      [](const Queries& q, const CodedCells& cells, const Mask& mask, Softmax& softmax, Scratch& scratch) {
        attend_codes(kOps, q, cells, mask, softmax, scratch);
      },
      [](const Queries& q, const CodedCells& cells, const Mask& mask, float* scores, Scratch& scratch) {
        score_codes(kOps, q, cells, mask, scores, scratch);
      },
      kOps.tiles.block_maxima,
      kOps.tiles.at_least};
  return table;
}

}  // namespace blocked

#ifdef THIMBLE_AVX512
const Kernels& avx512_kernels() {
  static constexpr IsaOps kOps{"avx512", kAvx512TileOps, kAvx512CodeOps};
  return blocked::kernels_of<kOps>();
}
#endif
#ifdef THIMBLE_AVX2
const Kernels& avx2_kernels() {
  static constexpr IsaOps kOps{"avx2", kAvx2TileOps, kAvx2CodeOps};
  return blocked::kernels_of<kOps>();
}
#endif
#ifdef THIMBLE_NEON
const Kernels& neon_kernels() {
  static constexpr IsaOps kOps{"neon", kNeonTileOps, kNeonCodeOps};
  return blocked::kernels_of<kOps>();
}
#endif

}  // namespace thimble
