// Decode attention over tiles: what a warp does with one block of 64 cells.
//
// Codes are in the order for tiles (layout.h), whose unit is 8 adjacent numbers. CodecTables::packed has 1024 bytes for
// each unit: for each of its 4, 2 or 1 subspaces 128 codewords of 2, 4 or 8 numbers, bytes XOR 0x80.
//
// In a warp, lane (g, t) = (lane / 4, lane % 4). Both products are made on the tensor cores, as for exact rows
// (exact.h), of codewords without their scales:
//   scores:  A is the queries: rows 0 to 3 are rounded to f16, rows 4 to 7 the remainders. B is 8 cells' keys. Lane (g,
//   t)
//            gets the scores of query row g % 4 and cells 8i + 2t, 8i + 2t + 1, for i from 0 to 7.
//   values:  A is V transposed: the numbers of two cells side by side. B is the weights relative to the block's
//   greatest;
//            columns 0 to 3 are rounded to f16, columns 4 to 7 the remainders.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cuda/attend/bytes.h"
#include "cuda/attend/items.h"
#include "cuda/attend/parts.h"
#include "cuda/attend/queries.h"
#include "cuda/attend/query_rows.h"
#include "cuda/attend/rows.h"
#include "cuda/attend/shared.h"
#include "cuda/layout.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

template <typename S>
struct TileCells {
  static constexpr int D = S::kHeadDim;
  using Items = AttendItems<S>;
  using Queries = AttendQueries<S>;
  using Rows = QueryRows<S>;
  using Row = typename Rows::Row;
  using Warps = WarpParts<S>;
  using Shared = AttendShared<S>;
  static constexpr int kKeyChunks = D / 32, kValueChunks = D / 64;  // of a lane's units, one each
  static constexpr int kUnitBytes = 8 * kCodewords;
  using Logits = float[8][2];  // of cells 8i + 2t + e

  struct Running {
    float maximum = kNoMaximum, weight = 0;  // of query row g % 4; weight: this lane's share, to be added over t
    float sum[4 * kValueChunks][4] = {};     // [16 components][2 components x query rows 2t % 4, 2t % 4 + 1]
  };

  // ---- tables

  SIMT static const uint8_t* words_of(const CodecTables& codec) {
    return reinterpret_cast<const uint8_t*>(codec.packed) + size_t(simt::block_y()) * kCodewords * D;
  }
  /// Starts copying a head's codewords to a table in shared memory, if they are to be there.
  SIMT static void copy_words(const CodecTables& codec, uint8_t* table) {
    if constexpr (!S::kWords) return;
    const uint8_t* from = words_of(codec);
    SIMT_NO_UNROLL
    for (int i = simt::thread() * 16; i < kCodewords * D; i += S::kThreads * 16)
      simt::copy_async<16>(table + i, from + i);
  }
  /// Starts copying the scales of a head's codewords, component by component.
  SIMT static void copy_scales(const CodecTables& codec, uint8_t* scales) {
    const CodeOrder order = codec.order();
    const float* from = codec.scale + size_t(simt::block_y()) * order.n_subspaces();
    SIMT_NO_UNROLL
    for (int d = simt::thread(); d < D; d += S::kThreads)
      simt::copy_async<4>(scales + d * 4, from + order.subspace_of(d));
  }

  /// Transforms the queries in shared memory and makes A of the scores of them, row by row in their place: f16
  /// [row][2][D], with the codewords' scales. Ends with a barrier.
  SIMT static void transform_queries(const AttendArgs& a) {
    constexpr int N = D / 32;
    Queries::transform(a, 1, [&](int, int r, const float(&x)[N], int lane) {
      const float* scales = simt::shared_at<float, offsetof(Shared, key_scales)>() + lane * N;
      float y[N];
      SIMT_UNROLL
      for (int i = 0; i < N; i++) y[i] = x[i] * scales[i];
      const float greatest = Queries::greatest_of(y), inverse = greatest == 0 ? 0.0f : simt::reciprocal_fast(greatest);
      uint32_t* to = simt::shared_at<uint32_t, offsetof(Shared, queries)>() + r * D + lane * (N / 2);
      SIMT_UNROLL
      for (int i = 0; i < N; i += 2) {
        const float y0 = y[i] * inverse, y1 = y[i + 1] * inverse;
        const uint32_t rounded = simt::pack_half2(y0, y1);
        const float2 back = simt::unpack_half2(rounded);
        to[i / 2] = rounded;
        to[D / 2 + i / 2] = simt::pack_half2(y0 - back.x, y1 - back.y);
      }
      return greatest;
    });
    simt::sync();
  }

