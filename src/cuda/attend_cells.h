// Decode attention: what a warp does with one block of 64 cells.
//
// In a warp, lane (g, t) = (lane / 4, lane % 4) has the scores of cells 8g .. 8g+7 for query row t.
//   scores:  a cell's score is the sum of its codes' entries in the score table. One load brings the entries of all 4
//            rows; the tensor cores add up over lanes and steps, with a B that selects even or odd halves. For many
//            items at once: attend_direct.h.
//   values:  weights become 16-bit integers relative to the block's greatest, as two bytes in two columns of B; A is V
//            transposed, straight from the codeword table. Integer sums are exact; each block's are added in f32.
#pragma once

#include "cuda/attend_direct.h"
#include "cuda/attend_tables.h"

namespace thimble::cuda {

template <typename S>
struct AttendCells {
  using Items = AttendItems<S>;
  using Direct = AttendDirect<S>;
  static constexpr int D = S::kHeadDim, MK = S::kKeySubspaces, MV = S::kValueSubspaces;
  static constexpr int kKeyLoads = MK / 8, kValueLoads = MV / 8;  // 16 bytes each, a lane and block
  static constexpr int kSteps = MK / 4;                           // look-ups a lane makes for one key
  static constexpr int kPlaneSteps = key_steps(MK);
  static constexpr int kLaneSums = D / 8;  // of the output a lane holds: subspaces g, g + 8, ... for row t
  static constexpr float kLog2e = AttendTables<S>::kLog2e;

  struct Lane {
    int warp, lane, g, t;
    uint32_t key_offsets[(kPlaneSteps + 1) / 2];  // bytes within a score table row, two steps to a word
    uint32_t value_offset;                        // byte within a value row
    uint32_t select;                              // the B operand that keeps each row's sums apart
  };

  /// What a warp has attended to so far: the maximum logit and the sums relative to it.
  struct Running {
    float maximum, weight;  // weight: this lane's share, to be added over g
    float sum[kLaneSums];
  };

  SIMT static Lane make_lane() {
    Lane l;
    l.warp = simt::thread() / 32;
    l.lane = simt::thread() % 32;
    l.g = l.lane / 4;
    l.t = l.lane % 4;
    SIMT_UNROLL
    for (int i = 0; i < (kPlaneSteps + 1) / 2; i++) {
      uint32_t word = 0;
      SIMT_UNROLL
      for (int k = 0; k < 2; k++) {
        if constexpr (S::kDirect) {
          word |= Direct::offset(l.g, l.t, 2 * i + k) << (8 * k);
          continue;
        }
        const int turned = (2 * i + k + l.g) % kPlaneSteps;
        const int copy = MK == 8 ? l.g / 2 % 2 * 8 : 0;  // 8 subspaces stand twice in a row: one for each half of 4 g
        word |= uint32_t(l.t + 4 * turned + copy) * 8 << (8 * k);
      }
      l.key_offsets[i] = word;
    }
    l.value_offset = uint32_t(l.g * S::kCopies + l.t % S::kCopies) * S::kEntryBytes;
    // Column g of B: columns 0 and 4 select even halves (rows 0 and 2 of the group), 2 and 6 odd ones.
    l.select = l.g % 2 ? 0u : l.g / 2 % 2 ? 0x3c000000u : 0x3c00u;
    return l;
  }

  /// This lane's query row. What scores are multiplied with stands in shared memory, registers being scarce.
  struct Row {
    int t, slot;
    uint32_t mask;  // element of a.mask where the mask of its token begins

    /// From products of table entries to logits, in units of log2 e.
    SIMT float factor() const { return of_slot(S::kFactors); }
    /// What all the logits of coded cells lack, in the same units.
    SIMT float offset() const { return of_slot(S::kOffsets); }
    /// On the mask, in the same units.
    SIMT float slope() const { return reinterpret_cast<const float*>(simt::shared() + S::kSlopes)[t]; }

