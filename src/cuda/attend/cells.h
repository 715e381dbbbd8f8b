// Decode attention: what a warp does with one block of 64 cells.
//
// In a warp, lane (g, t) = (lane / 4, lane % 4) has the scores of cells 8g .. 8g+7 for query row t.
//   scores:  a cell's score is the sum of its codes' entries in the score table. One load reads the entries of all 4
//            rows. The tensor cores add them up over lanes and steps: the entries are A, and each column of B selects a
//            row. (Kernels for many items at once compute scores as in direct.h.)
//   values:  weights become integers of 8 bits, or of 16 in `wide` formats, relative to the block's greatest. A's rows
//            are words of 4 components, as they are in the codeword table; A's columns are the components of 8 cells.
//            B has a cell's weight at one component and zeros at the others, so that nothing needs to be transposed. A
//            column of B is for a query row and a component; two products cover 4 components. In wide formats a word is
//            two components of two cells, and a query row's two columns are for the two bytes of its weights. Integer
//            sums are exact; those of a block are added to f32 sums.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cuda/attend/bytes.h"
#include "cuda/attend/direct.h"
#include "cuda/attend/items.h"
#include "cuda/attend/parts.h"
#include "cuda/attend/query_rows.h"
#include "cuda/attend/score_table.h"
#include "cuda/attend/shared.h"
#include "cuda/layout.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

template <typename S>
struct AttendCells {
  using Items = AttendItems<S>;
  using Row = typename QueryRows<S>::Row;
  using Shared = AttendShared<S>;
  using Direct = AttendDirect<S>;
  static constexpr int D = S::kHeadDim, MK = S::kKeySubspaces, MV = S::kValueSubspaces;
  static constexpr int kKeyLoads = MK / 8, kValueLoads = MV / 8;  // 16 bytes each, a lane and block
  static constexpr int kSteps = MK / 4;                           // look-ups a lane makes for one key
  static constexpr int kPlaneSteps = key_steps(MK);
  static constexpr int kWordComponents = S::kWideValues ? 2 : 4;  // of values, in a word of A
  static constexpr int kWordCells = 4 / kWordComponents;
  static constexpr int kTiles = D / (16 * kWordComponents);  // of 16 words, the rows of A
  static constexpr int kTurns = 2;                           // products of a tile's A with different columns of B
  static constexpr int kLaneWords = 2 * kTiles;              // of the output that a lane sums up, all of row t

  struct Lane {
    int warp, lane, g, t;
    // Shared memory's address of what a lane looks up of code 0.
    uint32_t keys[kPlaneSteps];  // in the keys' table, by step
    uint32_t values;
    uint32_t select;  // the B operand that keeps each row's scores apart; Direct: what turns its codes
    float dither;     // see weigh
  };

  /// What a warp has attended to so far: the maximum logit and the sums relative to it.
  struct Running {
    float maximum = kNoMaximum, weight = 0;  // weight: this lane's share, to be added over g
    float sum[kLaneWords][kWordComponents] = {};
  };

  SIMT static constexpr int reversed(int x) { return x % 2 * 4 + x / 2 % 2 * 2 + x / 4; }  // of 3 bits

  SIMT static Lane make_lane(const AttendArgs& a) {
    Lane l;
    l.warp = simt::thread() / 32;
    l.lane = simt::thread() % 32;
    l.g = l.lane / 4;
    l.t = l.lane % 4;
    const uint32_t shared = simt::shared_address();
    SIMT_UNROLL
    for (int i = 0; i < kPlaneSteps; i++) {
      if constexpr (S::kDirect) {
        l.keys[i] = shared + Direct::offset(l.g, l.t, i);
      } else {
        const int turned = (i + l.g) % kPlaneSteps;
        const int copy = l.g / kPlaneSteps % S::kKeyCopies;  // lanes that look into the same subspace have their own
        l.keys[i] = shared + Items::slot_of(a, l.warp) * S::kKeyPlaneBytes +
                    uint32_t(l.t + 4 * turned + copy * MK) * S::kKeyEntryBytes;
      }
    }
    l.values = shared + uint32_t(offsetof(Shared, value_table)) +
               uint32_t(l.g * S::kCopies + l.t % S::kCopies) * S::kEntryBytes;
    l.dither = 32768 + (reversed(l.g) + 0.5f) / 64;
    if constexpr (S::kDirect) {
      l.select = Direct::turn_selector(l.g);
      // Else the compiler computes these again for each block, which takes 40 instructions.
      SIMT_UNROLL
      for (int i = 0; i < kPlaneSteps; i++) simt::keep(l.keys[i]);
      simt::keep(l.values);
      simt::keep(l.select);
      simt::keep(l.lane);
      simt::keep(l.g);
      simt::keep(l.t);
    } else {
      // Column g of B. Wide: columns 0 and 4 select even halves (rows 0 and 2 of the group), 2 and 6 odd ones. Else
      // column 2r selects byte r.
      const int row = l.g / 2;
      l.select = l.g % 2 ? 0u : S::kWideKeys ? (row % 2 ? 0x3c000000u : 0x3c00u) : 1u << (8 * row);
    }
    return l;
  }

