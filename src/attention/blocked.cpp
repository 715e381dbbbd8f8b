#include "attention/blocked.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "attention/isa.h"
#include "codec/half.h"

namespace thimble {

uint8_t* Scratch::room(size_t bytes) {
  if (bytes > size_) {
    memory_.reset();
    memory_.reset(static_cast<uint8_t*>(::operator new[](bytes, std::align_val_t{64})));
    size_ = bytes;
  }
  return memory_.get();
}

namespace {

constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLog2e = 1.44269504f;
constexpr uint16_t kHiddenHalf = 0xfc00;

struct IsaOps {
  const char* name;
  const TileOps& tiles;
  const CodeOps& codes;
};

// Deals out a Scratch.
class Carver {
public:
  explicit Carver(uint8_t* memory) : memory_(reinterpret_cast<uintptr_t>(memory)) {}  // null: only counts
  template <typename T>
  T* take(size_t n) {
    T* p = reinterpret_cast<T*>(memory_ + used_);
    used_ += (n * sizeof(T) + 63) / 64 * 64;
    return p;
  }
  size_t used() const { return used_; }

private:
  uintptr_t memory_;
  size_t used_ = 0;
};

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

void decode_block(const IsaOps& ops, const HeadCodec& codec, const uint8_t* block, float* tile) {
  const Format& f = codec.format;
  if (f.f16) {
    const uint8_t* rows[kBlockCells];
    for (int i = 0; i < kBlockCells; i++) rows[i] = block + size_t(i) * f.head_dim * 2;
    return load_rows(ops, codec.kind, rows, kBlockCells, f.head_dim, tile);
  }
  uint8_t code_row[kMaxHeadDim];
  float scale[kMaxHeadDim];
  for (int m = 0, d = 0; m < f.n_subspaces(); m++) {
    for (const int end = d + f.width(m); d < end; d++) {
      code_row[d] = uint8_t(m);
      scale[d] = codec.codebook.scale[m];
    }
  }
  const auto decode = codec.kind == Kind::key ? ops.tiles.decode_keys : ops.tiles.decode_values;
  decode(block, block + f.codes_bytes(), codec.codebook.words.data(), code_row, scale, f.head_dim, tile);
}

// -- masks --

// 64 numbers of a mask that ends after n of them.
const uint16_t* padded(const uint16_t* mask, int n, uint16_t* room) {
  if (n >= kBlockCells) return mask;
  std::copy_n(mask, n, room);
  std::fill_n(room + n, kBlockCells - n, kHiddenHalf);
  return room;
}

uint64_t first_bits(int n) {
  return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
}

uint64_t visible(const IsaOps& ops, const uint16_t* mask, int n_cells) {
  uint16_t room[kBlockCells] = {};
  return ops.tiles.mask_bits(padded(mask, n_cells, room)).visible & first_bits(n_cells);
}

// -- dense --

void attend_tile(const IsaOps& ops, const Queries& queries, const Tile& tile, const Mask& mask, Softmax& softmax,
                 Scratch& scratch) {
  constexpr int kRows = 48;  // their scores, the tile's keys and then its values stay in the first-level cache
  float* scores = reinterpret_cast<float*>(scratch.room(kRows * kBlockCells * sizeof(float)));
  const uint64_t present = first_bits(tile.n_cells) & ~tile.hidden;
  // What lies behind the columns of the cells is never looked at.
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
      const float top =
          seen ? ops.tiles.finish_scores(s, 1, &seen, token_mask ? &token_mask : nullptr,
                                         queries.bias ? queries.bias[row] : 0.0f,
                                         queries.slope ? queries.slope[row] : 1.0f, queries.softcap, nullptr, nullptr)
               : kHidden;
      if (top == kHidden) {
        std::fill_n(s, kBlockCells, 0.0f);
        continue;
      }
      if (top > softmax.max[row]) {
        const float shrink = weight_of(softmax.max[row] - top);  // 0 at first
        float* acc = softmax.acc + size_t(row) * softmax.dim;
        for (int d = 0; d < softmax.dim; d++) acc[d] *= shrink;
        softmax.sum[row] *= shrink;
        softmax.max[row] = top;
      }
      softmax.sum[row] += ops.tiles.exponentiate(s, kBlockCells, softmax.max[row]);
    }
    ops.tiles.multiply(scores, kBlockCells, tile.v, softmax.dim, n_rows, tile.n_cells, softmax.dim,
                       softmax.acc + size_t(begin) * softmax.dim, softmax.dim, true);
  }
}

