// Encoding of keys and values: the kernel's body, in the codec's own order of operations, so that codes and scales
// equal encode_vector's bit for bit.
//
// Grid [keys, values][n_kv_heads][blocks], for cells that leave the window [n_layers] of these. A block codes some
// tokens' vectors of one head, so that codewords and matrices are read once for all of them.
//
// There are two forms. Of few tokens a block takes at most 8, and a warp shares the codewords of a subspace among its
// lanes, for one vector after the other. Of many it takes 32, and each lane takes a vector of its own through all
// codewords: lanes need not agree on the best, and a codeword is one read for all of them.
#pragma once

#include "cuda/encode/hadamard.h"
#include "cuda/layout.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

template <int HeadDim, int MaxTokensPerBlock = 8>
struct EncodeKernel {
  static constexpr int D = HeadDim;
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kMaxTokensPerBlock = MaxTokensPerBlock;
  static constexpr bool kVectorALane = kMaxTokensPerBlock == 32;
  static_assert(kMaxTokensPerBlock <= 32);

  /// Where the i-th token belongs. Cell -1: nowhere; slot -1: not in the window.
  struct Place {
    int stream, cell, slot;
  };

  struct alignas(16) Shared {
    // Lanes that read 16 bytes of a row each find them in different banks.
    float x[kMaxTokensPerBlock][D + 4];  // input; later the codewords' components
    float y[kMaxTokensPerBlock][D + 4];  // transformed
    float inverse_rms[kMaxTokensPerBlock];
    Place place[kMaxTokensPerBlock];
    uint16_t scale[kMaxTokensPerBlock];
    uint8_t codes[kMaxTokensPerBlock][D / 2];
  };
  static constexpr size_t kSharedBytes = sizeof(Shared);

  SIMT static Shared& memory() { return *reinterpret_cast<Shared*>(simt::shared()); }

  /// y = x matrix for `n` vectors, without fused multiply-adds and in index order; or the Hadamard rotation.
  SIMT static void transform(Shared& s, int n, const float* matrix) {
    if (matrix) {
      constexpr int kTogether = kVectorALane ? 4 : 1;  // vectors that share what is read of the matrix
      const int d = simt::thread() % D;
      for (int i = simt::thread() / D * kTogether; i < n; i += kThreads / D * kTogether) {
        float sum[kTogether] = {};
        SIMT_UNROLL_BY(32 / kTogether)
        for (int k = 0; k < D; k++) {
          const float m = simt::load_constant(matrix + k * D + d);
          SIMT_UNROLL
          for (int j = 0; j < kTogether; j++) sum[j] = simt::add_rn(sum[j], simt::mul_rn(s.x[i + j][k], m));
        }
        SIMT_UNROLL
        for (int j = 0; j < kTogether; j++) s.y[i + j][d] = sum[j];
      }
    } else {
      const int lane = simt::thread() % 32;
      for (int i = simt::thread() / 32; i < n; i += kWarps) {
        float v[1][D / 32];
        SIMT_UNROLL
        for (int k = 0; k < D / 32; k++) v[0][k] = s.x[i][lane * (D / 32) + k];
        hadamard_warp<D>(v, lane);
        SIMT_UNROLL
        for (int k = 0; k < D / 32; k++) s.y[i][lane * (D / 32) + k] = v[0][k];
      }
    }
    simt::sync();
  }

  // ---- keys and values

  SIMT static bool finite(float x) { return (simt::float_to_bits(x) & 0x7f800000u) != 0x7f800000u; }

  /// Root mean squares. Vectors that have none get their code and scale here, and inverse_rms 0.
  SIMT static void normalize(Shared& s, int n) {
    const int i = simt::thread();
    if (i < n) {
      float square = 0;
      SIMT_UNROLL_BY(32)
      for (int d = 0; d < D; d++) square = simt::add_rn(square, simt::mul_rn(s.y[i][d], s.y[i][d]));
      const bool plain = square != 0 && finite(square);
      s.inverse_rms[i] = plain ? simt::div_rn(1.0f, simt::sqrt_rn(simt::div_rn(square, float(D)))) : 0.0f;
      s.scale[i] = square == 0 ? 0 : 0x7e00;
    }
    simt::sync();
  }

