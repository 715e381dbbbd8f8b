// Decode attention over codes: the kernel's body. See attend_shape.h for the tables and layout.h for the codes' order.
//
// A block serves one KV head and 4 query rows, and works off items: splits of a stream's cells. Its warps each take
// whole blocks of 64 cells. In a warp, lane (g, t) = (lane / 4, lane % 4) has the scores of cells 8g .. 8g+7 for row t.
//   scores:  a cell's score is the sum of its codes' entries in the score table. One load brings the entries of all 4
//            rows; the tensor cores add up over lanes and steps, with a B that selects even or odd halves.
//   values:  weights become 16-bit integers relative to the block's greatest, as two bytes in two columns of B; A is V
//            transposed, straight from the codeword table. Integer sums are exact; each block's are added in f32.
// Each warp has its own running maximum and sums; they meet in shared memory, then, where the cells are split, in
// global memory: the last block to arrive adds all splits up in their order, so results do not depend on timing.
#pragma once

#include "cuda/attend_shape.h"
#include "cuda/hadamard.h"
#include "cuda/simt.h"

namespace thimble::cuda {

template <typename S>
struct AttendKernel {
  static constexpr int D = S::kHeadDim, MK = S::kKeySubspaces, MV = S::kValueSubspaces;
  static constexpr int kKeyLoads = MK / 8, kValueLoads = MV / 8;  // 16 bytes each, a lane and block
  static constexpr int kSteps = MK / 4;                           // look-ups a lane makes for one key
  static constexpr int kPlaneSteps = key_steps(MK);
  static constexpr int kLaneSums = D / 8;  // of the output a lane holds: subspaces g, g + 8, ... for row t
  static constexpr float kNone = -1e30f;   // maximum of no cells at all: finite, so that differences are
  static constexpr float kLog2e = 1.44269504f;

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

  /// The blocks of 64 cells that a warp takes in an item: `index`, then every kWarps-th, `left` in all.
  struct alignas(16) Blocks {
    const uint8_t *keys, *values;
    int item, index, left, padding;
  };
  static_assert(sizeof(Blocks) == 32);

  // Divisions are slow, and there is seldom anything to divide.
  SIMT static int stream_of(const AttendArgs& a, int item) { return a.n_splits == 1 ? item : item / a.n_splits; }
  SIMT static int block_begin(const AttendArgs& a, int split) {
    return a.n_splits == 1 ? a.n_cells / kBlockCells * split
                           : int(uint32_t(a.n_cells / kBlockCells) * split / a.n_splits);
  }
  SIMT static int n_items(const AttendArgs& a) { return a.n_streams * a.n_splits; }

  /// This warp's blocks in b.item or the first later item of this thread block in which it has any. Without one,
  /// b.item becomes n_items, and the pointers stay as they are.
  SIMT static void find(const AttendArgs& a, int warp, Blocks& b) {
    for (; b.item < n_items(a); b.item += simt::blocks_x()) {
      const int stream = stream_of(a, b.item), split = b.item - stream * a.n_splits;
      const int head = simt::block_y() / a.row_groups;
      b.index = block_begin(a, split) + warp;
      b.left = (block_begin(a, split + 1) - b.index + S::kWarps - 1) / S::kWarps;
      if (b.left <= 0) continue;
      const auto at = [&](const CacheView& cache) {
        return cache.data + stream * cache.stream_stride + head * cache.head_stride + b.index * cache.block_stride;
      };
      b.keys = at(a.keys);
      b.values = at(a.values);
      return;
    }
  }

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

  // ---- tables

  SIMT static uint32_t negate_bytes(uint32_t x) {  // -128 does not occur
    return ((~x & 0x7f7f7f7f) + 0x01010101) ^ (~x & 0x80808080);
  }

