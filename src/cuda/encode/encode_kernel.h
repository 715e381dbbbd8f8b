// Encoding of keys and values: the kernel's body, in the codec's own order of operations, so that codes and scales
// equal encode_vector's bit for bit.
//
// Grid [keys, values][n_kv_heads][blocks], for cells that leave the window [n_layers] of these. A block codes some
// tokens' vectors of one head, so that codewords and matrices are read once for all of them.
//
// There are two forms. Of few tokens a block takes at most 8, and a warp shares the codewords of a subspace among its
// lanes, for one vector after the other. Of many it takes 32, and the tensor cores multiply them with all codewords.
#pragma once

#include "cuda/encode/hadamard.h"
#include "cuda/encode/nearest.h"
#include "cuda/layout.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

template <int HeadDim, int MaxTokensPerBlock = 8>
struct EncodeKernel {
  static constexpr int D = HeadDim;
  static constexpr int kMaxTokensPerBlock = MaxTokensPerBlock;
  static constexpr bool kMany = kMaxTokensPerBlock == 32;
  static constexpr int kThreads = kMany ? 512 : 256, kWarps = kThreads / 32;
  static_assert(kMaxTokensPerBlock <= 32);

  /// Where the i-th token belongs. Cell -1: nowhere; slot -1: not in the window.
  struct Place {
    int stream, cell, slot;
  };

  struct alignas(16) Shared {
    // Lanes that read 16 bytes of a row each find them in different banks.
    float x[kMaxTokensPerBlock][D + 4];  // input; then codewords(); later the chosen codewords' components
    float y[kMaxTokensPerBlock][D + 4];  // transformed
    float inverse_rms[kMaxTokensPerBlock];
    Place place[kMaxTokensPerBlock];
    uint16_t scale[kMaxTokensPerBlock];
    uint8_t codes[kMaxTokensPerBlock][D / 2];
  };
  static constexpr size_t kSharedBytes = sizeof(Shared);
  /// Thread blocks that a multiprocessor is to have room for: they mostly wait for memory.
  static constexpr int kResident = kMany ? 2 : 1;

  // Of many tokens: the numbers of 8 bits that the head's codewords are made of, 128 added, [128][kWordStride].
  static constexpr int kWordStride = D + 4;
  static_assert(!kMany || sizeof(Shared::x) >= size_t(kCodewords) * kWordStride);
  SIMT static uint8_t* codewords(Shared& s) { return reinterpret_cast<uint8_t*>(s.x); }

  SIMT static void load_codewords(Shared& s, const CodecTables& codec, bool is_key, int head) {
    const uint8_t* packed = reinterpret_cast<const uint8_t*>(codec.packed) + size_t(head) * kCodewords * D;
    uint8_t* to = codewords(s);
    if (codec.width > 2 || (codec.width == 2 && is_key)) {
      for (int i = simt::thread() * 16; i < kCodewords * D; i += kThreads * 16) {
        const uint4 v = simt::load_vector(packed + i);
        uint32_t* row = reinterpret_cast<uint32_t*>(to + i / D * kWordStride + i % D);
        row[0] = v.x ^ 0x80808080, row[1] = v.y ^ 0x80808080, row[2] = v.z ^ 0x80808080, row[3] = v.w ^ 0x80808080;
      }
      return;
    }
    const CodeOrder order = codec.order();
    SIMT_UNROLL_BY(4)
    for (int i = simt::thread(); i < kCodewords * (D / 2); i += kThreads) {
      const int c = i / (D / 2), pair = i % (D / 2);
      int from = c * D + 2 * packed_pair(pair);
      uint16_t flip = 0x8080;
      if (codec.width == 0) {  // subspace by subspace, with 128 added already
        const int width = order.width_of(2 * pair), first = order.first_of(2 * pair);
        from = first * kCodewords + c * width + 2 * pair - first;
        flip = 0;
      }
      *reinterpret_cast<uint16_t*>(to + c * kWordStride + 2 * pair) =
          simt::load_constant(reinterpret_cast<const uint16_t*>(packed + from)) ^ flip;
    }
  }