  /// The nearest of the 256 codewords of subspace m, which begins with component d, for every vector. A warp has 4 of
  /// the 128 to a lane. `words` and `half_norms` are the subspace's own.
  template <int W>
  SIMT static void find_codes_by_warp(Shared& s, int n, const float* words, const float* half_norms, int m, int d) {
    const int lane = simt::thread() % 32;
    float word[4][W], half_norm[4];
    SIMT_UNROLL
    for (int k = 0; k < 4; k++) {
      half_norm[k] = simt::load_constant(half_norms + lane + 32 * k);
      SIMT_UNROLL
      for (int j = 0; j < W; j++) {
        word[k][j] = simt::load_constant(words + j * kCodewords + lane + 32 * k);
      }
    }
    for (int i = 0; i < n; i++) {
      float best_gain = 0;
      int best = -1;  // code with its sign
      SIMT_UNROLL
      for (int k = 0; k < 4; k++) {
        float dot = 0;
        SIMT_UNROLL
        for (int j = 0; j < W; j++) {
          dot = simt::add_rn(dot, simt::mul_rn(simt::mul_rn(s.y[i][d + j], s.inverse_rms[i]), word[k][j]));
        }
        const float gain = simt::sub_rn(fabsf(dot), half_norm[k]);
        if (best < 0 || gain > best_gain) {
          best_gain = gain;
          best = (lane + 32 * k) | (dot < 0 ? 0x80 : 0);
        }
      }
      SIMT_UNROLL
      for (int mask = 1; mask < 32; mask *= 2) {
        const float gain = simt::shuffle_xor(best_gain, mask);
        const int code = simt::shuffle_xor(best, mask);
        if (gain > best_gain || (gain == best_gain && (code & 0x7f) < (best & 0x7f))) {
          best_gain = gain;
          best = code;
        }
      }
      if (lane == 0) s.codes[i][m] = s.inverse_rms[i] != 0 ? uint8_t(best) : uint8_t(0);
    }
  }

  /// The same, with a vector to each lane. Of equal gains the lower code wins here, too.
  template <int W>
  SIMT static void find_codes_by_lane(Shared& s, int n, const float* words, const float* half_norms, int m, int d) {
    const int i = simt::thread() % 32;
    float y[W];
    SIMT_UNROLL
    for (int j = 0; j < W; j++) y[j] = i < n ? simt::mul_rn(s.y[i][d + j], s.inverse_rms[i]) : 0.0f;
    float best_gain = -INFINITY, dot_of_best = 0;
    int best = 0;
    SIMT_UNROLL_BY(2)
    for (int c = 0; c < kCodewords; c += 4) {
      const uint4 norms = simt::load_vector(half_norms + c);
      uint4 word[W];
      SIMT_UNROLL
      for (int j = 0; j < W; j++) word[j] = simt::load_vector(words + j * kCodewords + c);
      SIMT_UNROLL
      for (int k = 0; k < 4; k++) {
        const auto of_code = [&](const uint4& v) {
          return simt::bits_to_float(k == 0 ? v.x : k == 1 ? v.y : k == 2 ? v.z : v.w);
        };
        float dot = simt::mul_rn(y[0], of_code(word[0]));
        SIMT_UNROLL
        for (int j = 1; j < W; j++) dot = simt::add_rn(dot, simt::mul_rn(y[j], of_code(word[j])));
        const float gain = simt::sub_rn(fabsf(dot), of_code(norms));
        if (gain > best_gain) {
          best_gain = gain;
          dot_of_best = dot;
          best = c + k;
        }
      }
    }
    if (i < n) s.codes[i][m] = s.inverse_rms[i] != 0 ? uint8_t(best | (dot_of_best < 0 ? 0x80 : 0)) : uint8_t(0);
  }

  /// The codes of `count` subspaces: those from `first` on, of `all`, which begin with component d0.
  template <int W>
  SIMT static void find_codes(Shared& s, int n, const CodecTables& codec, int head, int all, int first, int count,
                              int d0) {
    for (int i = simt::thread() / 32; i < count; i += kWarps) {
      const int m = first + i, d = d0 + i * W;
      const float* words = codec.words + (size_t(head) * D + d) * kCodewords;
      const float* half_norms = codec.half_norms + (size_t(head) * all + m) * kCodewords;
      if constexpr (kVectorALane) {
        find_codes_by_lane<W>(s, n, words, half_norms, m, d);
      } else {
        find_codes_by_warp<W>(s, n, words, half_norms, m, d);
      }
    }
  }