// Block by block through tiles: f16 blocks, and more tokens than attend_codes takes.
void attend_decoded(const IsaOps& ops, const Queries& queries, const CodedCells& cells, const Mask& mask,
                    Softmax& softmax, Scratch& scratch) {
  std::vector<float> k(size_t(kBlockCells) * queries.dim), v(size_t(kBlockCells) * softmax.dim);
  const int n_tokens = queries.n_rows / queries.group;
  for (int b = cells.first_block; b < cells.last_block; b++) {
    const int n_cells = std::min(kBlockCells, cells.n_cells - b * kBlockCells);
    const Mask block_mask = mask.at(ptrdiff_t(b) * kBlockCells);
    uint64_t seen = mask.data ? 0 : ~uint64_t{0};
    for (int t = 0; t < n_tokens && mask.data; t++) {
      seen |= visible(ops, block_mask.data + t * block_mask.stride, n_cells);
    }
    const uint64_t hidden = cells.hidden ? cells.hidden[b] : 0;
    seen &= first_bits(n_cells) & ~hidden;
    if (!seen) continue;
    decode_block(ops, *cells.keys, cells.k_blocks + b * cells.keys->format.block_bytes(), k.data());
    decode_block(ops, *cells.values, cells.v_blocks + b * cells.values->format.block_bytes(), v.data());
    // What nobody sees may never have been written, and 0 times NaN is NaN.
    for (uint64_t left = ~seen; left; left &= left - 1) {
      std::fill_n(&v[size_t(std::countr_zero(left)) * softmax.dim], softmax.dim, 0.0f);
    }
    attend_tile(ops, queries, {n_cells, k.data(), v.data(), hidden}, block_mask, softmax, scratch);
  }
}

// -- from codes --

// The next blocks that some query token sees something of.
struct Superblock {
  int n = 0;
  int index[kSuperblock];
  const uint8_t* k[kSuperblock];
  const uint8_t* v[kSuperblock];
  uint64_t visible[kMaxCodeTokens][kSuperblock];
  const uint16_t* masks[kMaxCodeTokens][kSuperblock];
  bool adds[kMaxCodeTokens];
};

class BlockReader {
public:
  BlockReader(const IsaOps& ops, const CodedCells& cells, const Mask& mask, int n_tokens)
      : ops_(ops), cells_(cells), mask_(mask), n_tokens_(n_tokens), next_(cells.first_block) {}

  void read(Superblock& s) {
    s.n = 0;
    std::fill_n(s.adds, n_tokens_, false);
    for (; next_ < cells_.last_block && s.n < kSuperblock; next_++) {
      const int n_cells = cells_.n_cells - next_ * kBlockCells;
      const uint64_t present = first_bits(n_cells) & ~(cells_.hidden ? cells_.hidden[next_] : 0);
      uint64_t any = mask_.data ? 0 : present;
      for (int t = 0; t < n_tokens_; t++) {
        s.visible[t][s.n] = present;
        if (!mask_.data) continue;
        s.masks[t][s.n] = padded(mask_.at(ptrdiff_t(next_) * kBlockCells).data + t * mask_.stride, n_cells, room_[t]);
        const MaskBits bits = ops_.tiles.mask_bits(s.masks[t][s.n]);
        s.visible[t][s.n] &= bits.visible;
        s.adds[t] |= bits.adds;
        any |= s.visible[t][s.n];
      }
      if (!any) continue;
      s.index[s.n] = next_;
      s.k[s.n] = cells_.k_blocks + next_ * cells_.keys->format.block_bytes();
      s.v[s.n] = cells_.v_blocks + next_ * cells_.values->format.block_bytes();
      s.n++;
    }
  }

private:
  const IsaOps& ops_;
  const CodedCells& cells_;
  const Mask mask_;
  const int n_tokens_;
  int next_;
  uint16_t room_[kMaxCodeTokens][kBlockCells];  // of the last block's mask
};