  private:
    SIMT float of_slot(int at) const {
      return reinterpret_cast<const float*>(simt::shared() + at)[(S::kDirect ? slot * S::kRows : 0) + t];
    }
  };

  SIMT static Row make_row(const AttendArgs& a, int stream, int slot, int t) {
    // Rows that only pad the group follow the last token; nobody reads their results.
    const int token = Items::query_row(a, t).token;
    Row r;
    r.t = t;
    r.slot = slot;
    r.mask =
        uint32_t(stream * a.mask_stream_stride + (token < a.n_tokens ? token : a.n_tokens - 1) * a.mask_token_stride);
    return r;
  }

  SIMT static void store_slopes(const AttendArgs& a) {
    const int t = simt::thread();
    if (t >= S::kRows) return;
    reinterpret_cast<float*>(simt::shared() + S::kSlopes)[t] =
        a.slopes ? a.slopes[Items::query_row(a, t).head] * kLog2e : kLog2e;
  }

  // ---- one block of 64 cells

  SIMT static uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

  SIMT static uint2 score_entry(const Lane& l, uint32_t codes, int byte, int step) {
    const uint32_t offsets = l.key_offsets[step % kPlaneSteps / 2];
    const uint32_t pick = 0x7700u | uint32_t(byte) << 4 | uint32_t(4 + step % 2);
    const uint8_t* plane = simt::shared() + step / 8 * S::kKeyPlaneBytes;
    if constexpr (S::kKeyExpanded) {
      return *reinterpret_cast<const uint2*>(plane + simt::permute(codes, offsets, pick));
    } else {
      uint2 e = *reinterpret_cast<const uint2*>(plane + simt::permute(codes & 0x7f7f7f7fu, offsets, pick));
      const uint32_t flip = simt::permute(codes, 0, 0x8888u | uint32_t(byte) * 0x1111u) & 0x80008000u;
      return make_uint2(e.x ^ flip, e.y ^ flip);
    }
  }

  /// Sums of score table entries of this lane's 8 cells.
  SIMT static void table_scores(const Lane& l, const uint4 (&codes)[kKeyLoads], float (&score)[8]) {
    SIMT_UNROLL
    for (int j = 0; j < 8; j++) {
      float d[4] = {0, 0, 0, 0};
      SIMT_UNROLL
      for (int step = 0; step < kSteps; step += 2) {
        const int n = j * kSteps + step;
        const uint32_t word = word_of(codes[n / 16], n % 16 / 4);
        const uint2 x = score_entry(l, word, n % 4, step), y = score_entry(l, word, n % 4 + 1, step + 1);
        simt::mma_f16(d, x.x, x.y, y.x, y.y, l.select, l.select);
      }
      score[j] = l.t / 2 ? d[2] : d[0];
    }
  }

  SIMT static void scores(const Lane& l, int slot, const uint4 (&codes)[kKeyLoads], float (&score)[8]) {
    if constexpr (S::kDirect) {
      Direct::scores(l.lane, l.key_offsets, simt::shared() + S::kQueries + slot * Direct::kFragmentBytes, codes, score);
    } else {
      table_scores(l, codes, score);
    }
  }

  SIMT static float capped(float x, float softcap) {  // softcap * tanh(x / softcap), both in units of log2 e
    return softcap * kLog2e * (1 - 2 * simt::reciprocal_fast(simt::exp2_fast(x * (2 / softcap)) + 1));
  }

