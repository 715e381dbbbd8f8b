// Decode attention: scores of many items at once, from the codewords themselves. Each item has queries of its own and
// would need a score table of its own, while one table of the keys' codewords serves all items.
//
// A warp's 64 cells are four tiles of A with 16 rows each; A's columns are components. One load from the table is one
// or two registers of A. B is the item's queries, as integers of 8 bits, or of 16 in `wide` formats, with two columns
// for each of the 4 query rows. In wide formats the even column has the high bytes and the odd one the low bytes. Sums
// are integers, so that only the rounding of queries adds an error.
//
// The 8 lanes that read the same subspaces must read from different banks of shared memory. For this, lanes of even and
// of odd g have copies of their own; in the copy for odd g, the subspaces s and s ^ 4 are exchanged. And each pair of g
// goes through the subspaces in an order of its own, rotated by g with its lowest bit cleared. All rows of A are
// multiplied with the same B, so the even columns of B are for one rotation and the odd ones for the other (wide
// formats make a product for each rotation); each lane keeps the sums of its own rotation. At width 4, reading each
// bank twice costs less than four rotations would.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/attend/bytes.h"
#include "cuda/attend/queries.h"
#include "cuda/attend/shared.h"
#include "cuda/layout.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

template <typename S>
struct AttendDirect {
  using Queries = AttendQueries<S>;
  static constexpr int D = S::kHeadDim, MK = S::kKeySubspaces;
  static constexpr int W = S::kKeyWidth;
  using Shared = AttendShared<S>;
  static constexpr int kSteps = key_steps(MK);   // look-ups in which a lane walks its subspaces
  static constexpr int kTurns = W == 4 ? 2 : 1;  // of lanes that look into the same bank
  static constexpr int kRotations = kSteps / 2 / kTurns;
  static constexpr int kProducts = S::kWideKeys ? kRotations : 1;
  static_assert(S::kWideKeys || kRotations <= 2);
  static constexpr int kCellCodes = MK / 4;                     // bytes a lane has of a cell
  static constexpr int kPairWords = kCellCodes / 2;             // words a lane has of two cells
  static constexpr int kEntryBytes = W == 8 ? 8 : 4;            // W 2: subspaces s and s + 32 side by side
  static constexpr int kSlots = MK < 32 ? MK : 32;              // entries of a code
  static constexpr int kCopies = 128 / (kSlots * kEntryBytes);  // in either half of a row of the table
  static constexpr int kQueryWords = D / 16;                    // of B that a lane holds
  // An item's queries as B: for each of the 4 rows uint32_t [kQueryWords / 4][8 lanes][4], in the place of the row.
  static constexpr int kRowBytes = D * 4, kItemBytes = S::kRows * kRowBytes;
  static_assert(kQueryWords * 32 <= kRowBytes);

  // The table has the head's codewords and their negatives: a row of 256 bytes for each code, with a half for lanes of
  // even g and one for those of odd g. It is made in two steps, load and fill, like the other tables.
  static constexpr int kVectors = kCodewords * 16 / S::kThreads;  // of 16 bytes, a thread
  using Codewords = uint4[kVectors];

  SIMT static void load_codewords(const AttendArgs& a, Codewords& codewords) {
    const uint8_t* packed =
        reinterpret_cast<const uint8_t*>(a.key_codec.packed) + size_t(simt::block_y()) * kCodewords * D;
    SIMT_UNROLL
    for (int k = 0; k < kVectors; k++) {
      const int i = simt::thread() + k * S::kThreads, code = i / 16, half = i / 8 % 2;
      // The subspaces that stand here, the first of them.
      const int slot = (i % 8 * 16 / kEntryBytes) % kSlots ^ half * 4;
      const uint8_t* word = packed + code * D;
      if constexpr (W == 2) {
        const uint2 low = simt::load_constant(reinterpret_cast<const uint2*>(word + slot * 2));
        const uint2 high = simt::load_constant(reinterpret_cast<const uint2*>(word + (slot + 32) * 2));
        codewords[k] = make_uint4(low.x, low.y, high.x, high.y);
      } else {
        codewords[k] = simt::load_constant(reinterpret_cast<const uint4*>(word + slot * W));
      }
    }
  }