int value_groups(const Format& f, ValueGroup* groups) {
  int n = 0, m = 0;
  for (int d = 0; d < f.head_dim;) {
    ValueGroup& g = groups[n++];
    g = {int16_t(d), int16_t(m), int16_t(m), 4};
    if (f.width(m) == 2) {
      m++;
      g.code_row2 = int16_t(m);
      // The last of an odd number of pairs stands alone, so that what follows keeps its four to a group.
      if (m == f.n_width2) g.components = 2;
      m += g.components == 4;
    } else {
      m += d + 4 == f.offset(m) + f.width(m);
    }
    d += g.components;
  }
  return n;
}

// Tables of all rows; their steps say how large the unit of a look-up is.
void build_luts(const IsaOps& ops, const Queries& queries, const HeadCodec& keys, bool wide, float* room, uint8_t* luts,
                size_t lut_bytes, float* steps) {
  uint8_t widths[kMaxHeadDim / 2];
  const int n_subspaces = keys.format.n_subspaces();
  for (int m = 0; m < n_subspaces; m++) widths[m] = uint8_t(keys.format.width(m));
  for (int row = 0; row < queries.n_rows; row++) {
    float q[kMaxHeadDim], size = 0;
    for (int m = 0, d = 0; m < n_subspaces; m++) {
      for (const int end = d + widths[m]; d < end; d++) {
        q[d] = queries.q[size_t(row) * queries.dim + d] * keys.codebook.scale[m];
        size += std::fabs(q[d]);
      }
    }
    steps[row] =
        ops.codes.build_luts(q, keys.codebook.words.data(), widths, n_subspaces, wide, room, luts + row * lut_bytes);
    if (!std::isfinite(size)) steps[row] = kNaN;
  }
}

// Pairs of numbers are the format of 3 and 4 bits, whose own error is so small that look-ups and weights of 8 bits
// would add to it.
bool is_wide(const Format& format) {
  return format.n_width2 > 0;
}

size_t lut_bytes_of(const IsaOps& ops, const Format& keys) {
  return ops.codes.lut_bytes(keys.head_dim, keys.n_subspaces(), is_wide(keys));
}

// State of the running softmax of one row.
struct Row {
  float max = kHidden, sum = 0;
};

