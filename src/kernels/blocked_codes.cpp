// Attention from codes, for every instruction set.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/blocked_parts.h"

namespace thimble::blocked {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Up to kSuperblock blocks, of each of which some query token sees a cell. Masks are by token and block.
struct Superblock {
  int n = 0;
  int index[kSuperblock];  // of the stream's blocks
  const uint8_t* k[kSuperblock];
  const uint8_t* v[kSuperblock];
  uint64_t visible[kMaxCodeTokens][kSuperblock];
  const uint16_t* masks[kMaxCodeTokens][kSuperblock];
  bool adds[kMaxCodeTokens];
  bool adjacent() const { return index[n - 1] - index[0] == n - 1; }
};

// Reads superblock after superblock, and skips blocks of which no query token sees a cell.
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
      s.k[s.n] = cells_.k_block(next_);
      s.v[s.n] = cells_.v_block(next_);
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

// Cuts a value's components into groups; returns how many.
int value_groups(const Format& f, ValueGroup* groups) {
  int n = 0, m = 0;
  for (int d = 0; d < f.head_dim;) {
    ValueGroup& g = groups[n++];
    g = {int16_t(d), int16_t(m), int16_t(m), 4};
    if (f.width(m) == 2) {
      m++;
      g.code_row2 = int16_t(m);
      // Where the number of pairs is odd, the last pair is a group by itself, so that wider subspaces fill whole
      // groups.
      if (m == f.n_width2) g.components = 2;
      m += g.components == 4;
    } else {
      m += d + 4 == f.offset(m) + f.width(m);
    }
    d += g.components;
  }
  return n;
}

// Formats of 3 and 4 bits have subspaces of two numbers. Their coding error is so small that tables and weights of 8
// bits would add to it noticeably.
bool is_wide(const Format& format) {
  return format.n_width2 > 0;
}

// The score tables of all query rows over the keys or, where these are scored as well, the values.
class ScoreTables {
public:
  ScoreTables(const IsaOps& ops, const Queries& queries, const HeadCodec& codec)
      : ops_(ops),
        queries_(queries),
        codec_(codec),
        n_subspaces_(codec.format.n_subspaces()),
        wide_(is_wide(codec.format)),
        row_bytes_(ops.codes.lut_bytes(codec.format.head_dim, n_subspaces_, wide_)) {}

  void carve(Carver& carver) {
    luts_ = carver.take<uint8_t>(queries_.n_rows * row_bytes_);
    steps_ = carver.take<float>(queries_.n_rows);
  }
  size_t room() const { return size_t(n_subspaces_) * (kCodewords + 1); }

  /// `first`: the query's number that goes with the codec's first; `room` [room()].
  void build(int first, float* room) {
    uint8_t widths[kMaxHeadDim / 2];
    for (int m = 0; m < n_subspaces_; m++) widths[m] = uint8_t(codec_.format.width(m));
    for (int row = 0; row < queries_.n_rows; row++) {
      float q[kMaxHeadDim], size = 0;
      for (int m = 0, d = 0; m < n_subspaces_; m++) {
        for (const int end = d + widths[m]; d < end; d++) {
          q[d] = queries_.q[size_t(row) * queries_.dim + first + d] * codec_.codebook.scale[m];
          size += std::fabs(q[d]);
        }
      }
      // A table entry of 1 is worth steps_[row].
      steps_[row] = ops_.codes.build_luts(q, codec_.codebook.words.data(), widths, n_subspaces_, wide_, room,
                                          luts_ + row * row_bytes_);
      if (!std::isfinite(size)) steps_[row] = kNaN;
    }
  }

  /// Writes q.k of the rows [first, first + n).
  void look_up(int first, int n, const uint8_t* const* blocks, int n_blocks, const Prefetch& prefetch,
               const RowScores& scores) const {
    ops_.codes.look_up(luts_ + first * row_bytes_, steps_ + first, n, n_subspaces_, wide_, codec_.kind == Kind::value,
                       blocks, n_blocks, prefetch, scores.data, scores.stride);
  }

private:
  const IsaOps& ops_;
  const Queries& queries_;
  const HeadCodec& codec_;
  int n_subspaces_;
  bool wide_;
  size_t row_bytes_;
  uint8_t* luts_ = nullptr;
  float* steps_ = nullptr;
};

// q.k of coded cells: from the tables of keys and, where rows are latent, from those of values.
class CodeScores {
public:
  CodeScores(const IsaOps& ops, const Queries& queries, const CodedCells& cells)
      : of_values_(queries.of_values), keys_(ops, queries, *cells.keys), values_(ops, queries, *cells.values) {}