  SIMT static void fill_codewords(const Codewords& codewords) {
    SIMT_UNROLL
    for (int k = 0; k < kVectors; k++) {
      const int i = simt::thread() + k * S::kThreads, code = i / 16;
      uint4 v = codewords[k];
      if constexpr (W == 2) {
        v = make_uint4(simt::permute(v.x, v.z, 0x5410), simt::permute(v.x, v.z, 0x7632),
                       simt::permute(v.y, v.w, 0x5410), simt::permute(v.y, v.w, 0x7632));
      }
      uint4* to = reinterpret_cast<uint4*>(simt::shared() + code * S::kKeyRowBytes + i % 16 * 16);
      to[0] = v;
      to[kCodewords * 16] = make_uint4(negate_bytes(v.x), negate_bytes(v.y), negate_bytes(v.z), negate_bytes(v.w));
    }
  }

  /// Makes B of a batch's queries: transforms them and multiplies them with the codewords' scales. The caller needs a
  /// barrier before it reads B.
  SIMT static void fill_queries(const AttendArgs& a, int n_slots) {
    Queries::transform(a, n_slots, [&](int slot, int r, const float(&x)[D / 32], int lane) {
      constexpr int N = D / 32, kUnit = S::kWideKeys ? 32512 : 127;
      const float* scales = simt::shared_at<float, offsetof(Shared, key_scales)>();
      float y[N];
      SIMT_UNROLL
      for (int i = 0; i < N; i++) y[i] = x[i] * scales[W < N ? (lane * N + i) / W : lane / (W / N)];
      const float greatest = Queries::greatest_of(y),
                  to_integer = greatest == 0 ? 0.0f : kUnit * simt::reciprocal_fast(greatest);
      uint8_t* row = simt::shared() + offsetof(Shared, queries) + slot * kItemBytes + r * kRowBytes;
      // Components that lie side by side in B: a pair, or at W 4 and 8 all that a lane has.
      constexpr int kTogether = W == 2 ? 2 : N;
      using Together = std::conditional_t<kTogether == 4, uint32_t, uint16_t>;
      SIMT_UNROLL
      for (int i = 0; i < N; i += kTogether) {
        const int d = lane * N + i, subspace = d / W % 32;
        const int byte = W == 2 ? d / 64 * 2 : d % 4;
        const auto put = [&](int column, int word, uint32_t bytes) {  // columns: of the query row
          *reinterpret_cast<Together*>(row + word / 4 * 128 + column * 64 + subspace % 4 * 16 + word % 4 * 4 + byte) =
              Together(bytes);
        };
        // 3 * 2^22 + v: the low bytes of the float are v's. Wide: + 128, so that the low byte is signed but for 0x80.
        constexpr float kStart = S::kWideKeys ? 12583040 : 12582912;
        uint32_t v[kTogether];
        SIMT_UNROLL
        for (int k = 0; k < kTogether; k++) v[k] = simt::float_to_bits(y[i + k] * to_integer + kStart);
        uint32_t low = simt::permute(v[0], v[1], 0x4040);
        if constexpr (kTogether == 4) low = simt::permute(low, simt::permute(v[2], v[3], 0x4040), 0x5410);
        if constexpr (S::kWideKeys) {
          put(0, subspace / 4, simt::permute(v[0], v[1], 0x5151));
          put(1, subspace / 4, low ^ 0x8080);
        } else if constexpr (W == 8) {
          const int word = subspace / 4 * 2 + d % 8 / 4;
          put(0, word, low);
          put(1, (word + 2 * kSteps - 4 * (kRotations - 1)) % (2 * kSteps), low);
        } else {
          put(0, subspace / 4, low);
          put(1, (subspace / 4 + kSteps - 2 * (kRotations - 1)) % kSteps, low);
        }
      }
      return greatest * (1.0f / kUnit);
    });
  }

  /// The number of steps by which the order of lanes with this g is rotated.
  SIMT static int rotation(int g) { return (g & ~1) % (2 * kRotations); }

  /// Bytes within a row of the table at which a lane looks at step `step`.
  SIMT static uint32_t offset(int g, int t, int step) {
    const int subspace = t + 4 * ((step + rotation(g)) % kSteps), copy = g / kSteps % kCopies;
    return uint32_t(g % 2 * 128 + copy * kSlots * kEntryBytes + (subspace ^ g % 2 * 4) * kEntryBytes);
  }