  // ---- one block of 64 cells

  /// The table's entry for byte n of a lane's codes, at step `step`, without the code's sign.
  template <typename T>
  SIMT static T table_entry(const Lane& l, uint32_t codes, int n, int step) {
    if constexpr (!S::kKeyExpanded) codes &= 0x7f7f7f7fu;
    const uint32_t address = simt::scale_byte(codes, n % 4, S::kKeyRowBytes, l.keys[step % kPlaneSteps]);
    return simt::load_shared<T>(address + step / 8 * S::kKeyPlaneBytes);
  }
  /// All ones if code `byte` of the word is negated and the table has no rows for negated codewords; else 0.
  SIMT static uint32_t sign_of(uint32_t codes, int byte) {
    return S::kKeyExpanded ? 0 : simt::permute(codes, 0, 0x8888u | uint32_t(byte) * 0x1111u);
  }
  SIMT static uint32_t byte_entry(const Lane& l, const uint4 (&codes)[kKeyLoads], int n, int step) {
    const uint32_t word = word_of(codes[n / 16], n % 16 / 4);
    return table_entry<uint32_t>(l, word, n, step) ^ sign_of(word, n % 4);
  }
  SIMT static uint2 wide_entry(const Lane& l, const uint4 (&codes)[kKeyLoads], int n, int step) {
    const uint32_t word = word_of(codes[n / 16], n % 16 / 4);
    const uint2 e = table_entry<uint2>(l, word, n, step);
    const uint32_t flip = sign_of(word, n % 4) & 0x80008000u;
    return make_uint2(e.x ^ flip, e.y ^ flip);
  }

  /// The address in shared memory that a lane reads first.
  SIMT static uint32_t first_address(const Lane& l, const uint4 (&codes)[kKeyLoads]) {
    return simt::scale_byte(codes[0].x, 0, S::kKeyRowBytes, l.keys[0]);
  }

  /// Sums of score table entries of this lane's 8 cells.
  SIMT static void table_scores(const Lane& l, const uint4 (&codes)[kKeyLoads], float (&score)[8]) {
    if constexpr (S::kWideKeys) {
      SIMT_UNROLL
      for (int j = 0; j < 8; j++) {
        float d[4] = {0, 0, 0, 0};
        SIMT_UNROLL
        for (int step = 0; step < kSteps; step += 2) {
          const uint2 x = wide_entry(l, codes, j * kSteps + step, step);
          const uint2 y = wide_entry(l, codes, j * kSteps + step + 1, step + 1);
          simt::mma_f16(d, x.x, x.y, y.x, y.y, l.select, l.select);
        }
        score[j] = l.t / 2 ? d[2] : d[0];
      }
    } else {
      SIMT_UNROLL
      for (int j = 0; j < 8; j += 2) {
        int d[4] = {};
        SIMT_UNROLL
        for (int step = 0; step < kSteps; step += 2) {
          const int n = j * kSteps + step;
          const uint32_t a0 = byte_entry(l, codes, n, step), a1 = byte_entry(l, codes, n + kSteps, step);
          const uint32_t a2 = byte_entry(l, codes, n + 1, step + 1);
          const uint32_t a3 = byte_entry(l, codes, n + kSteps + 1, step + 1);
          simt::mma_s8(d, a0, a1, a2, a3, l.select, l.select);
        }
        score[j] = float(d[0]) + ScoreTable<S>::kEntryHalf * MK;
        score[j + 1] = float(d[2]) + ScoreTable<S>::kEntryHalf * MK;
      }
    }
  }

  SIMT static void scores(const Lane& l, int slot, const uint4 (&codes)[kKeyLoads], float (&score)[8]) {
    if constexpr (S::kDirect) {
      Direct::scores(l.lane, l.keys, l.select, simt::shared() + offsetof(Shared, queries) + slot * Direct::kItemBytes,
                     codes, score);
    } else {
      table_scores(l, codes, score);
    }
  }