  void carve(Carver& carver) {
    keys_.carve(carver);
    if (of_values_ > 0) values_.carve(carver);
    room_ = carver.take<float>(std::max(keys_.room(), of_values_ > 0 ? values_.room() : 0));
    more_ = carver.take<float>(of_values_ > 0 ? kRowsAtOnce * kSuperblockCells : 0);
  }
  void build() {
    keys_.build(of_values_, room_);
    if (of_values_ > 0) values_.build(0, room_);
  }
  void look_up(int first, int n, const Superblock& blocks, const Prefetch& prefetch, const RowScores& scores) const {
    keys_.look_up(first, n, blocks.k, blocks.n, prefetch, scores);
    if (of_values_ == 0) return;
    values_.look_up(first, n, blocks.v, blocks.n, {}, {more_, kSuperblockCells});
    for (int i = 0; i < n; i++) {
      float* to = scores.data + i * scores.stride;
      const float* more = more_ + i * kSuperblockCells;
      for (int cell = 0; cell < blocks.n * kBlockCells; cell++) to[cell] += more[cell];
    }
  }

private:
  int of_values_;
  ScoreTables keys_, values_;
  float *room_ = nullptr, *more_ = nullptr;
};

float* kept_scores(const CodedCells& cells, int row, int block) {
  return cells.scores.data + row * cells.scores.stride + size_t(block) * kBlockCells;
}

// Turns a row's q.k into scores, in place. `log_weight`, `max_log` and the result are those of finish_scores.
float finish(const IsaOps& ops, const Queries& queries, int row, const Superblock& blocks, float* scores,
             const float* log_weight, float* max_log) {
  const int token = row / queries.group;
  return ops.tiles.finish_scores(scores, blocks.n, blocks.visible[token],
                                 blocks.adds[token] ? blocks.masks[token] : nullptr,
                                 queries.bias ? queries.bias[row] : 0.0f, queries.slope ? queries.slope[row] : 1.0f,
                                 queries.softcap, log_weight, max_log);
}

// Returns a row's kept scores of a superblock, block after block: where they are kept, if the blocks are adjacent
// there, else copied to `room`.
float* take_kept(const CodedCells& cells, int row, const Superblock& blocks, float* room) {
  if (blocks.adjacent()) return kept_scores(cells, row, blocks.index[0]);
  for (int b = 0; b < blocks.n; b++) {
    std::copy_n(kept_scores(cells, row, blocks.index[b]), kBlockCells, room + b * kBlockCells);
  }
  return room;
}

void ask_for(const Prefetch& prefetch) {
  for (int b = 0; b < prefetch.n_blocks; b++) {
    for (int line = 0; line < prefetch.lines; line++) __builtin_prefetch(prefetch.blocks[b] + line * 64, 0, 2);
  }
}

// State of the running softmax of one row.
struct Row {
  float max = kUnseen, sum = 0;
};

void attend_codes(const IsaOps& ops, const Queries& queries, const CodedCells& cells, const Mask& mask,
                  Softmax& softmax, Scratch& scratch) {
  const Format &kf = cells.keys->format, &vf = cells.values->format;
  const int n_rows = queries.n_rows, n_tokens = n_rows / queries.group;
  if (kf.f16 || vf.f16 || n_tokens > kMaxCodeTokens) {
    return attend_decoded(ops, queries, cells, mask, softmax, scratch);
  }
  const bool wide_values = is_wide(vf);
  const bool looks_up = !cells.scores.data;
  CodeScores code_scores(ops, queries, cells);
  ValueGroup groups[kMaxHeadDim / 2];
  const int n_groups = value_groups(vf, groups);

  uint8_t* weights;
  float *scores, *scales, *log_scales, *sums;
  Row* rows;
  const auto carve = [&](uint8_t* memory) {
    Carver carver(memory);
    if (looks_up) code_scores.carve(carver);
    scores = carver.take<float>(kRowsAtOnce * kSuperblockCells);
    weights = carver.take<uint8_t>(2 * kRowsAtOnce * kSuperblockCells);
    scales = carver.take<float>(kSuperblockCells);
    log_scales = carver.take<float>(kSuperblockCells);
    sums = carver.take<float>(size_t(n_rows) * n_groups * 16);
    rows = carver.take<Row>(n_rows);
    return carver.used();
  };
  carve(scratch.room(carve(nullptr)));

  if (looks_up) code_scores.build();
  std::fill_n(rows, n_rows, Row{});
  std::fill_n(sums, size_t(n_rows) * n_groups * 16, 0.0f);

  const int chunks = (n_rows + kRowsAtOnce - 1) / kRowsAtOnce;
  const int k_lines = int(kf.block_bytes() / 64), v_lines = int(vf.block_bytes() / 64);
  BlockReader reader(ops, cells, mask, n_tokens);
  Superblock pair[2], *now = &pair[0], *next = &pair[1];
  reader.read(*now);
  if (!looks_up) ask_for({now->v, now->n, v_lines});
  for (; now->n > 0; std::swap(now, next)) {
    reader.read(*next);
    uint64_t bad[kSuperblock];
    for (int chunk = 0; chunk < chunks; chunk++) {
      const int first = n_rows * chunk / chunks, n = n_rows * (chunk + 1) / chunks - first;
      if (looks_up) {
        const Prefetch values_now{now->v, chunk == 0 ? now->n : 0, v_lines};
        code_scores.look_up(first, n, *now, values_now, {scores, kSuperblockCells});
      }
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
        float greatest;
        if (looks_up) {
          greatest = finish(ops, queries, row, *now, s, log_scales, &max_log);
        } else {  // score_codes made scores of them already; cells that were hidden since then become kUnseen here
          s = take_kept(cells, row, *now, s);
          greatest = ops.tiles.finish_scores(s, now->n, now->visible[token], nullptr, 0, 1, 0, log_scales, &max_log);
        }
        for (int b = 0; b < now->n; b++) {
          if (bad[b] & now->visible[token][b]) rows[row].sum = kNaN;
        }
        uint32_t row_used;
        if (greatest == kUnseen) {
          ops.codes.code_weights(s, now->n, 0, scales, wide_values, i, weights, &row_used);  // makes all weights 0
          continue;
        }
        // Weights are exp2(score log2(e) - offset) * scale. The offset makes them as large as their bits allow without
        // a sum that overflows.
        const float offset = std::max(max_log - ops.codes.weight_bits[wide_values], greatest * kLog2e - 100.0f);
        const float sum = ops.codes.code_weights(s, now->n, offset, scales, wide_values, i, weights, &row_used);
        factor[i] = std::exp2(offset - greatest * kLog2e);
        if (greatest > rows[row].max) {
          shrink[i] = weight_of(rows[row].max - greatest);  // 0 at first
          rows[row].max = greatest;
          shrinks = true;
        } else {
          factor[i] *= weight_of(greatest - rows[row].max);
        }
        const float added = sum * factor[i], before = rows[row].sum * shrink[i];
        rows[row].sum = before + added;
        if (!(added < 1e-7f * before)) used |= row_used;  // a smaller addend does not change a float
      }
      const bool last = chunk == chunks - 1;
      if (used || shrinks || last) {
        const int n_next = last ? next->n : 0;
        const Prefetch ahead = looks_up ? Prefetch{next->k, n_next, k_lines} : Prefetch{next->v, n_next, v_lines};
        ops.codes.add_values(now->v, now->n, used, cells.values->codebook.words.data(), groups, n_groups, weights,
                             wide_values, n, shrink, factor, ahead, sums + size_t(first) * n_groups * 16);
      }
    }
  }