  // The value table, in two steps: while the codewords are on their way, other things can be asked for.
  static constexpr int kEntryWords = S::kEntryBytes / 4, kRowEntries = S::kUnits * 8;
  static constexpr int kThreadEntries = kCodewords * kRowEntries / S::kThreads;
  static_assert(kCodewords * kRowEntries % S::kThreads == 0);
  using ValueWords = uint32_t[kThreadEntries][kEntryWords];

  SIMT static void load_value_words(const AttendArgs& a, ValueWords& words) {
    const uint32_t* packed = a.value_codec.packed + size_t(simt::block_y() / a.row_groups) * kCodewords * (D / 4);
    SIMT_UNROLL
    for (int k = 0; k < kThreadEntries; k++) {
      SIMT_UNROLL
      for (int j = 0; j < kEntryWords; j++) {
        words[k][j] = simt::load_constant(packed + (simt::thread() + k * S::kThreads) * kEntryWords + j);
      }
    }
  }

  SIMT static void fill_value_table(const ValueWords& words) {
    constexpr int kWords = kEntryWords;
    uint8_t* table = simt::shared() + S::kValueTable;
    SIMT_UNROLL
    for (int k = 0; k < kThreadEntries; k++) {
      const int i = simt::thread() + k * S::kThreads;
      const int code = i / kRowEntries, unit = i % kRowEntries / 8, g = i % 8;
      const uint32_t(&word)[kWords] = words[k];
      uint8_t* at = table + unit / S::kUnitsPerRow * S::kValuePlaneBytes + unit % S::kUnitsPerRow * S::kUnitBytes +
                    g * S::kCopies * S::kEntryBytes;
      SIMT_UNROLL
      for (int sign = 0; sign < 2; sign++) {
        uint32_t* row = reinterpret_cast<uint32_t*>(at + (code + sign * kCodewords) * S::kValueRowBytes);
        if constexpr (S::kCopies * kWords % 4 == 0) {
          SIMT_UNROLL
          for (int j = 0; j < S::kCopies * kWords; j += 4) {
            const uint32_t w0 = sign ? negate_bytes(word[0]) : word[0];
            const uint32_t w1 = sign ? negate_bytes(word[1 % kWords]) : word[1 % kWords];
            *reinterpret_cast<uint4*>(row + j) = make_uint4(w0, w1, w0, w1);
          }
        } else {
          SIMT_UNROLL
          for (int j = 0; j < S::kCopies * kWords; j++) {
            row[j] = sign ? negate_bytes(word[j % kWords]) : word[j % kWords];
          }
        }
      }
    }
  }

  SIMT static void copy_scales(const AttendArgs& a) {
    const int head = simt::block_y() / a.row_groups;
    for (int m = simt::thread(); m < MV; m += S::kThreads) {
      simt::copy_async<4>(simt::shared() + S::kScales + m * 4, a.value_codec.scale + head * MV + m);
    }
    for (int m = simt::thread(); m < MK; m += S::kThreads) {
      simt::copy_async<4>(simt::shared() + S::kKeyScales + m * 4, a.key_codec.scale + head * MK + m);
    }
  }

  /// Signed byte `i` of a word whose bytes were XORed with 0x80, without the slow conversion unit.
  SIMT static float byte_to_float(uint32_t biased, int i) {
    return simt::bits_to_float(simt::permute(biased, 0x4b000000u, 0x7440u | i)) - 8388736.0f;
  }

  /// The first of this block's query rows, among all streams' and heads'.
  SIMT static size_t first_row(const AttendArgs& a, int stream) {
    const int head = simt::block_y() / a.row_groups, row_group = simt::block_y() % a.row_groups;
    return ((size_t(stream) * a.n_kv_heads + head) * a.row_groups + row_group) * S::kRows;
  }
  /// Starts copying an item's queries to shared memory, and their factors to one of two places there: the tables are
  /// made from queries at an item's start, so the next ones may come while it is worked off; factors are used
  /// throughout.
  SIMT static void fetch_queries(const AttendArgs& a, int item, int place) {
    if (item >= n_items(a)) return;
    const size_t row = first_row(a, stream_of(a, item));
    uint8_t* to = simt::shared() + S::kQueries;
    for (int i = simt::thread(); i < S::kRows * D / 4; i += S::kThreads) {
      simt::copy_async<16>(to + i * 16, a.queries + row * D + i * 4);
    }
    if (simt::thread() < S::kRows) {
      simt::copy_async<4>(simt::shared() + S::kFactors + (place * S::kRows + simt::thread()) * 4,
                          a.query_factors + row + simt::thread());
    }
  }