  // ---- units

  /// A unit's number of subspaces, 4, 2 or 1, and where its codes begin in a block.
  struct Unit {
    int n, begin;
  };
  SIMT static Unit unit(const CodecTables& codec, int u) {
    const int behind2 = u - codec.n_width2 / 4, behind4 = behind2 - codec.n_width4 / 2;
    if (behind2 < 0) return {4, u * 4 * kBlockCells};
    if (behind4 < 0) return {2, (codec.n_width2 + behind2 * 2) * kBlockCells};
    return {1, (codec.n_width2 + codec.n_width4 + behind4) * kBlockCells};
  }

  /// Two of a codeword's numbers as f16, of bytes XOR 0x80: 1024 and a byte is a half of which the byte is the lowest.
  SIMT static uint32_t halves(uint32_t bytes, uint32_t selector, uint32_t sign) {
    return simt::subtract_halves(simt::permute(bytes, 0x64646464u, selector), 0x64806480u) ^ sign;
  }

  /// A head's codewords, of which a unit's begin at `at`: an address in shared memory, or an offset from `global`.
  struct Words {
    const uint8_t* global;
    uint32_t at;
  };
  SIMT static Words unit_words(const CodecTables& codec, size_t table, int u) {
    if constexpr (S::kWords) return {nullptr, simt::shared_address() + uint32_t(table) + u * kUnitBytes};
    return {words_of(codec), uint32_t(u * kUnitBytes)};
  }
  template <typename T>
  SIMT static T load_word(const Words& words, uint32_t at) {
    if constexpr (S::kWords) return simt::load_shared<T>(at);
    return simt::load_constant(reinterpret_cast<const T*>(words.global + at));
  }