void attend_codes(const IsaOps& ops, const Queries& queries, const CodedCells& cells, const Mask& mask,
                  Softmax& softmax, Scratch& scratch) {
  const Format &kf = cells.keys->format, &vf = cells.values->format;
  const int n_rows = queries.n_rows, n_tokens = n_rows / queries.group;
  if (kf.f16 || vf.f16 || n_tokens > kMaxCodeTokens) {
    return attend_decoded(ops, queries, cells, mask, softmax, scratch);
  }
  const bool wide_keys = is_wide(kf), wide_values = is_wide(vf);
  const int k_subspaces = kf.n_subspaces();
  const size_t lut_bytes = lut_bytes_of(ops, kf);
  ValueGroup groups[kMaxHeadDim / 2];
  const int n_groups = value_groups(vf, groups);

  uint8_t *luts, *weights;
  float *lut_room, *scores, *scales, *log_scales, *sums, *steps;
  Row* rows;
  const auto carve = [&](uint8_t* memory) {
    Carver carver(memory);
    luts = carver.take<uint8_t>(n_rows * lut_bytes);
    lut_room = carver.take<float>(size_t(k_subspaces) * (kCodewords + 1));
    scores = carver.take<float>(kRowsAtOnce * kSuperblockCells);
    weights = carver.take<uint8_t>(2 * kRowsAtOnce * kSuperblockCells);
    scales = carver.take<float>(kSuperblockCells);
    log_scales = carver.take<float>(kSuperblockCells);
    sums = carver.take<float>(size_t(n_rows) * n_groups * 16);
    steps = carver.take<float>(n_rows);
    rows = carver.take<Row>(n_rows);
    return carver.used();
  };
  carve(scratch.room(carve(nullptr)));

  build_luts(ops, queries, *cells.keys, wide_keys, lut_room, luts, lut_bytes, steps);
  std::fill_n(rows, n_rows, Row{});
  std::fill_n(sums, size_t(n_rows) * n_groups * 16, 0.0f);

  const int chunks = (n_rows + kRowsAtOnce - 1) / kRowsAtOnce;
  const int k_lines = int(kf.block_bytes() / 64), v_lines = int(vf.block_bytes() / 64);
  BlockReader reader(ops, cells, mask, n_tokens);
  Superblock pair[2], *now = &pair[0], *next = &pair[1];
  for (reader.read(*now); now->n > 0; std::swap(now, next)) {
    reader.read(*next);
    uint64_t bad[kSuperblock];
    for (int chunk = 0; chunk < chunks; chunk++) {
      const int first = n_rows * chunk / chunks, n = n_rows * (chunk + 1) / chunks - first;
      const Prefetch values_now{now->v, chunk == 0 ? now->n : 0, v_lines};
      ops.codes.look_up(luts + first * lut_bytes, steps + first, n, k_subspaces, wide_keys, now->k, now->n, values_now,
                        scores);
      if (chunk == 0) {
        ops.codes.value_scales(now->v, now->n, int(vf.codes_bytes()), scales, log_scales, bad);
      }
      float shrink[kRowsAtOnce], factor[kRowsAtOnce];
      uint32_t used = 0;
      bool shrinks = false;
      for (int i = 0; i < n; i++) {
        const int row = first + i, token = row / queries.group;
        float* s = scores + i * kSuperblockCells;
        shrink[i] = 1;
        factor[i] = 0;
        float max_log;
        const float top =
            ops.tiles.finish_scores(s, now->n, now->visible[token], now->adds[token] ? now->masks[token] : nullptr,
                                    queries.bias ? queries.bias[row] : 0.0f, queries.slope ? queries.slope[row] : 1.0f,
                                    queries.softcap, log_scales, &max_log);
        for (int b = 0; b < now->n; b++) {
          if (bad[b] & now->visible[token][b]) rows[row].sum = kNaN;
        }
        uint32_t row_used;
        if (top == kHidden) {
          ops.codes.code_weights(s, now->n, 0, scales, wide_values, i, weights, &row_used);  // all 0
          continue;
        }
        // Weights are exp2(score log2(e) - offset) * scale: as large as their bits take, and no sum overflows.
        const float offset = std::max(max_log - ops.codes.weight_bits[wide_values], top * kLog2e - 100.0f);
        const float sum = ops.codes.code_weights(s, now->n, offset, scales, wide_values, i, weights, &row_used);
        factor[i] = std::exp2(offset - top * kLog2e);
        if (top > rows[row].max) {
          shrink[i] = weight_of(rows[row].max - top);  // 0 at first
          rows[row].max = top;
          shrinks = true;
        } else {
          factor[i] *= weight_of(top - rows[row].max);
        }
        const float added = sum * factor[i], before = rows[row].sum * shrink[i];
        rows[row].sum = before + added;
        if (!(added < 1e-7f * before)) used |= row_used;  // else no float would notice
      }
      const bool last = chunk == chunks - 1;
      if (used || shrinks || last) {
        const Prefetch keys_next{next->k, last ? next->n : 0, k_lines};
        ops.codes.add_values(now->v, now->n, used, cells.values->codebook.words.data(), groups, n_groups, weights,
                             wide_values, n, shrink, factor, keys_next, sums + size_t(first) * n_groups * 16);
      }
    }
  }

  for (int row = 0; row < n_rows; row++) {
    if (rows[row].max == kHidden && !std::isnan(rows[row].sum)) continue;
    const float top = std::max(rows[row].max, softmax.max[row]);
    const float mine = weight_of(rows[row].max - top), others = weight_of(softmax.max[row] - top);
    softmax.max[row] = top;
    softmax.sum[row] = softmax.sum[row] * others + rows[row].sum * mine;
    float* acc = softmax.acc + size_t(row) * softmax.dim;
    for (int g = 0; g < n_groups; g++) {
      const float* part = sums + (size_t(row) * n_groups + g) * 16;
      for (int j = 0; j < groups[g].components; j++) {
        const int m = j < 2 ? groups[g].code_row : groups[g].code_row2, d = groups[g].component + j;
        const float value = (part[j] + part[4 + j] + part[8 + j] + part[12 + j]) * cells.values->codebook.scale[m];
        acc[d] = acc[d] * others + value * mine;
      }
    }
  }
}