  SIMT static Shared& memory() { return *reinterpret_cast<Shared*>(simt::shared()); }

  /// y = x matrix for `n` vectors, without fused multiply-adds and in index order; or the Hadamard rotation.
  SIMT static void transform(Shared& s, int n, const float* matrix) {
    if (matrix) {
      constexpr int kTogether = kMany ? 4 : 1;  // vectors that share what is read of the matrix
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

  /// The nearest of the 256 codewords of subspace m, which begins with component d, for the vectors whose bits are set.
  /// A warp has 4 of the 128 to a lane. `words` and `half_norms` are the subspace's own.
  template <int W>
  SIMT static void find_codes_by_warp(Shared& s, uint32_t vectors, const float* words, const float* half_norms, int m,
                                      int d) {
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
    SIMT_NO_UNROLL
    for (; vectors; vectors &= vectors - 1) {
      const int i = simt::popcount((vectors & (0u - vectors)) - 1);  // the lowest bit's number
      NearestCode nearest;
      SIMT_UNROLL
      for (int k = 0; k < 4; k++) {
        float dot = 0;
        SIMT_UNROLL
        for (int j = 0; j < W; j++) {
          dot = simt::add_rn(dot, simt::mul_rn(simt::mul_rn(s.y[i][d + j], s.inverse_rms[i]), word[k][j]));
        }
        nearest.offer(lane + 32 * k, dot, half_norm[k]);
      }
      nearest.join_lanes();
      if (lane == 0) s.codes[i][m] = s.inverse_rms[i] != 0 ? uint8_t(nearest.code) : uint8_t(0);
    }
  }

  /// The same for up to 32 vectors at once. The tensor cores compute all products, with the numbers of 8 bits that
  /// codewords are made of and vectors in two halves each, and lanes keep the two greatest gains. These are a little
  /// off from what the specification computes. Where they are further apart than that can be, the greater one's
  /// codeword is the specification's, too, whose product decides about the sign; the other vectors are few and go
  /// through all codewords one by one.
  template <int W>
  SIMT static void find_codes_by_matrix(Shared& s, int n, const float* words, const float* half_norms, float factor,
                                        int m, int d) {
    const int lane = simt::thread() % 32, g = lane / 4, t = lane % 4;
    uint32_t high[2][2] = {}, low[2][2] = {};  // of vectors g, g + 8, g + 16, g + 24: the operands' two halves
    SIMT_UNROLL
    for (int k = 0; k < 4; k++) {
      const int i = 8 * k + g, pair = t % (W / 2);
      const bool plain = i < n && s.inverse_rms[i] != 0;
      const float inverse = plain ? s.inverse_rms[i] : 0.0f;
      const float a = plain ? simt::mul_rn(s.y[i][d + 2 * pair], inverse) : 0.0f;
      const float b = plain ? simt::mul_rn(s.y[i][d + 2 * pair + 1], inverse) : 0.0f;
      const uint32_t first = simt::pack_half2(a, b);
      const float2 rounded = simt::unpack_half2(first);
      const uint32_t second = simt::pack_half2(a - rounded.x, b - rounded.y);
      // Columns 2t and 2t + 1 of 16. At width 8 both halves of the operand are used, at 4 and 2 the first.
      if constexpr (W == 8) {
        high[k / 2][k % 2] = first;
        low[k / 2][k % 2] = second;
      } else {
        high[k / 2][k % 2] = t < W / 2 ? first : t < W ? second : 0;
      }
    }
    // Gains in units of `factor`, by which the numbers are multiplied to make codewords.
    const float inverse_factor = simt::div_rn(1.0f, factor > 0 ? factor : 0.0f);
    float best[4], next[4];  // of the vectors 8k + g. The last 7 bits of a gain say whose it is
    SIMT_UNROLL
    for (int k = 0; k < 4; k++) best[k] = next[k] = -INFINITY;
    const uint8_t* numbers = codewords(s) + g * kWordStride + d + 2 * (t % (W / 2));
    SIMT_UNROLL_BY(2)
    for (int c = 0; c < kCodewords; c += 8) {
      const uint2 norms = simt::load_8(half_norms + c + 2 * t);
      // Bytes of 128 more than a number become halves of 1024 and 128 more.
      const uint32_t two = *reinterpret_cast<const uint16_t*>(numbers + c * kWordStride);
      const uint32_t operand = simt::subtract_halves(simt::permute(two, 0x64646464, 0x4140), 0x64806480);
      const float norm[2] = {simt::bits_to_float(norms.x) * inverse_factor,
                             simt::bits_to_float(norms.y) * inverse_factor};
      SIMT_UNROLL
      for (int tile = 0; tile < 2; tile++) {
        float products[4] = {};
        simt::mma_f16(products, high[tile][0], high[tile][1], low[tile][0], low[tile][1], operand,
                      W == 8 ? operand : 0);
        SIMT_UNROLL
        for (int i = 0; i < 4; i++) {
          const int k = 2 * tile + i / 2;
          const float gain = fabsf(products[i]) - norm[i % 2];
          const float marked = simt::bits_to_float((simt::float_to_bits(gain) & ~0x7fu) | uint32_t(c + 2 * t + i % 2));
          next[k] = fmaxf(next[k], fminf(best[k], marked));
          best[k] = fmaxf(best[k], marked);
        }
      }
    }
    SIMT_UNROLL
    for (int mask = 1; mask < 4; mask *= 2) {
      SIMT_UNROLL
      for (int k = 0; k < 4; k++) {
        const float other_best = simt::shuffle_xor(best[k], mask), other_next = simt::shuffle_xor(next[k], mask);
        next[k] = fmaxf(fmaxf(next[k], other_next), fminf(best[k], other_best));
        best[k] = fmaxf(best[k], other_best);
      }
    }
    // From here on, each lane has a vector. Its gains are with the lanes of its number modulo 8.
    const int from = lane % 8 * 4 + lane / 8;
    const float greatest = simt::shuffle(t == 0 ? best[0] : t == 1 ? best[1] : t == 2 ? best[2] : best[3], from);
    const float second = simt::shuffle(t == 0 ? next[0] : t == 1 ? next[1] : t == 2 ? next[2] : next[3], from);
    const int code = int(simt::float_to_bits(greatest) & 0x7f);
    float dot = 0, size = 0;
    SIMT_UNROLL
    for (int j = 0; j < W; j++) {
      const float z = lane < n ? simt::mul_rn(s.y[lane][d + j], s.inverse_rms[lane]) : 0.0f;
      dot = simt::add_rn(dot, simt::mul_rn(z, simt::load_constant(words + j * kCodewords + code)));
      size += fabsf(z);
    }
    // The mark changes less than 2^-16 of a gain. Products are as exact as 22 bits of a vector and sums of as many make
    // them, and the specification's roundings are smaller: 2^-20 of a number's greatest share in them bounds both.
    const float doubt = (fabsf(greatest) + fabsf(second)) * 0x1p-15f + size * (127 * 0x1p-18f);
    const bool plain = lane < n && s.inverse_rms[lane] != 0, certain = greatest - second > doubt;
    if (lane < n) s.codes[lane][m] = plain ? uint8_t(code | (dot < 0 ? 0x80 : 0)) : uint8_t(0);
    uint32_t doubtful = simt::ballot(plain && !certain);
    if (doubtful == 0) return;
    simt::sync_warp();
    find_codes_by_warp<W>(s, doubtful, words, half_norms, m, d);
  }

  /// The codes of `count` subspaces: those from `first` on, of `all`, which begin with component d0.
  template <int W>
  SIMT static void find_codes(Shared& s, int n, const CodecTables& codec, int head, int all, int first, int count,
                              int d0) {
    for (int i = simt::thread() / 32; i < count; i += kWarps) {
      const int m = first + i, d = d0 + i * W;
      const float* words = codec.words + (size_t(head) * D + d) * kCodewords;
      const float* half_norms = codec.half_norms + (size_t(head) * all + m) * kCodewords;
      if constexpr (kMany) {
        find_codes_by_matrix<W>(s, n, words, half_norms, codec.scale[head * all + m], m, d);
      } else {
        find_codes_by_warp<W>(s, (1u << n) - 1, words, half_norms, m, d);
      }
    }
  }

  /// The codes of all subspaces.
  SIMT static void find_codes(Shared& s, int n, const CodecTables& codec, bool is_key, int head) {
    if constexpr (kMany) {
      load_codewords(s, codec, is_key, head);
      simt::sync();
    }
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
    const int slot = a.window.slots ? a.window.slots[i] : -1;
    if (index < 0 || (a.by_token && slot >= 0)) return {0, -1, -1};
    return {int(index / a.cells_per_stream), int(index % a.cells_per_stream), a.by_token ? i : slot};
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
      const size_t stream = a.by_token ? 0 : p.stream;
      return window + ((stream * a.n_kv_heads + head) * a.window.capacity + p.slot) * D;
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
      find_codes(s, n, codec, kIsKey, head);
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
    const int first = simt::block_x() * a.tokens_per_block;
    prefetch_words(part == 0 ? a.key_codec : a.value_codec, head);
    simt::wait_for_previous_grid();
    if (part == 0 && (a.keys || a.from_window)) encode<Kind::key>(a, head, first);
    if (part == 1 && (a.values || a.from_window)) encode<Kind::value>(a, head, first);
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
    layer.by_token = false;  // the compiler leaves that out then
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

  struct alignas(16) StagedShared {
    Shared block;
    EncodeArgs layer;  // in registers it would be most of them
  };

  /// The same, and then codes what a prompt staged. A thread block goes through all of the one, then of the other.
  SIMT static void run_staged(const LeaveArgs& a) {
    simt::launch_dependents();
    const int part = simt::block_y() % 2, head = simt::block_y() / 2 % a.n_kv_heads;
    const int index = simt::block_y() / 2 / a.n_kv_heads;
    const EncodeArgs& from = a.layers[index];
    if (from.head_dim != D || head >= from.n_kv_heads) return;
    const LayerWindow& window = a.windows[index];
    EncodeArgs& layer = reinterpret_cast<StagedShared*>(simt::shared())->layer;
    simt::wait_for_previous_grid();
    if (simt::thread() == 0) {
      layer = from;
      layer.cells = window.leaving_cells;
      layer.window.slots = window.leaving_slots;
      layer.from_window = true;
      layer.tokens_per_block = a.tokens_per_block;
      layer.n_tokens = window.n_leaving[(window.books->n_batches & 1) ? 0 : 1];
    }
    simt::sync();
    int first = simt::block_x() * a.tokens_per_block;
    SIMT_NO_UNROLL
    for (int staged = 0; staged < 2; staged++) {
      if (staged == 1) {
        if (!a.staged.has(index, part == 0)) return;
        // The next thread block in turn goes on with the first of these.
        first -= (layer.n_tokens + a.tokens_per_block - 1) / a.tokens_per_block * a.tokens_per_block;
        simt::sync();
        if (simt::thread() == 0) {
          layer.n_tokens = layer.window.capacity = a.staged.n_tokens;
          layer.by_token = true;
          layer.cells = a.staged.cells;
          layer.window.slots = a.staged.slots + size_t(index) * a.staged.n_tokens;
          layer.window.keys = layer.window.values = a.staged.of(index, part == 0);
        }
        simt::sync();
      }
      SIMT_NO_UNROLL
      for (; first < layer.n_tokens; first += simt::blocks_x() * a.tokens_per_block) {
        if (part == 0) encode<Kind::key>(layer, head, first);
        if (part == 1) encode<Kind::value>(layer, head, first);
        simt::sync();
      }
    }
  }
};

}  // namespace thimble::cuda
