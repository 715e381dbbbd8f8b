// Caches over the C API for tests: handles that free themselves, random rows coded into blocks of any layout.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "codec/half.h"
#include "support/random.h"
#include "thimble/thimble.h"

namespace thimble::test {

struct Free {
  void operator()(thimble_profile* p) const { thimble_profile_close(p); }
  void operator()(thimble_codec* p) const { thimble_codec_free(p); }
  void operator()(thimble_context* p) const { thimble_context_free(p); }
};
template <typename T>
using Handle = std::unique_ptr<T, Free>;

/// Passes where the call succeeded; else shows the call's sentence.
inline testing::AssertionResult ok(thimble_status status) {
  if (status == THIMBLE_OK) return testing::AssertionSuccess();
  return testing::AssertionFailure() << thimble_status_name(status) << ": " << thimble_last_error();
}

/// Passes where the call failed with this status and a sentence that contains `part`.
inline testing::AssertionResult fails(thimble_status status, thimble_status wanted, const std::string& part) {
  const std::string sentence = thimble_last_error();
  if (status == wanted && sentence.find(part) != std::string::npos) return testing::AssertionSuccess();
  return testing::AssertionFailure() << thimble_status_name(status) << ": " << sentence << " (wanted \"" << part
                                     << "\")";
}

inline testing::AssertionResult invalid(thimble_status status, const std::string& part) {
  return fails(status, THIMBLE_INVALID_ARGUMENT, part);
}

template <typename Args>
Args args_of() {
  Args args{};
  args.struct_size = sizeof args;
  return args;
}

inline Handle<thimble_context> context_of(int n_threads) {
  auto args = args_of<thimble_context_args>();
  args.n_threads = n_threads;
  thimble_context* context = nullptr;
  EXPECT_TRUE(ok(thimble_context_create(&args, &context)));
  return Handle<thimble_context>(context);
}

inline Handle<thimble_codec> codec_of(thimble_codec_args args) {
  args.struct_size = sizeof args;
  thimble_codec* codec = nullptr;
  EXPECT_TRUE(ok(thimble_codec_create(&args, &codec)));
  return Handle<thimble_codec>(codec);
}

inline thimble_codec_args plain_codec(int kind = THIMBLE_KEY, int dim = 64, int n_heads = 2, double bits = 2) {
  auto args = args_of<thimble_codec_args>();
  args.kind = kind;
  args.head_dim = dim;
  args.n_heads = n_heads;
  args.bits = bits;
  return args;
}

inline std::vector<uint16_t> halves(const std::vector<float>& x) {
  std::vector<uint16_t> h(x.size());
  for (size_t i = 0; i < x.size(); i++) h[i] = float_to_half(x[i]);
  return h;
}

/// How blocks are laid out.
enum class Layout { heads, pages, odd };

/// One side of a cache: a codec and its blocks, filled with NaN.
struct Side {
  Handle<thimble_codec> codec;
  int n_heads, dim;
  std::vector<uint8_t> memory;
  thimble_blocks blocks{};

  Side(thimble_codec_args args, int64_t n_blocks, Layout layout) : codec(codec_of(args)) {
    auto info = args_of<thimble_codec_info>();
    EXPECT_TRUE(ok(thimble_codec_get_info(codec.get(), &info)));
    n_heads = info.n_heads;
    dim = info.head_dim;
    const size_t bytes = info.block_bytes, gap = layout == Layout::odd ? 3 : 0;
    blocks.n_blocks = n_blocks;
    blocks.block_stride = layout == Layout::heads ? bytes : size_t(n_heads) * (bytes + gap) + gap;
    blocks.head_stride = layout == Layout::heads ? size_t(n_blocks) * bytes : bytes + gap;
    memory.assign(size_t(n_blocks) * n_heads * (bytes + 2 * gap) + 64, 0xff);
    blocks.data = memory.data() + gap;
  }