  /// The selector for `turn`, which puts a lane's codes of two cells, rotated by g as they are in memory, into the
  /// order of its steps.
  SIMT static uint32_t turn_selector(int g) {
    const int by = (rotation(g) - g + 8) % kSteps;
    if constexpr (kSteps == 2) return by ? 0x2301 : 0x3210;
    uint32_t selector = 0;
    SIMT_UNROLL
    for (int i = 0; i < 4; i++) selector |= uint32_t((by + i) % kSteps) << (4 * i);
    return selector;
  }
  SIMT static void turn(uint32_t selector, uint32_t (&codes)[kPairWords]) {
    if constexpr (kSteps == 8) {
      SIMT_UNROLL
      for (int i = 0; i < kPairWords; i += 2) {
        const uint32_t low = codes[i], high = codes[i + 1];
        codes[i] = simt::permute(low, high, selector);
        codes[i + 1] = simt::permute(high, low, selector);
      }
    } else {
      SIMT_UNROLL
      for (int i = 0; i < kPairWords; i++) codes[i] = simt::permute(codes[i], codes[i], selector);
    }
  }

  /// The table's entry for byte n of a lane's codes of two cells, at step `step`.
  template <typename T>
  SIMT static T entry(const uint32_t (&rows)[kSteps], const uint32_t (&codes)[kPairWords], int n, int step) {
    return simt::load_shared<T>(simt::scale_byte(codes[n / 4], n % 4, S::kKeyRowBytes, rows[step]));
  }

  /// Computes the scores of a lane's pair of cells.
  SIMT static void sum_pair(int g, const uint32_t (&rows)[kSteps], const uint32_t (&query)[kQueryWords],
                            const uint32_t (&codes)[kPairWords], float& score0, float& score1) {
    int d[kProducts][4] = {};
    SIMT_UNROLL
    for (int step = 0; step < kSteps; step += W == 8 ? 1 : 2) {
      uint32_t a[4];  // of the two cells; the second one's are odd
      if constexpr (W == 8) {
        SIMT_UNROLL
        for (int cell = 0; cell < 2; cell++) {
          const uint2 e = entry<uint2>(rows, codes, cell * kCellCodes + step, step);
          a[cell] = e.x;
          a[2 + cell] = e.y;
        }
      } else {
        SIMT_UNROLL
        for (int i = 0; i < 4; i++) {
          const int s = step + i / 2, n = i % 2 * kCellCodes + s;
          a[i] = entry<uint32_t>(rows, codes, n, s);
          if constexpr (W == 2) a[i] = simt::permute(a[i], entry<uint32_t>(rows, codes, n + kSteps, s), 0x7610);
        }
      }
      SIMT_UNROLL
      for (int k = 0; k < kProducts; k++) {
        const int first = W == 8 ? step * 2 : (step + 2 * k) % kSteps;
        simt::mma_s8(d[k], a[0], a[1], a[2], a[3], query[first], query[first + 1]);
      }
    }
    SIMT_UNROLL
    for (int cell = 0; cell < 2; cell++) {
      int sum = 0;
      SIMT_UNROLL
      for (int k = 0; k < kRotations; k++) {
        const int other =
            S::kWideKeys ? d[k % kProducts][2 * cell] * 256 + d[k % kProducts][2 * cell + 1] : d[0][2 * cell + k % 2];
        sum = g / 2 % kRotations == k ? other : sum;
      }
      (cell == 0 ? score0 : score1) = float(sum);
    }
  }

  /// Computes the products of this lane's 8 cells with its query row, up to the factor of the row. `rows` has the
  /// lane's address in row 0 of the table for each step; `queries` is B of the item.
  SIMT static void scores(int lane, const uint32_t (&rows)[kSteps], uint32_t selector, const uint8_t* queries,
                          const uint4 (&codes)[MK / 8], float (&score)[8]) {
    const int g = lane / 4;
    uint32_t query[kQueryWords];
    SIMT_UNROLL
    for (int i = 0; i < kQueryWords / 4; i++) {
      const uint4 v = *reinterpret_cast<const uint4*>(queries + lane / 8 * kRowBytes + i * 128 + lane % 8 * 16);
      query[4 * i] = v.x;
      query[4 * i + 1] = v.y;
      query[4 * i + 2] = v.z;
      query[4 * i + 3] = v.w;
    }
    SIMT_UNROLL
    for (int pair = 0; pair < 4; pair++) {
      uint32_t mine[kPairWords];
      SIMT_UNROLL
      for (int i = 0; i < kPairWords; i++) {
        const uint4& v = codes[(pair * kPairWords + i) / 4];
        const int word = (pair * kPairWords + i) % 4;
        mine[i] = word == 0 ? v.x : word == 1 ? v.y : word == 2 ? v.z : v.w;
      }
      turn(selector, mine);
      sum_pair(g, rows, query, mine, score[2 * pair], score[2 * pair + 1]);
    }
  }
};

}  // namespace thimble::cuda