  /// The codes of all subspaces.
  SIMT static void find_codes(Shared& s, int n, const CodecTables& codec, int head) {
    const int n2 = codec.n_width2, n4 = codec.n_width4, all = codec.order().n_subspaces();
    if (n2 > 0) find_codes<2>(s, n, codec, head, all, 0, n2, 0);
    if (n4 > 0) find_codes<4>(s, n, codec, head, all, n2, n4, 2 * n2);
    if (all > n2 + n4) find_codes<8>(s, n, codec, head, all, n2 + n4, all - n2 - n4, 2 * n2 + 4 * n4);
    simt::sync();
  }

  /// Least-squares scales. The products are summed by one thread a vector, in order.
  SIMT static void find_scales(Shared& s, int n, const CodecTables& codec, int head) {
    SIMT_UNROLL_BY(4)
    for (int i = simt::thread(); i < n * D; i += kThreads) {
      const int v = i / D, d = i % D, code = s.codes[v][codec.order().subspace_of(d)];
      const float w = simt::load_constant(codec.words + (size_t(head) * D + d) * kCodewords + (code & 0x7f));
      s.x[v][d] = code & 0x80 ? -w : w;
    }
    simt::sync();
    const int i = simt::thread();
    if (i < n && s.inverse_rms[i] != 0) {
      float along = 0, length = 0;
      SIMT_UNROLL_BY(32)
      for (int d = 0; d < D; d++) {
        along = simt::add_rn(along, simt::mul_rn(s.y[i][d], s.x[i][d]));
        length = simt::add_rn(length, simt::mul_rn(s.x[i][d], s.x[i][d]));
      }
      const float scale = length > 0 ? simt::div_rn(along, length) : 0.0f;
      s.scale[i] = simt::float_to_half(fminf(scale, 65504.0f));
    }
    simt::sync();
  }

  SIMT static Place place(const EncodeArgs& a, int i) {
    if (a.window_cells) return {i / a.window.capacity, a.window_cells[i], i % a.window.capacity};
    const int64_t index = a.cells[i];
    if (index < 0) return {0, -1, -1};
    return {int(index / a.cells_per_stream), int(index % a.cells_per_stream), a.window.slots ? a.window.slots[i] : -1};
  }

  /// One head's row of a cell, written by a warp, two numbers a lane: full lines, should they go over a bus.
  SIMT static void put(const DenseRows& rows, bool is_key, int n_kv_heads, int stream, int head, int cell,
                       const float* y) {
    const float* shift = is_key ? rows.key_shift : rows.value_shift;
    if (shift) shift += head * D;
    uint16_t* to = is_key ? rows.keys : rows.values;
    const int in_rows = stream - rows.first_stream;
    if (!to || in_rows < 0 || in_rows >= rows.n_streams || cell >= rows.n_cells) return;
    uint32_t* pairs =
        reinterpret_cast<uint32_t*>(to + ((size_t(in_rows) * n_kv_heads + head) * rows.n_cells + cell) * D);
    for (int i = simt::thread() % 32; i < D / 2; i += 32) {
      const float low = shift ? simt::add_rn(y[2 * i], shift[2 * i]) : y[2 * i];
      const float high = shift ? simt::add_rn(y[2 * i + 1], shift[2 * i + 1]) : y[2 * i + 1];
      pairs[i] = simt::pack_half2(low, high);
    }
  }

  template <Kind K>
  SIMT static void encode(const EncodeArgs& a, int head) {
    encode<K>(a, head, simt::block_x() * a.tokens_per_block);
  }