  /// Softcap, mask and hidden cells. Returns the factor that is left to turn x into logits.
  SIMT static float adjust(const AttendArgs& a, const Row& row, float (&x)[8], const uint4& mask, uint32_t skip) {
    float unit = row.factor();
    if (a.softcap != 0) {
      SIMT_UNROLL
      for (int j = 0; j < 8; j++) x[j] = capped(x[j] * unit, a.softcap);
      unit = 1;
    }
    if (a.mask) {
      SIMT_UNROLL
      for (int i = 0; i < 4; i++) {
        const float2 pair = simt::unpack_half2(word_of(mask, i));
        x[2 * i] = x[2 * i] * unit + pair.x * row.slope();
        x[2 * i + 1] = x[2 * i + 1] * unit + pair.y * row.slope();
      }
      unit = 1;
    }
    if (a.hidden && simt::any(skip != 0)) {
      SIMT_UNROLL
      for (int j = 0; j < 8; j++) {
        if (skip >> j & 1) x[j] = -INFINITY;
      }
    }
    return unit;
  }

  SIMT static void raise(Running& run, float maximum) {
    const float factor = simt::exp2_fast(run.maximum - maximum);
    run.maximum = maximum;
    run.weight *= factor;
    SIMT_UNROLL
    for (int i = 0; i < kLaneSums; i++) run.sum[i] *= factor;
  }

  template <typename T, typename Op>
  SIMT static T over_g(T x, Op op) {
    x = op(x, simt::shuffle_xor(x, 4));
    x = op(x, simt::shuffle_xor(x, 8));
    return op(x, simt::shuffle_xor(x, 16));
  }
  struct Max {
    SIMT float operator()(float a, float b) const { return simt::max_nan(a, b); }
  };
  struct Add {
    SIMT float operator()(float a, float b) const { return a + b; }
  };

  /// From logits (times `unit`) and the values' scales to B operands: [chunk of 32 cells][half].
  /// Returns what one unit of the integer sums stands for.
  SIMT static float weigh(const Lane& l, Running& run, float (&x)[8], float unit, const uint4& scales,
                          uint32_t (&b)[2][2]) {
    float top = x[0];
    SIMT_UNROLL
    for (int j = 1; j < 8; j++) top = fmaxf(top, x[j]);
    top *= unit;
    // Weights up to 2^8 do no harm, so the sums are seldom rescaled.
    if (simt::any(top > run.maximum + 8)) raise(run, fmaxf(run.maximum, over_g(top, Max())));
    float largest = 0;
    SIMT_UNROLL
    for (int i = 0; i < 4; i++) {
      const float2 scale = simt::unpack_half2(word_of(scales, i));
      const float p0 = simt::exp2_fast(x[2 * i] * unit - run.maximum);
      const float p1 = simt::exp2_fast(x[2 * i + 1] * unit - run.maximum);
      run.weight += p0 + p1;
      x[2 * i] = p0 * scale.x;
      x[2 * i + 1] = p1 * scale.y;
      largest = simt::max_nan(largest, simt::max_nan(x[2 * i], x[2 * i + 1]));
    }
    largest = simt::max_nan(over_g(largest, Max()), 1e-30f);
    const float to_integer = 32512 * simt::reciprocal_fast(largest);
    SIMT_UNROLL
    for (int chunk = 0; chunk < 2; chunk++) {
      // 2^23 + 128 + v: the low bytes of the float are v's, high byte (0..127) and low byte (plus 128).
      uint32_t y[4];
      SIMT_UNROLL
      for (int e = 0; e < 4; e++) y[e] = simt::float_to_bits(x[4 * chunk + e] * to_integer + 8388736.0f);
      const uint32_t y01 = simt::permute(y[0], y[1], 0x5140), y23 = simt::permute(y[2], y[3], 0x5140);
      const uint32_t low = simt::permute(y01, y23, 0x5410) ^ 0x80808080u, high = simt::permute(y01, y23, 0x7632);
      // Columns of B: rows' high bytes in even ones, low bytes in odd ones.
      SIMT_UNROLL
      for (int half = 0; half < 2; half++) {
        const int from = 4 * (l.t + 4 * half) + l.g / 2;
        const uint32_t h = simt::shuffle(high, from), w = simt::shuffle(low, from);
        b[chunk][half] = l.g % 2 ? w : h;
      }
    }
    return largest * (1.0f / 32512);
  }