  for (int row = 0; row < n_rows; row++) {
    if (rows[row].max == kUnseen && !std::isnan(rows[row].sum)) continue;
    const float greatest = std::max(rows[row].max, softmax.max[row]);
    const float mine = weight_of(rows[row].max - greatest), others = weight_of(softmax.max[row] - greatest);
    softmax.max[row] = greatest;
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

// Raises the cells' best scores to those of `n` rows from `first` on, where these are greater, and keeps the rows'
// scores where they are kept, unless they were written there.
void take_scores(const IsaOps& ops, const CodedCells& cells, const Superblock& blocks, int first, int n,
                 const RowScores& scores, float* best) {
  const int at_once = blocks.adjacent() ? blocks.n : 1;
  for (int b = 0; b < blocks.n; b += at_once) {
    const int n_cells = at_once * kBlockCells;
    const float* from = scores.data + b * kBlockCells;
    ops.tiles.best_of_rows(from, scores.stride, n, n_cells, first > 0, best + size_t(blocks.index[b]) * kBlockCells);
    for (int i = 0; i < n && cells.scores.data; i++) {
      float* kept = kept_scores(cells, first + i, blocks.index[b]);
      if (kept != from + i * scores.stride) std::copy_n(from + i * scores.stride, n_cells, kept);
    }
  }
}

void score_codes(const IsaOps& ops, const Queries& queries, const CodedCells& cells, const Mask& mask, float* best,
                 Scratch& scratch) {
  const Format& kf = cells.keys->format;
  const int n_rows = queries.n_rows;
  CodeScores code_scores(ops, queries, cells);
  float *tile, *values, *row_scores;
  const auto carve = [&](uint8_t* memory) {
    Carver carver(memory);
    if (!kf.f16) code_scores.carve(carver);
    tile = carver.take<float>(kf.f16 ? size_t(kBlockCells) * queries.dim : 0);
    values = carver.take<float>(kf.f16 ? size_t(kBlockCells) * queries.of_values : 0);
    row_scores = carver.take<float>(kRowsAtOnce * kSuperblockCells);
    return carver.used();
  };
  carve(scratch.room(carve(nullptr)));
  if (!kf.f16) code_scores.build();
  int next_block = cells.first_block;  // behind those that were scored
  const auto skip_to = [&](int block) {
    std::fill(best + size_t(next_block) * kBlockCells, best + size_t(block) * kBlockCells, kUnseen);
  };
  BlockReader reader(ops, cells, mask, n_rows / queries.group);
  const int k_lines = int(kf.block_bytes() / 64);
  Superblock pair[2], *now = &pair[0], *next = &pair[1];
  for (reader.read(*now); now->n > 0; std::swap(now, next)) {
    reader.read(*next);
    for (int b = 0; b < now->n; b++) {
      skip_to(now->index[b]);
      next_block = now->index[b] + 1;
    }
    for (int first = 0; first < n_rows; first += kRowsAtOnce) {
      // Scores are made where they are kept, if the blocks are adjacent there.
      const RowScores scores = cells.scores.data && now->adjacent()
                                   ? RowScores{kept_scores(cells, first, now->index[0]), cells.scores.stride}
                                   : RowScores{row_scores, kSuperblockCells};
      const int n = std::min(kRowsAtOnce, n_rows - first);
      if (!kf.f16) {
        code_scores.look_up(first, n, *now, {next->k, first == 0 ? next->n : 0, k_lines}, scores);
      }
      for (int b = 0; b < now->n && kf.f16; b++) {
        if (queries.of_values > 0) {
          decode_block(ops, *cells.values, now->v[b], values);
          values_as_keys(values, queries.of_values, tile);
        }
        decode_block(ops, *cells.keys, now->k[b], tile + size_t(queries.of_values) * kBlockCells);
        ops.tiles.multiply(queries.q + size_t(first) * queries.dim, queries.dim, tile, kBlockCells, n, queries.dim,
                           kBlockCells, scores.data + b * kBlockCells, int(scores.stride), false);
      }
      for (int i = 0; i < n; i++) {
        finish(ops, queries, first + i, *now, scores.data + i * scores.stride, nullptr, nullptr);
      }
      take_scores(ops, cells, *now, first, n, scores, best);
    }
  }
  skip_to(cells.last_block);
}

}  // namespace thimble::blocked