  SIMT static void fill_score_table(const AttendArgs& a) {
    constexpr int W = S::kKeyWidth;
    const int head = simt::block_y() / a.row_groups;
    const float* queries = reinterpret_cast<const float*>(simt::shared() + S::kQueries);
    const uint8_t* packed = reinterpret_cast<const uint8_t*>(a.key_codec.packed) + size_t(head) * kCodewords * D;
    const int slot = simt::thread() % S::kKeySlots, first = simt::thread() / S::kKeySlots;
    SIMT_UNROLL
    for (int plane = 0; plane < S::kKeyPlanes; plane++) {
      const int subspace = plane * 32 + slot % MK;
      const float scale = reinterpret_cast<const float*>(simt::shared() + S::kKeyScales)[subspace];
      float q[S::kRows][W];
      SIMT_UNROLL
      for (int r = 0; r < S::kRows; r++) {
        SIMT_UNROLL
        for (int i = 0; i < W; i++) q[r][i] = queries[r * D + subspace * W + i] * scale;
      }
      uint8_t* at = simt::shared() + plane * S::kKeyPlaneBytes + slot * 8;
      constexpr int kStride = S::kThreads / S::kKeySlots, kEntries = kCodewords / kStride, kWords = (W + 3) / 4;
      uint32_t words[kEntries][kWords];
      SIMT_UNROLL
      for (int k = 0; k < kEntries; k++) {
        const uint8_t* word = packed + ((first + k * kStride) * MK + subspace) * W;
        if constexpr (W == 2) {
          words[k][0] = simt::load_constant(reinterpret_cast<const uint16_t*>(word)) ^ 0x8080u;
        } else {
          SIMT_UNROLL
          for (int i = 0; i < kWords; i++) {
            words[k][i] = simt::load_constant(reinterpret_cast<const uint32_t*>(word) + i) ^ 0x80808080u;
          }
        }
      }
      SIMT_UNROLL
      for (int k = 0; k < kEntries; k++) {
        const int code = first + k * kStride;
        float e[S::kRows] = {};
        SIMT_UNROLL
        for (int i = 0; i < W; i++) {
          const float w = byte_to_float(words[k][i / 4], i % 4);
          SIMT_UNROLL
          for (int r = 0; r < S::kRows; r++) e[r] += q[r][i] * w;
        }
        const uint2 entry = make_uint2(simt::pack_half2(e[0], e[1]), simt::pack_half2(e[2], e[3]));
        *reinterpret_cast<uint2*>(at + code * 256) = entry;
        if constexpr (S::kKeyExpanded) {
          *reinterpret_cast<uint2*>(at + (code + kCodewords) * 256) =
              make_uint2(entry.x ^ 0x80008000u, entry.y ^ 0x80008000u);
        }
      }
    }
  }

  /// This lane's query row.
  struct Row {
    const float* factor;  // from products of table entries to logits, in units of log2 e; in shared memory
    float slope;          // on the mask, in the same units
    uint32_t mask;        // element of a.mask where its token's begins
  };