  /// Applies softcap, mask and hidden cells to the scores x. Returns the factor that takes x to logits.
  SIMT static float adjust(const AttendArgs& a, const Row& row, float (&x)[8], const uint4& mask, uint32_t skip) {
    float unit = row.factor();
    if (a.softcap != 0) {
      SIMT_UNROLL
      for (int j = 0; j < 8; j++) x[j] = QueryRows<S>::capped(x[j] * unit + row.offset(), a.softcap);
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
    for (int i = 0; i < kLaneWords * kWordComponents; i++) run.sum[i / kWordComponents][i % kWordComponents] *= factor;
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

  /// A lane's weights of query row g / 2, for the cells whose values it reads: byte j % 4 of [half][j / 4] is of cell
  /// 8t + j + 32 half. In wide formats, lanes of even g have the high bytes and those of odd g the low bytes.
  using Weights = uint32_t[2][2];

  /// Makes integer weights of the logits x * unit and the values' scales. Returns what one unit of the integer sums
  /// stands for.
  ///
  /// Weights of 8 bits are rounded with a dither that differs among the 64 cells, so that many small weights do not all
  /// become zero.
  SIMT static float weigh(const Lane& l, Running& run, float (&x)[8], float unit, const uint4& scales,
                          Weights& weights) {
    float greatest = x[0];
    SIMT_UNROLL
    for (int j = 1; j < 8; j++) greatest = fmaxf(greatest, x[j]);
    greatest *= unit;
    // Weights up to 2^8 relative to the maximum do no harm, so the sums are rescaled only beyond that.
    if (simt::any(greatest > run.maximum + 8)) raise(run, fmaxf(run.maximum, over_g(greatest, Max())));
    float largest = 0;
    SIMT_UNROLL
    for (int i = 0; i < 4; i++) {
      const float2 scale = simt::unpack_half2(word_of(scales, i));
      const float p0 = simt::exp2_fast(x[2 * i] * unit - run.maximum);
      const float p1 = simt::exp2_fast(x[2 * i + 1] * unit - run.maximum);
      run.weight += p0 + p1;
      if constexpr (S::kPaged) {  // memory that was never written may hold NaN
        x[2 * i] = p0 == 0 ? 0 : p0 * scale.x;
        x[2 * i + 1] = p1 == 0 ? 0 : p1 * scale.y;
      } else {
        x[2 * i] = p0 * scale.x;
        x[2 * i + 1] = p1 * scale.y;
      }
      largest = simt::max_nan(largest, simt::max_nan(x[2 * i], x[2 * i + 1]));
    }
    largest = simt::max_nan(over_g(largest, Max()), 1e-30f);
    constexpr float kGreatest = S::kWideValues ? 32512 : 255;
    const float to_integer = kGreatest * simt::reciprocal_fast(largest);
    SIMT_UNROLL
    for (int i = 0; i < 2; i++) {
      uint32_t y[4];
      SIMT_UNROLL
      for (int e = 0; e < 4; e++) {
        const int j = 4 * i + e;
        if constexpr (S::kWideValues) {
          // 2^23 + 128 + v: the low bytes of the float are v's, high byte (0..127) and low byte (plus 128).
          y[e] = simt::float_to_bits(x[j] * to_integer + 8388736.0f);
        } else {
          // 2^15 + v + the cell's number with its bits reversed, / 64: the second byte is v, rounded.
          y[e] = simt::float_to_bits(x[j] * to_integer + l.dither + reversed(j) * 0.125f);
        }
      }
      const uint32_t second = second_bytes(y);
      uint32_t first = 0;
      if constexpr (S::kWideValues) {
        first = simt::permute(simt::permute(y[0], y[1], 0x4040), simt::permute(y[2], y[3], 0x4040), 0x5410);
        first ^= 0x80808080u;
      }
      SIMT_UNROLL
      for (int half = 0; half < 2; half++) {
        const int from = 4 * (l.t + 4 * half) + l.g / 2;
        weights[half][i] = simt::shuffle(second, from);
        if constexpr (S::kWideValues) {
          const uint32_t low = simt::shuffle(first, from);
          if (l.g % 2) weights[half][i] = low;
        }
      }
    }
    return largest * (1 / kGreatest);
  }

  template <int Words>
  SIMT static void value_entry(const Lane& l, uint32_t codes, int byte, int u, uint32_t (&entry)[Words]) {
    const int unit = S::kValueWidth == 2 ? u / 2 : u, high = S::kValueWidth == 2 ? u % 2 * 2 : 0;
    const uint32_t address = simt::scale_byte(codes, byte, S::kValueRowBytes, l.values) +
                             unit / S::kUnitsPerRow * S::kValuePlaneBytes + unit % S::kUnitsPerRow * S::kUnitBytes +
                             high;
    if constexpr (S::kValueWidth == 2) {
      entry[0] = simt::load_shared<uint16_t>(address);
    } else if constexpr (S::kValueWidth == 4) {
      entry[0] = simt::load_shared<uint32_t>(address);
    } else {
      const uint2 e = simt::load_shared<uint2>(address);
      entry[0] = e.x;
      entry[1] = e.y;
    }
  }

  /// Words of rows g and g + 8 of a tile of A, of the cells from j on.
  SIMT static void tile_words(const Lane& l, const uint4 (&codes)[kValueLoads], int half, int j, int tile,
                              uint32_t& low, uint32_t& high) {
    const auto entry = [&](int u, int cell, auto& to) {
      value_entry(l, word_of(codes[u], cell / 4 * 2 + half), cell % 4, u, to);
    };
    if constexpr (S::kValueWidth == 8) {
      uint32_t e[2];
      entry(tile, j, e);
      low = e[0];
      high = e[1];
    } else if constexpr (S::kValueWidth == 4) {
      uint32_t e[2][1];
      entry(2 * tile, j, e[0]);
      entry(2 * tile + 1, j, e[1]);
      low = e[0][0];
      high = e[1][0];
    } else {
      uint32_t e[2][2][1];
      SIMT_UNROLL
      for (int i = 0; i < 4; i++) entry(2 * tile + i / 2, j + i % 2, e[i / 2][i % 2]);
      low = simt::permute(e[0][0][0], e[0][1][0], 0x5410);
      high = simt::permute(e[1][0][0], e[1][1][0], 0x5410);
    }
  }

  /// The first component of the i-th word that a lane sums up.
  SIMT static int component(int g, int i) {
    return S::kValueWidth == 8 ? (i / 2 * 8 + g) * 8 + i % 2 * 4 : (i * 8 + g) * kWordComponents;
  }

  SIMT static void add_values(const Lane& l, Running& run, const uint4 (&codes)[kValueLoads], const Weights& weights,
                              float unit) {
    int d[kTiles][kTurns][4] = {};
    // Where the weight goes within column g of B: even columns have it at the first component, odd ones at the next.
    const uint32_t factor = l.g % 2 ? 256 : 1;
    SIMT_UNROLL
    for (int j = 0; j < 8; j += kWordCells) {
      uint32_t b[kTurns][2];
      SIMT_UNROLL
      for (int half = 0; half < 2; half++) {
        const uint32_t word = weights[half][j / 4];
        if constexpr (S::kWideValues) {
          b[0][half] = simt::permute(word, 0, 0x4040u | uint32_t(j % 4 + 1) << 8 | uint32_t(j % 4));
          b[1][half] = b[0][half] << 8;
        } else {
          b[0][half] = simt::scale_byte(word, j % 4, factor, 0);
          b[1][half] = b[0][half] << 16;
        }
      }
      SIMT_UNROLL
      for (int tile = 0; tile < kTiles; tile++) {
        uint32_t a[4];
        tile_words(l, codes, 0, j, tile, a[0], a[1]);
        tile_words(l, codes, 1, j, tile, a[2], a[3]);
        SIMT_UNROLL
        for (int i = 0; i < kTurns; i++) {
          if constexpr (S::kWideValues) {
            simt::mma_s8(d[tile][i], a[0], a[1], a[2], a[3], b[i][0], b[i][1]);
          } else {
            simt::mma_s8u8(d[tile][i], a[0], a[1], a[2], a[3], b[i][0], b[i][1]);
          }
        }
      }
    }
    SIMT_UNROLL
    for (int i = 0; i < kLaneWords; i++) {
      SIMT_UNROLL
      for (int j = 0; j < kWordComponents; j++) {
        if constexpr (S::kWideValues) {
          const int* two = d[i / 2][j] + i % 2 * 2;
          run.sum[i][j] += float(two[0] * 256 + two[1]) * unit;
        } else {
          run.sum[i][j] += float(d[i / 2][j / 2][i % 2 * 2 + j % 2]) * unit;
        }
      }
    }
  }

  /// Leaves a warp's results to be added up (WarpParts); run.weight is over all lanes. It uses the place of the keys'
  /// table.
  SIMT static void leave(const Running& run, int warp, int lane) {
    using Warps = WarpParts<S>;
    const float* scales = simt::shared_at<float, offsetof(Shared, value_scales)>();
    const int g = lane / 4, t = lane % 4;
    float* sums = Warps::sums(warp, t);
    SIMT_UNROLL
    for (int i = 0; i < kLaneWords; i++) {
      const int d = component(g, i);
      const float scale = scales[d / S::kValueWidth];
      float word[kWordComponents];
      SIMT_UNROLL
      for (int j = 0; j < kWordComponents; j++) word[j] = run.sum[i][j] * scale;
      write_floats(sums + d, word);
    }
    if (g == 0) Warps::leave_state(warp, t, run.maximum, run.weight);
  }
};

}  // namespace thimble::cuda