  template <int Words>
  SIMT static void value_entry(const Lane& l, uint32_t codes, int byte, int u, uint32_t (&entry)[Words]) {
    const int unit = S::kValueWidth == 2 ? u / 2 : u, high = S::kValueWidth == 2 ? u % 2 * 2 : 0;
    uint32_t address;
    if constexpr (S::kValueWidth == 2 && S::kValueRowBytes == 256) {
      address = simt::permute(codes, l.value_offset, 0x7704u | uint32_t(byte) << 4);
    } else {  // permutes are most of what there is to do; width 2 gains nothing by this
      address = simt::scale_byte(codes, byte, S::kValueRowBytes, l.value_offset);
    }
    const uint8_t* at = simt::shared() + S::kValueTable + unit / S::kUnitsPerRow * S::kValuePlaneBytes +
                        unit % S::kUnitsPerRow * S::kUnitBytes + high + address;
    if constexpr (S::kValueWidth == 2) {
      entry[0] = *reinterpret_cast<const uint16_t*>(at);
    } else if constexpr (S::kValueWidth == 4) {
      entry[0] = *reinterpret_cast<const uint32_t*>(at);
    } else {
      const uint2 e = *reinterpret_cast<const uint2*>(at);
      entry[0] = e.x;
      entry[1] = e.y;
    }
  }

  /// Components of one subspace for 4 cells: one word a component, a byte a cell.
  SIMT static void gather(const Lane& l, uint32_t codes, int u, uint32_t (&rows)[S::kValueWidth]) {
    constexpr int kWords = S::kValueWidth == 8 ? 2 : 1;
    uint32_t e[4][kWords];
    SIMT_UNROLL
    for (int i = 0; i < 4; i++) value_entry(l, codes, i, u, e[i]);
    SIMT_UNROLL
    for (int w = 0; w < kWords; w++) {
      const uint32_t x = simt::permute(e[0][w], e[1][w], 0x5140), y = simt::permute(e[2][w], e[3][w], 0x5140);
      rows[4 * w] = simt::permute(x, y, 0x5410);
      rows[4 * w + 1] = simt::permute(x, y, 0x7632);
      if constexpr (S::kValueWidth > 2) {
        const uint32_t z = simt::permute(e[0][w], e[1][w], 0x7362), v = simt::permute(e[2][w], e[3][w], 0x7362);
        rows[4 * w + 2] = simt::permute(z, v, 0x5410);
        rows[4 * w + 3] = simt::permute(z, v, 0x7632);
      }
    }
  }

  SIMT static void add_values(const Lane& l, Running& run, const uint4 (&codes)[kValueLoads], const uint32_t (&b)[2][2],
                              float unit) {
    constexpr int W = S::kValueWidth;
    SIMT_UNROLL
    for (int u = 0; u < kValueLoads; u++) {
      int d[W / 2][4] = {};
      SIMT_UNROLL
      for (int chunk = 0; chunk < 2; chunk++) {
        uint32_t rows[2][W];
        gather(l, word_of(codes[u], 2 * chunk), u, rows[0]);
        gather(l, word_of(codes[u], 2 * chunk + 1), u, rows[1]);
        SIMT_UNROLL
        for (int h = 0; h < W / 2; h++) {
          simt::mma_s8(d[h], rows[0][2 * h], rows[0][2 * h + 1], rows[1][2 * h], rows[1][2 * h + 1], b[chunk][0],
                       b[chunk][1]);
        }
      }
      const float scale = unit * reinterpret_cast<const float*>(simt::shared() + S::kScales)[l.g + 8 * u];
      SIMT_UNROLL
      for (int h = 0; h < W / 2; h++) {
        run.sum[u * W + 2 * h] += float(d[h][0] * 256 + d[h][1]) * scale;
        run.sum[u * W + 2 * h + 1] += float(d[h][2] * 256 + d[h][3]) * scale;
      }
    }
  }
};

}  // namespace thimble::cuda