  SIMT static Row make_row(const AttendArgs& a, int stream, int place, int t) {
    const int kv_head = simt::block_y() / a.row_groups, row = simt::block_y() % a.row_groups * S::kRows + t;
    const int token = row / a.group, head = kv_head * a.group + row % a.group;
    Row r;
    r.factor = reinterpret_cast<const float*>(simt::shared() + S::kFactors) + place * S::kRows + t;
    r.slope = a.slopes ? a.slopes[head] * kLog2e : kLog2e;
    // Rows that only pad the group follow the last token; nobody reads their results.
    r.mask =
        uint32_t(stream * a.mask_stream_stride + (token < a.n_tokens ? token : a.n_tokens - 1) * a.mask_token_stride);
    return r;
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

  SIMT static float capped(float x, float softcap) {  // softcap * tanh(x / softcap), both in units of log2 e
    return softcap * kLog2e * (1 - 2 * simt::reciprocal_fast(simt::exp2_fast(x * (2 / softcap)) + 1));
  }

  /// Softcap, mask and hidden cells. Returns the factor that is left to turn x into logits.
  SIMT static float adjust(const AttendArgs& a, const Row& row, float (&x)[8], const uint4& mask, uint32_t skip) {
    float unit = *row.factor;
    if (a.softcap != 0) {
      SIMT_UNROLL
      for (int j = 0; j < 8; j++) x[j] = capped(x[j] * unit, a.softcap);
      unit = 1;
    }
    if (a.mask) {
      SIMT_UNROLL
      for (int i = 0; i < 4; i++) {
        const float2 pair = simt::unpack_half2(word_of(mask, i));
        x[2 * i] = x[2 * i] * unit + pair.x * row.slope;
        x[2 * i + 1] = x[2 * i + 1] * unit + pair.y * row.slope;
      }
      unit = 1;
    }
    if (simt::any(skip != 0)) {
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
    if constexpr (S::kValueRowBytes == 256) {
      address = simt::permute(codes, l.value_offset, 0x7704u | uint32_t(byte) << 4);
    } else {
      address = simt::permute(codes, 0, 0x4440u | uint32_t(byte)) * S::kValueRowBytes + l.value_offset;
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

  // ---- exact rows

  SIMT static float2 half_pair(const uint16_t* p) { return simt::unpack_half2(*reinterpret_cast<const uint32_t*>(p)); }

  SIMT static void attend_exact(const AttendArgs& a, const Lane& l, const Row& row, Running& run, int stream, int split,
                                const ExactRows& exact) {
    constexpr int W = S::kValueWidth;
    const int head = simt::block_y() / a.row_groups;
    const float* query = reinterpret_cast<const float*>(simt::shared() + S::kQueries) + l.t * D;
    const int32_t* cells =
        exact.cells + (exact.per_head ? (size_t(stream) * a.n_kv_heads + head) : size_t(stream)) * exact.capacity;
    for (int i = split * S::kWarps + l.warp; i < exact.capacity; i += a.n_splits * S::kWarps) {
      const int cell = cells[i];
      if (cell < 0) continue;
      const size_t at = ((size_t(stream) * a.n_kv_heads + head) * exact.capacity + i) * D + l.g * W;
      uint32_t value[D / 16];
      float dot = 0;
      SIMT_UNROLL
      for (int k = 0; k < D / 16; k++) {
        const int d = k / (W / 2) * 8 * W + k % (W / 2) * 2;
        const float2 key = half_pair(exact.keys + at + d);
        value[k] = *reinterpret_cast<const uint32_t*>(exact.values + at + d);
        dot += query[l.g * W + d] * key.x + query[l.g * W + d + 1] * key.y;
      }
      float x = over_g(dot, Add()) * *row.factor;
      if (a.softcap != 0) x = capped(x, a.softcap);
      if (a.mask) x += simt::half_to_float(a.mask[row.mask + cell]) * row.slope;
      if (simt::any(x > run.maximum + 8)) raise(run, fmaxf(run.maximum, x));
      const float p = simt::exp2_fast(x - run.maximum);
      run.weight += l.g == 0 ? p : 0.0f;
      SIMT_UNROLL
      for (int k = 0; k < D / 16; k++) {
        const float2 v = simt::unpack_half2(value[k]);
        run.sum[2 * k] += p * v.x;
        run.sum[2 * k + 1] += p * v.y;
      }
    }
  }

  // ---- combining

  /// The sums of `n` parts, part i with maximum m(i), weight w(i) and value v(i), relative to the greatest maximum.
  /// Reads 8 parts at a time before it uses any: they come from far away.
  template <typename M, typename W, typename V>
  SIMT static void combine(int n, M m, W w, V v, float& maximum, float& weight, float& sum) {
    constexpr int kBatch = 8;
    maximum = kNone;
    weight = sum = 0;
    for (int first = 0; first < n; first += kBatch) {
      float maxima[kBatch], weights[kBatch], values[kBatch];
      SIMT_UNROLL
      for (int i = 0; i < kBatch; i++) {
        const bool there = first + i < n;
        maxima[i] = there ? m(first + i) : kNone;
        weights[i] = there ? w(first + i) : 0.0f;
        values[i] = there ? v(first + i) : 0.0f;
      }
      float top = maximum;
      SIMT_UNROLL
      for (int i = 0; i < kBatch; i++) top = fmaxf(top, maxima[i]);
      const float old = simt::exp2_fast(maximum - top);
      maximum = top;
      weight *= old;
      sum *= old;
      SIMT_UNROLL
      for (int i = 0; i < kBatch; i++) {
        const float factor = simt::exp2_fast(maxima[i] - maximum);
        weight += factor * weights[i];
        sum += factor * values[i];
      }
    }
  }

  /// Normalizes one output component (still transformed) and puts it where `write_output` looks for it.
  SIMT static void normalize(const AttendArgs& a, int r, int d, float maximum, float weight, float sum) {
    const int head = simt::block_y() / a.row_groups, row = simt::block_y() % a.row_groups * S::kRows + r;
    float total = weight;
    if (a.sinks) total += simt::exp2_fast(a.sinks[head * a.group + row % a.group] * kLog2e - maximum);
    const float inverse = total == 0 ? 0.0f : 1 / total;
    uint8_t* shared = simt::shared();
    reinterpret_cast<float*>(shared + S::kOutputs)[r * D + d] = sum * inverse;
    if (d == 0) reinterpret_cast<float*>(shared + S::kWeights)[r] = weight * inverse;
  }

  /// Undoes the values' transform and writes the 4 rows out.
  SIMT static void write_output(const AttendArgs& a, int stream) {
    const int head = simt::block_y() / a.row_groups, row_group = simt::block_y() % a.row_groups;
    const float* rows = reinterpret_cast<const float*>(simt::shared() + S::kOutputs);
    const float* weights = reinterpret_cast<const float*>(simt::shared() + S::kWeights);
    const auto target = [&](int r) -> float* {
      const int row = row_group * S::kRows + r, token = row / a.group;
      if (token >= a.n_tokens) return nullptr;
      const size_t at = (size_t(stream) * a.n_tokens + token) * a.n_kv_heads * a.group + head * a.group + row % a.group;
      return a.output + at * D;
    };
    if (a.value_codec.undo) {
      const float* mean = a.value_codec.mean + head * D;
      const float* matrix = a.value_codec.undo + size_t(head) * D * D;
      for (int d = simt::thread() % D, r0 = simt::thread() / D; r0 < S::kRows; r0 += S::kThreads / D) {
        float* out = target(r0);
        if (!out) continue;
        float sum = 0;
        SIMT_UNROLL_SOME
        for (int i = 0; i < D; i++) sum += rows[r0 * D + i] * matrix[i * D + d];
        out[d] = sum + weights[r0] * mean[d];
      }
    } else {
      const int r = simt::thread() / 32, lane = simt::thread() % 32;
      if (r >= S::kRows) return;
      float x[D / 32];
      SIMT_UNROLL
      for (int i = 0; i < D / 32; i++) x[i] = rows[r * D + lane * (D / 32) + i];
      hadamard_warp<D>(x, lane);
      if (float* out = target(r)) {
        SIMT_UNROLL
        for (int i = 0; i < D / 32; i++) out[lane * (D / 32) + i] = x[i];
      }
    }
  }

  /// Adds the warps up; then either writes the output or leaves a partial result for the last block to arrive.
  SIMT static void finish_item(const AttendArgs& a, const Lane& l, Running& run, int item) {
    uint8_t* shared = simt::shared();
    float* sums = reinterpret_cast<float*>(shared + S::kSums);
    float* states = reinterpret_cast<float*>(shared + S::kStates);
    constexpr int W = S::kValueWidth, kStride = S::kSumStride;
    run.weight = over_g(run.weight, Add());
    simt::sync();  // the score table is used up
    SIMT_UNROLL
    for (int i = 0; i < kLaneSums; i++) {
      sums[(l.warp * S::kRows + l.t) * kStride + (l.g + i / W * 8) * W + i % W] = run.sum[i];
    }
    if (l.g == 0) {
      states[l.warp * 8 + l.t] = run.maximum;
      states[l.warp * 8 + 4 + l.t] = run.weight;
    }
    simt::sync();
    const int stream = stream_of(a, item);
    const int pairs = a.n_kv_heads * a.row_groups;  // of KV head and row group
    float* partial =
        a.n_splits > 1 ? a.partials + (size_t(item) * pairs + simt::block_y()) * S::kPartialFloats : nullptr;
    for (int o = simt::thread(); o < S::kRows * D; o += S::kThreads) {
      const int r = o / D, d = o % D;
      float maximum, weight, sum;
      combine(
          S::kWarps, [&](int i) { return states[i * 8 + r]; }, [&](int i) { return states[i * 8 + 4 + r]; },
          [&](int i) { return sums[(i * S::kRows + r) * kStride + d]; }, maximum, weight, sum);
      if (partial) {
        partial[o] = sum;
        if (d == 0) {
          partial[S::kRows * D + r] = maximum;
          partial[S::kRows * D + S::kRows + r] = weight;
        }
      } else {
        normalize(a, r, d, maximum, weight, sum);
      }
    }
    if (partial) {
      int* last = reinterpret_cast<int*>(shared + S::kLast);
      simt::fence();
      simt::sync();
      int* arrived = a.arrived + size_t(stream) * pairs + simt::block_y();
      if (simt::thread() == 0) {
        *last = simt::atomic_add(arrived, 1) == a.n_splits - 1;
        if (*last) *arrived = 0;
      }
      simt::sync();
      if (!*last) return;  // all threads alike
      simt::fence();
      const size_t stride = size_t(pairs) * S::kPartialFloats;
      const float* first = a.partials + size_t(stream) * a.n_splits * stride + simt::block_y() * S::kPartialFloats;
      for (int o = simt::thread(); o < S::kRows * D; o += S::kThreads) {
        const int r = o / D, d = o % D;
        float maximum, weight, sum;
        combine(
            a.n_splits, [&](int i) { return simt::load_l2(first + i * stride + S::kRows * D + r); },
            [&](int i) { return simt::load_l2(first + i * stride + S::kRows * D + S::kRows + r); },
            [&](int i) { return simt::load_l2(first + i * stride + o); }, maximum, weight, sum);
        normalize(a, r, d, maximum, weight, sum);
      }
    }
    simt::sync();
    write_output(a, stream);
    if constexpr (!S::kOwnOutputs) simt::sync();
  }

  // ---- all of it

  SIMT static void run(const AttendArgs& a) {
    simt::launch_dependents();
    const Lane l = make_lane();
    Blocks next = {};
    next.item = simt::block_x();
    find(a, l.warp, next);
    const auto prefetch = [&](int n) {  // of the blocks from `next` on, the n-th
      simt::prefetch_l2(next.keys + n * S::kWarps * a.keys.block_stride, S::kKeyBlock, l.lane);
      simt::prefetch_l2(next.values + n * S::kWarps * a.values.block_stride, S::kValueBlock, l.lane);
    };
    for (int n = 0; n < 2 && n < next.left; n++) prefetch(n);
    simt::prefetch_l2(reinterpret_cast<const uint8_t*>(a.key_codec.packed) +
                          (simt::block_y() / a.row_groups * S::kWarps + l.warp) * (kCodewords * D / S::kWarps),
                      kCodewords * D / S::kWarps, l.lane);
    copy_scales(a);
    ValueWords value_words;
    load_value_words(a, value_words);
    simt::wait_for_previous_grid();

    fetch_queries(a, simt::block_x(), 0);
    uint4 key_codes[kKeyLoads], value_codes[kValueLoads], key_scales, value_scales;
    const auto load_keys = [&] {
      SIMT_UNROLL
      for (int i = 0; i < kKeyLoads; i++) key_codes[i] = simt::load_stream(next.keys + i * 512 + l.lane * 16);
      key_scales = simt::load_stream(next.keys + MK * kBlockCells + l.g * 16);
    };
    const auto load_values = [&](const uint8_t* p) {
      SIMT_UNROLL
      for (int i = 0; i < kValueLoads; i++) value_codes[i] = simt::load_stream(p + i * 512 + l.lane * 16);
    };
    if (next.left > 0) {
      load_keys();
      if constexpr (S::kDeep) load_values(next.values);
      value_scales = simt::load_stream(next.values + MV * kBlockCells + l.g * 16);
    }
    fill_value_table(value_words);
    simt::wait_for_copies();
    simt::sync();

    int place = 0;
    for (int item = simt::block_x(); item < n_items(a); item += simt::blocks_x(), place ^= 1) {
      const int stream = stream_of(a, item), head = simt::block_y() / a.row_groups;
      const Row row = make_row(a, stream, place, l.t);
      fill_score_table(a);
      Running run;
      run.maximum = kNone;
      run.weight = 0;
      SIMT_UNROLL
      for (int i = 0; i < kLaneSums; i++) run.sum[i] = 0;
      for (int i = 0; i < 2; i++) {
        if (a.exact[i].capacity > 0) attend_exact(a, l, row, run, stream, item - stream * a.n_splits, a.exact[i]);
      }
      simt::sync();
      fetch_queries(a, item + simt::blocks_x(), place ^ 1);

      const uint8_t* hidden = reinterpret_cast<const uint8_t*>(
          a.hidden ? a.hidden + stream * a.hidden_stream_stride + head * a.hidden_head_stride : nullptr);
      // Where the warp goes on after this item is worked out here and kept in shared memory: divisions in the loop
      // would wait for the loads in flight there.
      Blocks* after = reinterpret_cast<Blocks*>(simt::shared() + S::kAfter) + l.warp;
      const bool mine = next.item == item;
      if (mine) {
        Blocks b = next;
        b.item += simt::blocks_x();
        find(a, l.warp, b);
        if (l.lane == 0) *after = b;
      }
      simt::sync_warp();
      int index = next.index;
      for (int left = mine ? next.left : 0; left > 0; left--, index += S::kWarps) {
        const uint8_t* values = next.values;  // this block's; `next` moves on
        // After the last block of all it stays, and is read once more in vain.
        next.keys = left > 1 ? next.keys + S::kWarps * a.keys.block_stride : after->keys;
        next.values = left > 1 ? next.values + S::kWarps * a.values.block_stride : after->values;
        if (left > 2) prefetch(1);
        // The order of what follows is that of waiting: whatever is used up before a load is issued cannot be held up
        // by it, though the hardware has fewer counters for loads in flight than there are kinds of them here.
        uint4 mask = make_uint4(0, 0, 0, 0);
        if (a.mask) mask = simt::load_vector(a.mask + row.mask + index * kBlockCells + l.g * 8);
        const uint32_t skip = hidden ? hidden[index * 8 + l.g] : 0;
        float x[8];
        table_scores(l, key_codes, x);
        if constexpr (!S::kDeep) load_values(values);
        SIMT_UNROLL
        for (int i = 0; i < 4; i++) {
          const float2 scale = simt::unpack_half2(word_of(key_scales, i));
          x[2 * i] *= scale.x;
          x[2 * i + 1] *= scale.y;
        }
        const float unit = adjust(a, row, x, mask, skip);
        load_keys();
        uint32_t b[2][2];
        const float sum_unit = weigh(l, run, x, unit, value_scales, b);
        add_values(l, run, value_codes, b, sum_unit);
        if constexpr (S::kDeep) load_values(next.values);
        value_scales = simt::load_stream(next.values + MV * kBlockCells + l.g * 16);
      }
      if (mine) next = *after;
      simt::wait_for_copies();
      finish_item(a, l, run, item);
    }
  }

  // ---- scores alone, for retrieval

  /// Writes each cell's greatest score over the block's rows, in units of log2 e, to scores [n_streams][n_kv_heads]
  /// [n_cells]. Masked and hidden cells get -infinity. One row group.
  SIMT static void score(const AttendArgs& a, float* scores) {
    simt::launch_dependents();
    const Lane l = make_lane();
    copy_scales(a);
    simt::wait_for_previous_grid();
    for (int item = simt::block_x(); item < n_items(a); item += simt::blocks_x()) {
      const int stream = stream_of(a, item), head = simt::block_y(), split = item - stream * a.n_splits;
      simt::sync();  // the last item's table is used up
      fetch_queries(a, item, 0);
      simt::wait_for_copies();
      simt::sync();
      const Row row = make_row(a, stream, 0, l.t);
      const bool pads = l.t >= a.n_tokens * a.group;
      fill_score_table(a);
      simt::sync();
      const uint8_t* hidden = reinterpret_cast<const uint8_t*>(
          a.hidden ? a.hidden + stream * a.hidden_stream_stride + head * a.hidden_head_stride : nullptr);
      for (int index = block_begin(a, split) + l.warp; index < block_begin(a, split + 1); index += S::kWarps) {
        const uint8_t* block =
            a.keys.data + stream * a.keys.stream_stride + head * a.keys.head_stride + index * a.keys.block_stride;
        uint4 codes[kKeyLoads];
        SIMT_UNROLL
        for (int i = 0; i < kKeyLoads; i++) codes[i] = simt::load_stream(block + i * 512 + l.lane * 16);
        const uint4 scales = simt::load_stream(block + MK * kBlockCells + l.g * 16);
        uint4 mask = make_uint4(0, 0, 0, 0);
        if (a.mask) mask = simt::load_vector(a.mask + row.mask + index * kBlockCells + l.g * 8);
        float x[8];
        table_scores(l, codes, x);
        SIMT_UNROLL
        for (int i = 0; i < 4; i++) {
          const float2 scale = simt::unpack_half2(word_of(scales, i));
          x[2 * i] *= scale.x;
          x[2 * i + 1] *= scale.y;
        }
        const float unit = adjust(a, row, x, mask, hidden ? hidden[index * 8 + l.g] : 0);
        SIMT_UNROLL
        for (int j = 0; j < 8; j++) {
          x[j] = pads ? -INFINITY : x[j] * unit;
          x[j] = fmaxf(x[j], simt::shuffle_xor(x[j], 1));
          x[j] = fmaxf(x[j], simt::shuffle_xor(x[j], 2));
        }
        float* out = scores + (size_t(stream) * a.n_kv_heads + head) * a.n_cells + index * kBlockCells + l.g * 8;
        SIMT_UNROLL
        for (int j = 0; j < 8; j++) {
          if (l.t == j / 2) out[j] = x[j];
        }
      }
    }
  }
};

}  // namespace thimble::cuda