// 64 scores, each raised to another row's where that is greater.
void raise(float* best, const float* scores) {
  for (int i = 0; i < kBlockCells; i++) {
    const float score = scores[i] != scores[i] ? -kHidden : scores[i];
    best[i] = score > best[i] ? score : best[i];
  }
}

void score_codes(const IsaOps& ops, const Queries& queries, const CodedCells& cells, const Mask& mask, float* scores,
                 Scratch& scratch) {
  const Format& kf = cells.keys->format;
  const int n_rows = queries.n_rows, n_subspaces = kf.n_subspaces();
  const size_t lut_bytes = lut_bytes_of(ops, kf);
  uint8_t* luts;
  float *room, *tile, *row_scores, *steps;
  const auto carve = [&](uint8_t* memory) {
    Carver carver(memory);
    luts = carver.take<uint8_t>(n_rows * lut_bytes);
    room = carver.take<float>(size_t(n_subspaces) * (kCodewords + 1));
    tile = carver.take<float>(kf.f16 ? size_t(kBlockCells) * kf.head_dim : 0);
    row_scores = carver.take<float>(kRowsAtOnce * kSuperblockCells);
    steps = carver.take<float>(n_rows);
    return carver.used();
  };
  carve(scratch.room(carve(nullptr)));
  if (!kf.f16) build_luts(ops, queries, *cells.keys, is_wide(kf), room, luts, lut_bytes, steps);
  std::fill(scores + cells.first_block * kBlockCells, scores + cells.last_block * kBlockCells, kHidden);
  BlockReader reader(ops, cells, mask, n_rows / queries.group);
  const int k_lines = int(kf.block_bytes() / 64);
  Superblock pair[2], *now = &pair[0], *next = &pair[1];
  for (reader.read(*now); now->n > 0; std::swap(now, next)) {
    reader.read(*next);
    for (int first = 0; first < n_rows; first += kRowsAtOnce) {
      const int n = std::min(kRowsAtOnce, n_rows - first);
      if (!kf.f16) {
        ops.codes.look_up(luts + first * lut_bytes, steps + first, n, n_subspaces, is_wide(kf), now->k, now->n,
                          {next->k, first == 0 ? next->n : 0, k_lines}, row_scores);
      }
      for (int b = 0; b < now->n && kf.f16; b++) {
        decode_block(ops, *cells.keys, now->k[b], tile);
        ops.tiles.multiply(queries.q + size_t(first) * queries.dim, queries.dim, tile, kBlockCells, n, queries.dim,
                           kBlockCells, row_scores + b * kBlockCells, kSuperblockCells, false);
      }
      for (int i = 0; i < n; i++) {
        const int row = first + i, token = row / queries.group;
        float* s = row_scores + i * kSuperblockCells;
        ops.tiles.finish_scores(s, now->n, now->visible[token], now->adds[token] ? now->masks[token] : nullptr,
                                queries.bias ? queries.bias[row] : 0.0f, queries.slope ? queries.slope[row] : 1.0f,
                                queries.softcap, nullptr, nullptr);
        for (int b = 0; b < now->n; b++) raise(scores + now->index[b] * kBlockCells, s + b * kBlockCells);
      }
    }
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
      }};
  return table;
}

}  // namespace

#ifdef THIMBLE_AVX512
const Kernels& avx512_kernels() {
  static constexpr IsaOps kOps{"avx512", kAvx512TileOps, kAvx512CodeOps};
  return kernels_of<kOps>();
}
#endif
#ifdef THIMBLE_AVX2
const Kernels& avx2_kernels() {
  static constexpr IsaOps kOps{"avx2", kAvx2TileOps, kAvx2CodeOps};
  return kernels_of<kOps>();
}
#endif
#ifdef THIMBLE_NEON
const Kernels& neon_kernels() {
  static constexpr IsaOps kOps{"neon", kNeonTileOps, kNeonCodeOps};
  return kernels_of<kOps>();
}
#endif

}  // namespace thimble