  template <Kind K>
  SIMT static void encode(const EncodeArgs& a, int head, int first) {
    constexpr bool kIsKey = K == Kind::key;
    const CodecTables& codec = kIsKey ? a.key_codec : a.value_codec;
    const CacheView& cache = kIsKey ? a.key_cache : a.value_cache;
    uint16_t* window = kIsKey ? a.window.keys : a.window.values;
    Shared& s = memory();
    const int left = a.n_tokens - first;
    const int n = left < a.tokens_per_block ? left : a.tokens_per_block;
    const int n_subspaces = codec.order().n_subspaces();
    if (n <= 0) return;
    const auto row = [&](const Place& p) {
      return window + ((size_t(p.stream) * a.n_kv_heads + head) * a.window.capacity + p.slot) * D;
    };
    const auto input = [&](int token) {
      return kIsKey ? a.keys + token * a.key_token_stride + head * a.key_head_stride
                    : a.values + token * a.value_token_stride + head * a.value_head_stride;
    };
    const int token = simt::thread();
    if (token < n) s.place[token] = place(a, first + token);
    // Rows of the window seldom leave it.
    if (!simt::any_in_block(token < n && (!a.from_window || s.place[token].cell >= 0))) return;

    const int d = simt::thread() % D;
    const float mean = codec.forward ? simt::load_constant(codec.mean + head * D + d) : 0.0f;
    SIMT_UNROLL_BY(4)
    for (int i = simt::thread() / D; i < n; i += kThreads / D) {
      const Place p = s.place[i];
      float x = 0;
      if (a.from_window) {
        if (p.cell >= 0) x = simt::half_to_float(simt::load_constant(row(p) + d));
      } else {
        x = simt::load_constant(input(first + i) + d);
        if (p.slot >= 0) row(p)[d] = simt::float_to_half(x);
      }
      s.x[i][d] = codec.forward ? simt::sub_rn(x, mean) : x;
    }
    simt::sync();
    const bool coding = cache.data && !a.window_cells;
    if (coding || (kIsKey ? a.dense.keys : a.dense.values)) {
      transform(s, n, codec.forward ? codec.forward + size_t(head) * D * D : nullptr);
    }
    if (coding) {
      normalize(s, n);
      find_codes(s, n, codec, head);
      find_scales(s, n, codec, head);
    }

    const int lane = simt::thread() % 32;
    for (int i = simt::thread() / 32; i < n; i += kWarps) {
      const Place p = s.place[i];
      if (p.cell < 0) continue;
      uint8_t* block = cache.data + p.stream * cache.stream_stride + head * cache.head_stride +
                       p.cell / kBlockCells * cache.block_stride;
      for (int m = lane; coding && m < n_subspaces; m += 32) {
        block[codec.order().position(K, m, p.cell % kBlockCells)] = s.codes[i][m];
      }
      if (coding && lane == 0) {
        reinterpret_cast<uint16_t*>(block + n_subspaces * kBlockCells)[p.cell % kBlockCells] = s.scale[i];
      }
      put(a.dense, kIsKey, a.n_kv_heads, p.stream, head, p.cell, s.y[i]);
      if (!a.from_window) put(a.store, kIsKey, a.n_kv_heads, p.stream, head, p.cell, input(first + i));
    }
  }

  /// Asks for all of a head's codewords at once: a warp that looks for codes waits for each subspace's in turn.
  SIMT static void prefetch_words(const CodecTables& codec, int head) {
    constexpr int kShare = D * kCodewords * int(sizeof(float)) / kWarps;
    const int warp = simt::thread() / 32;
    simt::prefetch_l2<kShare>(reinterpret_cast<const uint8_t*>(codec.words), (head * kWarps + warp) * kShare,
                              simt::thread() % 32);
  }

  SIMT static void run(const EncodeArgs& a) {
    simt::launch_dependents();
    const int part = simt::block_y() / a.n_kv_heads, head = simt::block_y() % a.n_kv_heads;
    prefetch_words(part == 0 ? a.key_codec : a.value_codec, head);
    simt::wait_for_previous_grid();
    if (part == 0 && (a.keys || a.from_window)) encode<Kind::key>(a, head);
    if (part == 1 && (a.values || a.from_window)) encode<Kind::value>(a, head);
  }

  /// Codes what leaves the windows of all layers with this head size.
  SIMT static void run_leaving(const LeaveArgs& a) {
    simt::launch_dependents();
    const int part = simt::block_y() % 2, head = simt::block_y() / 2 % a.n_kv_heads;
    EncodeArgs layer = a.layers[simt::block_y() / 2 / a.n_kv_heads];
    if (layer.head_dim != D || head >= layer.n_kv_heads) return;
    const LayerWindow& window = a.windows[simt::block_y() / 2 / a.n_kv_heads];
    layer.cells = window.leaving_cells;
    layer.window.slots = window.leaving_slots;
    layer.from_window = true;
    layer.tokens_per_block = a.tokens_per_block;
    const WindowBooks* books = window.books;
    const int* n_leaving = window.n_leaving;
    simt::wait_for_previous_grid();
    const int of_even = n_leaving[0], of_odd = n_leaving[1];  // asked for at once
    layer.n_tokens = books->n_batches & 1 ? of_even : of_odd;
    for (int first = simt::block_x() * a.tokens_per_block; first < layer.n_tokens;
         first += simt::blocks_x() * a.tokens_per_block) {
      if (part == 0) encode<Kind::key>(layer, head, first);
      if (part == 1) encode<Kind::value>(layer, head, first);
      simt::sync();
    }
  }
};

}  // namespace thimble::cuda