  size_t row_size() const { return size_t(n_heads) * dim; }
  thimble_encode_args encode_args(const std::vector<float>& rows, const std::vector<int64_t>& cells) const {
    return rows_args<thimble_encode_args>(rows.data(), cells);
  }
  thimble_decode_args decode_args(std::vector<float>& rows, const std::vector<int64_t>& cells) const {
    return rows_args<thimble_decode_args>(rows.data(), cells);
  }

private:
  template <typename Args, typename Rows>
  Args rows_args(Rows* rows, const std::vector<int64_t>& cells) const {
    auto args = args_of<Args>();
    args.codec = codec.get();
    args.blocks = blocks;
    args.n_rows = int64_t(cells.size());
    args.cells = cells.data();
    args.rows = rows;
    args.row_stride = row_size();
    args.type = THIMBLE_F32;
    return args;
  }
};

/// Several sequences in the blocks of one key side and one value side.
struct Cache {
  int n_sequences = 1;
  int blocks_per_sequence = 1;
  std::vector<int64_t> n_cells;
  std::vector<int32_t> table;  // empty: contiguous
  std::unique_ptr<Side> keys, values;
  std::vector<float> k, v;  // [sequence][blocks_per_sequence * 64][head][dim]

  int64_t cells() const { return int64_t{blocks_per_sequence} * THIMBLE_BLOCK_CELLS; }
  int64_t memory_cell(int sequence, int64_t cell) const {
    const int64_t block = int64_t{sequence} * blocks_per_sequence + cell / THIMBLE_BLOCK_CELLS;
    return (table.empty() ? block : table[block]) * THIMBLE_BLOCK_CELLS + cell % THIMBLE_BLOCK_CELLS;
  }
  void encode(thimble_context* context) {
    k = gaussian(size_t(n_sequences * cells()) * keys->row_size(), 1);
    v = gaussian(size_t(n_sequences * cells()) * values->row_size(), 2);
    std::vector<int64_t> places;
    for (int s = 0; s < n_sequences; s++) {
      for (int64_t cell = 0; cell < cells(); cell++) places.push_back(cell < n_cells[s] ? memory_cell(s, cell) : -1);
    }
    const auto k_args = keys->encode_args(k, places);
    EXPECT_TRUE(ok(thimble_encode(context, &k_args, nullptr)));
    const auto v_args = values->encode_args(v, places);
    EXPECT_TRUE(ok(thimble_encode(context, &v_args, nullptr)));
  }
};

struct Queries {
  int n_heads = 0;
  std::vector<int64_t> first_tokens;
  std::vector<float> q, out;
};

inline Queries queries_of(const Cache& cache, int group, const std::vector<int>& n_tokens) {
  Queries x;
  x.n_heads = cache.keys->n_heads * group;
  x.first_tokens = {0};
  for (int n : n_tokens) x.first_tokens.push_back(x.first_tokens.back() + n);
  x.q = gaussian(size_t(x.first_tokens.back()) * x.n_heads * cache.keys->dim, 3);
  x.out.assign(size_t(x.first_tokens.back()) * x.n_heads * cache.values->dim, NAN);
  return x;
}

inline thimble_attend_args attend_args(const Cache& cache, Queries& x) {
  auto args = args_of<thimble_attend_args>();
  args.keys = cache.keys->codec.get();
  args.values = cache.values->codec.get();
  args.key_blocks = cache.keys->blocks;
  args.value_blocks = cache.values->blocks;
  args.n_sequences = cache.n_sequences;
  args.blocks_per_sequence = cache.blocks_per_sequence;
  args.block_table = cache.table.empty() ? nullptr : cache.table.data();
  args.n_cells = cache.n_cells.data();
  args.first_tokens = x.first_tokens.data();
  args.n_heads = x.n_heads;
  args.q = x.q.data();
  args.q_token_stride = size_t(x.n_heads) * cache.keys->dim;
  args.q_head_stride = cache.keys->dim;
  args.out = x.out.data();
  args.out_token_stride = size_t(x.n_heads) * cache.values->dim;
  args.out_head_stride = cache.values->dim;
  return args;
}

}  // namespace thimble::test