  /// Decodes a unit of N subspaces of four cells. `codes` has 4 N bytes of them from byte `first` on.
  template <int N>
  SIMT static void decode(const Words& words, const uint4& codes, int first, uint4 (&numbers)[4]) {
    constexpr int kWidth = 8 / N;
    SIMT_UNROLL
    for (int e = 0; e < 4; e++) {
      uint32_t word[4];
      SIMT_UNROLL
      for (int k = 0; k < N; k++) {
        const int byte = first + e * N + k;
        const uint32_t four = word_of(codes, byte / 4);
        const uint32_t address =
            simt::scale_byte(four & 0x7f7f7f7fu, byte % 4, kWidth, words.at + uint32_t(k * kWidth * kCodewords));
        const uint32_t sign = simt::permute(four, 0, 0x8888u | uint32_t(byte % 4) * 0x1111u) & 0x80008000u;
        if constexpr (N == 1) {
          const uint2 bytes = load_word<uint2>(words, address);
          word[0] = halves(bytes.x, 0x4140, sign);
          word[1] = halves(bytes.x, 0x4342, sign);
          word[2] = halves(bytes.y, 0x4140, sign);
          word[3] = halves(bytes.y, 0x4342, sign);
        } else if constexpr (N == 2) {
          const uint32_t bytes = load_word<uint32_t>(words, address);
          word[2 * k] = halves(bytes, 0x4140, sign);
          word[2 * k + 1] = halves(bytes, 0x4342, sign);
        } else {
          word[k] = halves(load_word<uint16_t>(words, address), 0x4140, sign);
        }
      }
      numbers[e] = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }

  /// Decodes a lane's unit of the i-th four of its cells, whose codes begin at `p`. Codes are loaded 16 bytes at a time
  /// and stay in `codes` from one four to the next.
  SIMT static void decode_four(const Unit& u, const Words& words, const uint8_t* p, int i, bool eight_bytes,
                               uint4& codes, uint4 (&numbers)[4]) {
    if (u.n == 4) {
      codes = simt::load_stream(p + i * 16);
      decode<4>(words, codes, 0, numbers);
    } else if (u.n == 2) {
      if (i % 2 == 0) codes = simt::load_stream(p + i * 8);
      decode<2>(words, codes, i % 2 * 8, numbers);
    } else {
      if (i == 0 && eight_bytes) {
        const uint2 two = simt::load_stream_8(p);
        codes = make_uint4(two.x, two.y, 0, 0);
      }
      if (i == 0 && !eight_bytes) codes = simt::load_stream(p);
      decode<1>(words, codes, i * 4, numbers);
    }
  }

  // ---- one block of 64 cells

  /// The logits of a block's cells for query row g % 4, in units of log2 e; -infinity where a cell is hidden.
  SIMT static void score(const AttendArgs& a, const Row& row, int stream, const uint8_t* block, int index, Logits& x) {
    const int lane = simt::thread() % 32, g = lane / 4, t = lane % 4;
    float d[8][4] = {};
    SIMT_NO_UNROLL
    for (int c = 0; c < kKeyChunks; c++) {
      const int u = 4 * c + t;
      const Unit unit = TileCells::unit(a.key_codec, u);
      const Words words = unit_words(a.key_codec, 0, u);
      const uint4 q = *reinterpret_cast<const uint4*>(simt::shared() + offsetof(Shared, queries) + g % 4 * 4 * D +
                                                      g / 4 * 2 * D + c * 64 + t * 16);
      uint4 codes = make_uint4(0, 0, 0, 0);
      SIMT_UNROLL
      for (int i = 0; i < 2; i++) {
        uint4 k[4];  // of cells 4i .. 4i + 3 of the lane's eight
        // Both halves of the queries are multiplied with them.
        decode_four(unit, words, block + unit.begin + g * 8 * unit.n, i, true, codes, k);
        SIMT_UNROLL
        for (int e = 0; e < 4; e++) {
          simt::mma_f16(d[4 * i + e], q.x, 0, q.y, 0, k[e].x, k[e].y);
          simt::mma_f16(d[4 * i + e], q.z, 0, q.w, 0, k[e].z, k[e].w);
        }
      }
    }
    const float factor = row.factor(), offset = row.offset();
    const uint8_t* scales = block + a.key_codec.order().n_subspaces() * kBlockCells;
    const uint16_t* mask = a.mask ? a.mask + row.mask + index * kBlockCells : nullptr;
    const uint32_t* hidden =
        a.hidden ? a.hidden + stream * a.hidden_stream_stride + simt::block_y() * a.hidden_head_stride + index * 2
                 : nullptr;
    SIMT_UNROLL
    for (int i = 0; i < 8; i++) {
      const int cell = 8 * i + 2 * t;
      const float2 scale = simt::unpack_half2(*reinterpret_cast<const uint32_t*>(scales + cell * 2));
      x[i][0] = (d[i][0] + simt::shuffle_xor(d[i][0], 16)) * scale.x * factor + offset;
      x[i][1] = (d[i][1] + simt::shuffle_xor(d[i][1], 16)) * scale.y * factor + offset;
      if (a.softcap != 0) {
        x[i][0] = Rows::capped(x[i][0], a.softcap);
        x[i][1] = Rows::capped(x[i][1], a.softcap);
      }
      if (mask) {
        const float2 added = simt::unpack_half2(*reinterpret_cast<const uint32_t*>(mask + cell));
        x[i][0] += added.x * row.slope();
        x[i][1] += added.y * row.slope();
      }
      if (hidden) {
        const uint32_t bits = hidden[i / 4] >> cell % 32;
        if (bits & 1) x[i][0] = -INFINITY;
        if (bits & 2) x[i][1] = -INFINITY;
      }
    }
  }

  /// Adds a block's values to `run`, weighted by their logits.
  SIMT static void add(const AttendArgs& a, const uint8_t* block, const Logits& x, Running& run) {
    const int lane = simt::thread() % 32, g = lane / 4, t = lane % 4;
    float greatest = kNoMaximum;
    SIMT_UNROLL
    for (int i = 0; i < 8; i++) greatest = fmaxf(greatest, fmaxf(x[i][0], x[i][1]));
    greatest = fmaxf(greatest, simt::shuffle_xor(greatest, 1));
    greatest = fmaxf(greatest, simt::shuffle_xor(greatest, 2));
    // Weights up to 2^8 relative to the maximum do no harm, so the sums are rescaled only beyond that.
    if (simt::any(greatest > run.maximum + 8)) {
      const float maximum = fmaxf(run.maximum, greatest), factor = simt::exp2_fast(run.maximum - maximum);
      run.maximum = maximum;
      run.weight *= factor;
      multiply_rows(run, factor);
    }
    // Weights with the values' scales, relative to the greatest.
    const uint8_t* scales = block + a.value_codec.order().n_subspaces() * kBlockCells;
    Logits y;
    float largest = 1e-30f;
    SIMT_UNROLL
    for (int i = 0; i < 8; i++) {
      const float2 scale = simt::unpack_half2(*reinterpret_cast<const uint32_t*>(scales + (8 * i + 2 * t) * 2));
      const float p0 = simt::exp2_fast(x[i][0] - run.maximum), p1 = simt::exp2_fast(x[i][1] - run.maximum);
      run.weight += p0 + p1;
      y[i][0] = p0 * scale.x;
      y[i][1] = p1 * scale.y;
      largest = simt::max_nan(largest, simt::max_nan(fabsf(y[i][0]), fabsf(y[i][1])));
    }
    largest = simt::max_nan(largest, simt::shuffle_xor(largest, 1));
    largest = simt::max_nan(largest, simt::shuffle_xor(largest, 2));
    const float inverse = simt::reciprocal_fast(largest);
    uint32_t weights[8];
    SIMT_UNROLL
    for (int i = 0; i < 8; i++) {
      const float w0 = y[i][0] * inverse, w1 = y[i][1] * inverse;
      const uint32_t rounded = simt::pack_half2(w0, w1);
      const float2 back = simt::unpack_half2(rounded);
      weights[i] = g < kRowGroup ? rounded : simt::pack_half2(w0 - back.x, w1 - back.y);
    }
    const float unit0 = simt::shuffle(largest, t % 2 * 8), unit1 = simt::shuffle(largest, t % 2 * 8 + 4);

    SIMT_UNROLL
    for (int c = 0; c < kValueChunks; c++) {
      const int u = 8 * c + g;
      const Unit unit = TileCells::unit(a.value_codec, u);
      const Words words = unit_words(a.value_codec, offsetof(Shared, value_table), u);
      float d[4][4] = {};
      uint4 codes = make_uint4(0, 0, 0, 0);
      SIMT_UNROLL
      for (int i = 0; i < 4; i++) {
        uint4 v[4];
        decode_four(unit, words, block + unit.begin + t * 16 * unit.n, i, false, codes, v);
        SIMT_UNROLL
        for (int w = 0; w < 4; w++) {
          uint32_t word[4];
          SIMT_UNROLL
          for (int e = 0; e < 4; e++) word[e] = word_of(v[e], w);
          simt::mma_f16(d[w], simt::permute(word[0], word[1], 0x5410), simt::permute(word[0], word[1], 0x7632),
                        simt::permute(word[2], word[3], 0x5410), simt::permute(word[2], word[3], 0x7632),
                        weights[2 * i], weights[2 * i + 1]);
        }
      }
      SIMT_UNROLL
      for (int w = 0; w < 4; w++) {
        SIMT_UNROLL
        for (int k = 0; k < 4; k++) run.sum[4 * c + w][k] += d[w][k] * (k % 2 ? unit1 : unit0);
      }
    }
  }

  /// Leaves a warp's results to be added up (WarpParts), in the place of the keys' codewords.
  SIMT static void leave(Running& run, int warp, int lane) {
    const int g = lane / 4, t = lane % 4;
    const float* scales = simt::shared_at<float, offsetof(Shared, value_scales)>();
    run.weight += simt::shuffle_xor(run.weight, 1);
    run.weight += simt::shuffle_xor(run.weight, 2);
    SIMT_UNROLL
    for (int i = 0; i < 4 * kValueChunks; i++) {
      const int d = i / 4 * 64 + g * 8 + i % 4 * 2;
      float sum[4];
      SIMT_UNROLL
      for (int k = 0; k < 4; k++) {
        sum[k] = (run.sum[i][k] + simt::shuffle_xor(run.sum[i][k], 2)) * scales[d + k / 2];
      }
      if (t >= kRowGroup / 2) continue;
      write_floats(Warps::sums(warp, 2 * t) + d, {sum[0], sum[2]});
      write_floats(Warps::sums(warp, 2 * t + 1) + d, {sum[1], sum[3]});
    }
    if (t == 0 && g < kRowGroup) Warps::leave_state(warp, g, run.maximum, run.weight);
  }

private:
  /// Multiplies the sums of each query row with a factor that its lanes hold.
  SIMT static void multiply_rows(Running& run, float factor) {
    const int t = simt::thread() % 4;
    const float f0 = simt::shuffle(factor, t % 2 * 8), f1 = simt::shuffle(factor, t % 2 * 8 + 4);
    SIMT_UNROLL
    for (int i = 0; i < 4 * kValueChunks; i++) {
      SIMT_UNROLL
      for (int k = 0; k < 4; k++) run.sum[i][k] *= k % 2 ? f1 : f0;
    }
  }
};

}  // namespace thimble::cuda
