// Decode attention: the CUDA kernel's own source, emulated, against the codec's specification in double.
#define THIMBLE_SIMT_HOST
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <iterator>
#include <map>
#include <string>
#include <utility>

#include "cases.h"
#include "cuda/attend/direct.h"
#include "cuda/attend/shape.h"
#include "emulated_attend.h"
#include "fixture.h"

namespace thimble::cuda {
namespace {

using Case = AttendCase;

double error_of(const EmulatedAttend& kernel, const Case& c) {
  Random random(1);
  const int d = kernel.format.head_dim, n_heads = c.n_kv_heads * c.group;
  std::vector<HeadCodec> key_codecs, value_codecs;
  for (int h = 0; h < c.n_kv_heads; h++) {
    key_codecs.push_back(random_codec(Kind::key, d, 8.0 / kernel.format.key_width, c.dense, random));
    value_codecs.push_back(random_codec(Kind::value, d, 8.0 / kernel.format.value_width, c.dense, random));
  }
  const HostTables key_tables = pack_tables(key_codecs), value_tables = pack_tables(value_codecs);

  AttendArgs a = attend_args(c, d);
  a.key_codec = key_tables.view();
  a.value_codec = value_tables.view();

  std::vector<CodedHead> keys, values;  // [stream][KV head]
  std::vector<uint8_t> key_cache, value_cache;
  for (int i = 0; i < c.n_streams * c.n_kv_heads; i++) {
    keys.push_back(random_head(key_codecs[i % c.n_kv_heads], c.n_cells, random));
    values.push_back(random_head(value_codecs[i % c.n_kv_heads], c.n_cells, random));
    key_cache.insert(key_cache.end(), keys.back().blocks.begin(), keys.back().blocks.end());
    value_cache.insert(value_cache.end(), values.back().blocks.begin(), values.back().blocks.end());
  }
  const auto view = [&](std::vector<uint8_t>& cache, size_t block) {
    const size_t head = block * (c.n_cells / kBlockCells);
    return CacheView{cache.data(), head * c.n_kv_heads, head, block};
  };
  a.keys = view(key_cache, a.key_codec.block_bytes());
  a.values = view(value_cache, a.value_codec.block_bytes());

  // Queries, with a gap between heads.
  const int query_stride = d + 4;
  const float scale = 1.5f / std::sqrt(float(d));
  const std::vector<float> queries = random.normals(size_t(c.n_streams) * c.n_tokens * n_heads * query_stride);
  a.queries = queries.data();
  a.query_head_stride = query_stride;
  a.query_token_stride = size_t(n_heads) * query_stride;
  a.query_stream_stride = c.n_tokens * a.query_token_stride;
  a.scale = scale;

  // Mask: distances, and a third of the cells hidden from each token.
  std::vector<uint16_t> mask(size_t(c.n_streams) * c.n_tokens * c.n_cells);
  for (size_t i = 0; i < mask.size(); i++) {
    mask[i] = float_to_half(random.below(3) == 0 ? -INFINITY : -0.125f * float(random.below(16)));
  }
  if (c.mask) {
    a.mask = mask.data();
    a.mask_token_stride = c.n_cells;
    a.mask_stream_stride = size_t(c.n_cells) * c.n_tokens;
  }
  std::vector<float> slopes(n_heads), sinks(n_heads);
  for (float& s : slopes) s = 0.25f * float(1 + random.below(4));
  for (float& s : sinks) s = 2 + random.normal();
  if (c.alibi) a.slopes = slopes.data();
  if (c.sinks) a.sinks = sinks.data();

  // Exact rows: cells whose coded form is hidden.
  std::vector<int32_t> cells(size_t(c.n_streams) * c.n_exact, -1);
  std::vector<uint16_t> exact_keys(cells.size() * c.n_kv_heads * d), exact_values(exact_keys.size());
  std::vector<uint32_t> hidden(size_t(c.n_streams) * c.n_cells / 32);
  std::vector<std::vector<int>> exact_of(c.n_streams, std::vector<int>(c.n_cells, -1));
  std::vector<int32_t> tokens(cells.size(), -1);
  int n_tokens = 0;
  for (int s = 0; s < c.n_streams; s++) {
    for (int i = 0; i < c.n_exact; i++) {
      const int cell = random.below(c.n_cells);
      if (exact_of[s][cell] >= 0) {  // this row stays unused, or is of a cell that is not attended to
        if (i % 2) cells[s * c.n_exact + i] = c.n_cells + i;
        continue;
      }
      exact_of[s][cell] = i;
      cells[s * c.n_exact + i] = cell;
      hidden[(s * c.n_cells + cell) / 32] |= 1u << cell % 32;
      if (i >= c.n_exact - c.n_fresh) tokens[s * c.n_exact + i] = n_tokens++;
    }
  }
  // Rows of cells that were removed: not even their mask may be read.
  for (size_t i = 0; i < cells.size(); i++) {
    if (cells[i] < 0) cells[i] = c.n_cells + int(i);
  }
  a.end_cell = c.n_cells;
  for (uint16_t& v : exact_keys) v = float_to_half(random.normal());
  for (uint16_t& v : exact_values) v = float_to_half(random.normal());
  if (c.nothing_coded) std::fill(hidden.begin(), hidden.end(), ~0u);
  // New rows come as f32; what the window is to hold of them later is in `exact_keys`, but not there yet.
  std::vector<uint16_t> window_keys = exact_keys, window_values = exact_values;
  const int token_stride = c.n_kv_heads * d + 8;
  std::vector<float> new_keys(size_t(n_tokens) * token_stride), new_values(new_keys.size());
  for (int row = 0; row < c.n_streams * c.n_exact; row++) {
    for (int h = 0; tokens[row] >= 0 && h < c.n_kv_heads; h++) {
      for (int i = 0; i < d; i++) {
        const size_t at = ((size_t(row / c.n_exact) * c.n_kv_heads + h) * c.n_exact + row % c.n_exact) * d + i;
        new_keys[size_t(tokens[row]) * token_stride + h * d + i] = half_to_float(exact_keys[at]);
        new_values[size_t(tokens[row]) * token_stride + h * d + i] = half_to_float(exact_values[at]);
        window_keys[at] = window_values[at] = 0x7e00;  // not a number
      }
    }
  }
  if (c.n_exact > 0) {
    a.exact[c.n_fresh > 0 ? 0 : 1] =
        ExactRows{window_keys.data(), window_values.data(), cells.data(), c.n_exact, false};
    a.hidden = hidden.data();
    a.hidden_stream_stride = c.n_cells / 32;
  }
  if (c.n_fresh > 0) {
    a.fresh.keys = new_keys.data();
    a.fresh.values = new_values.data();
    a.fresh.key_token_stride = a.fresh.value_token_stride = token_stride;
    a.fresh.key_head_stride = a.fresh.value_head_stride = d;
    a.fresh.tokens = tokens.data();
    a.fresh.window_keys = window_keys.data();
    a.fresh.window_values = window_values.data();
  }

  deal_out(a, c.n_splits, c.n_splits > 1 && c.n_exact > 0 ? 1 : 0, c.batch_shift);
  const std::vector<float> output = kernel.run(a, c.blocks_x);
  EXPECT_EQ(window_keys, exact_keys);
  EXPECT_EQ(window_values, exact_values);

  // The specification.
  std::vector<double> expected;
  for (int s = 0; s < c.n_streams; s++) {
    for (int token = 0; token < c.n_tokens; token++) {
      for (int head = 0; head < n_heads; head++) {
        const int kv_head = head / c.group, at = s * c.n_kv_heads + kv_head;
        const float* q = &queries[((size_t(s) * c.n_tokens + token) * n_heads + head) * query_stride];
        const Transform& transform = key_codecs[kv_head].transform;
        std::vector<float> transformed(d);
        transform.query(q, transformed.data());
        double along_mean = 0;
        for (int i = 0; c.dense && c.softcap == 0 && i < d; i++) along_mean += double(q[i]) * transform.mean()[i];
        double total = c.sinks ? std::exp(double(sinks[head])) : 0, weight = 0;
        std::vector<double> y(d, 0.0), y_exact(d, 0.0);
        for (int cell = 0; cell < c.n_cells; cell++) {
          const int row = exact_of[s][cell];
          if (row < 0 && c.nothing_coded) continue;
          const size_t exact_at = (size_t(at) * c.n_exact + row) * d;
          double x = row >= 0 ? 0 : along_mean;
          for (int i = 0; i < d; i++) {
            x += row >= 0 ? double(q[i]) * half_to_float(exact_keys[exact_at + i])
                          : double(transformed[i]) * keys[at].decoded[size_t(cell) * d + i];
          }
          x *= scale;
          if (c.softcap != 0) x = c.softcap * std::tanh(x / c.softcap);
          if (c.mask) {
            x += half_to_float(mask[(size_t(s) * c.n_tokens + token) * c.n_cells + cell]) *
                 (c.alibi ? slopes[head] : 1.0);
          }
          const double p = std::exp(x);
          total += p;
          if (row < 0) weight += p;
          for (int i = 0; i < d; i++) {
            if (row >= 0) {
              y_exact[i] += p * half_to_float(exact_values[exact_at + i]);
            } else {
              y[i] += p * values[at].decoded[size_t(cell) * d + i];
            }
          }
        }
        std::vector<float> mean(d), out(d);
        for (int i = 0; i < d; i++) mean[i] = float(y[i] / total);
        value_codecs[kv_head].transform.output(mean.data(), float(weight / total), out.data());
        for (int i = 0; i < d; i++) expected.push_back(out[i] + y_exact[i] / total);
      }
    }
  }
  return relative_error(output, expected);
}

template <typename S>
double error_of(const Case& c) {
  return error_of(kEmulated<S>, c);
}

// `error_of` relative to what the format may add.
template <typename S>
double share_of_tolerance(const Case& c) {
  return error_of<S>(c) / tolerance(S::kKeyWidth, S::kValueWidth);
}

// Calls f<S>() with the shape of each format of a list.
template <const auto& Formats, bool Large, typename F>
void for_each_shape(const F& f) {
  [&]<size_t... I>(std::index_sequence<I...>) {
    (f.template operator()<AttendShape<Formats[I].head_dim, Formats[I].key_width, Formats[I].value_width, Large>>(),
     ...);
  }
  (std::make_index_sequence<std::size(Formats)>());
}

template <typename S>
std::string name_of() {
  return std::to_string(S::kHeadDim) + ", widths " + std::to_string(S::kKeyWidth) + "/" +
         std::to_string(S::kValueWidth);
}

TEST(CudaAttend, AllFormats) {
  const Case c{.n_cells = 192};
  for_each_shape<kFormatCases, true>([&]<typename S>() { EXPECT_LT(share_of_tolerance<S>(c), 1) << name_of<S>(); });
}

TEST(CudaAttend, SmallSharedMemory) {
  const Case c{.n_cells = 128, .mask = true};
  for_each_shape<kSmallFormatCases, false>(
      [&]<typename S>() { EXPECT_LT(share_of_tolerance<S>(c), 1) << name_of<S>(); });
}

using Small = AttendShape<kBytes.head_dim, kBytes.key_width, kBytes.value_width, true>;
using Wide = AttendShape<kWide.head_dim, kWide.key_width, kWide.value_width, true>;

double share_of_both(const Case& c) {
  return std::max(share_of_tolerance<Small>(c), share_of_tolerance<Wide>(c));
}

TEST(CudaAttend, Cases) {
  for (const Case& c : kAttendCases) EXPECT_LT(share_of_both(c), 1) << c.name;
}

TEST(CudaAttend, NewRows) {
  const Case c{.n_cells = 192, .mask = true, .n_exact = 150, .n_fresh = 3};
  EXPECT_LT((share_of_tolerance<AttendShape<64, 8, 8, true>>(c)), 1);
  EXPECT_LT((share_of_tolerance<AttendShape<128, 4, 4, true>>(c)), 1);
  EXPECT_LT((share_of_tolerance<AttendShape<128, 2, 2, false>>(c)), 1);
  EXPECT_LT((share_of_tolerance<AttendShape<256, 8, 8, true>>(c)), 1);
}

template <int HeadDim, int KeyWidth, int ValueWidth>
using Direct = AttendShape<HeadDim, KeyWidth, ValueWidth, true, kMaxBatch>;

// Lanes that look into shared memory at once (half a warp, of entries of 8 bytes) find what they look for in banks of
// their own, or take the turns that were meant.
template <typename S>
void expect_no_more_bank_conflicts() {
  using D = AttendDirect<S>;
  const int lanes = D::kEntryBytes == 8 ? 16 : 32;
  for (int step = 0; step < D::kSteps; step++) {
    for (int first = 0; first < 32; first += lanes) {
      std::map<uint32_t, int> banks;
      for (int lane = first; lane < first + lanes; lane++) {
        for (int word = 0; word < D::kEntryBytes / 4; word++) {
          banks[(D::offset(lane / 4, lane % 4, step) / 4 + word) % 32]++;
        }
      }
      EXPECT_EQ(banks.size() * D::kTurns, 32) << "step " << step;
      for (const auto& [bank, n] : banks) EXPECT_EQ(n, D::kTurns) << "step " << step << ", bank " << bank;
    }
  }
}

TEST(CudaAttend, CodewordsLieInBanksOfTheirOwn) {
  expect_no_more_bank_conflicts<Direct<64, 8, 8>>();
  expect_no_more_bank_conflicts<Direct<64, 4, 4>>();
  expect_no_more_bank_conflicts<Direct<128, 8, 8>>();
  expect_no_more_bank_conflicts<Direct<128, 4, 4>>();
  expect_no_more_bank_conflicts<Direct<128, 2, 2>>();
}

template <int HeadDim, int KeyWidth, int ValueWidth>
using Pair = AttendShape<HeadDim, KeyWidth, ValueWidth, true, 2>;

// Two streams to a thread block, each with a score table.
TEST(CudaAttend, Pairs) {
  const Case c{.n_streams = 3, .n_cells = 64 * 7, .mask = true, .batch_shift = 1};  // one is left alone
  EXPECT_LT((share_of_tolerance<Pair<64, 8, 8>>(c)), 1);
  EXPECT_LT((share_of_tolerance<Pair<64, 4, 8>>(c)), 1);
  EXPECT_LT((share_of_tolerance<Pair<128, 8, 8>>(c)), 1);
  EXPECT_LT((share_of_tolerance<Pair<128, 4, 4>>(c)), 1);
  EXPECT_LT((share_of_tolerance<Pair<256, 8, 8>>(c)), 1);
  Case many = kManyOptions;
  many.batch_shift = 1;
  EXPECT_LT((share_of_tolerance<Pair<64, 4, 4>>(many)), 1);
  many.softcap = 2;
  many.sinks = true;
  EXPECT_LT((share_of_tolerance<Pair<64, 8, 8>>(many)), 1);
}

// Several streams to a thread block, and scores from the codewords themselves.
TEST(CudaAttend, Batches) {
  const Case c{.n_streams = 3, .n_cells = 64 * 7, .mask = true, .batch_shift = 1};
  EXPECT_LT((share_of_tolerance<Direct<64, 8, 8>>(c)), 1);
  EXPECT_LT((share_of_tolerance<Direct<64, 4, 4>>(c)), 1);
  EXPECT_LT((share_of_tolerance<Direct<64, 4, 8>>(c)), 1);
  EXPECT_LT((share_of_tolerance<Direct<128, 8, 8>>(c)), 1);
  EXPECT_LT((share_of_tolerance<Direct<128, 4, 8>>(c)), 1);
  EXPECT_LT((share_of_tolerance<Direct<128, 4, 4>>(c)), 1);
  EXPECT_LT((share_of_tolerance<Direct<128, 2, 4>>(c)), 1);
  EXPECT_LT((share_of_tolerance<Direct<128, 2, 2>>(c)), 1);
}

TEST(CudaAttend, BatchesOfAllSizes) {
  using S = Direct<64, 4, 4>;
  for (int shift = 0; shift <= 3; shift++) {  // a last batch that is not full, and thread blocks with two batches
    const Case c{.n_streams = 11, .n_kv_heads = 2, .group = 3, .n_cells = 64 * 5, .blocks_x = 1, .batch_shift = shift};
    EXPECT_LT(share_of_tolerance<S>(c), 1) << shift;
  }
  EXPECT_LT(share_of_tolerance<S>({.n_streams = 5,
                                   .n_tokens = 3,
                                   .n_cells = 192,
                                   .dense = true,
                                   .mask = true,
                                   .alibi = true,
                                   .sinks = true,
                                   .softcap = 2,
                                   .blocks_x = 2,
                                   .batch_shift = 1}),
            1);
  EXPECT_LT((share_of_tolerance<Direct<128, 2, 2>>({.n_streams = 9, .n_cells = 64, .dense = true, .batch_shift = 3})),
            1);
}

TEST(CudaAttend, BatchesWithExactRows) {
  EXPECT_LT((share_of_tolerance<Direct<128, 4, 4>>(
                {.n_streams = 5, .n_cells = 64 * 18, .mask = true, .n_exact = 150, .n_fresh = 3, .batch_shift = 2})),
            1);
  Case many = kManyOptions;
  many.n_streams = 7;
  many.sinks = true;
  many.batch_shift = 1;
  EXPECT_LT((share_of_tolerance<Direct<64, 8, 8>>(many)), 1);
  for (int blocks_x : {1, 2}) {
    const Case c{
        .n_streams = 6, .n_exact = 60, .n_fresh = 1, .blocks_x = blocks_x, .batch_shift = 2, .nothing_coded = true};
    EXPECT_LT((error_of<Direct<64, 4, 4>>(c)), 2e-4) << blocks_x;
    EXPECT_LT((error_of<Direct<128, 2, 2>>(c)), 2e-4) << blocks_x;
  }
}

// What the kernel adds to the error of outputs, and what the codec does, of normal keys and values. `outliers`: one
// component of each query is six times as large.
template <typename S>
void expect_small_arithmetic_error(bool outliers) {
  constexpr int D = S::kHeadDim, kCells = 512, kGroup = 4, kStreams = S::kSlots;
  Random random(7);
  const HeadCodec codecs[2] = {make_uncalibrated_codec(Kind::key, make_format(D, 8.0 / S::kKeyWidth)),
                               make_uncalibrated_codec(Kind::value, make_format(D, 8.0 / S::kValueWidth))};
  const HostTables tables[2] = {pack_tables({codecs[0]}), pack_tables({codecs[1]})};
  std::vector<float> rows[2], decoded[2];  // as the model has them; of the stream 0, which all others equal
  std::vector<uint8_t> cache[2];
  for (int kind = 0; kind < 2; kind++) {
    const HeadCodec& codec = codecs[kind];
    const size_t block_bytes = codec.format.block_bytes();
    rows[kind] = random.normals(size_t(kCells) * D);
    decoded[kind].resize(rows[kind].size());
    cache[kind].resize(block_bytes * kCells / kBlockCells);
    std::vector<uint8_t> block(block_bytes);
    std::vector<float> y(D);
    for (int cell = 0; cell < kCells; cell++) {
      codec.transform.forward(&rows[kind][size_t(cell) * D], y.data());
      encode_cell(codec, y.data(), block.data(), cell % kBlockCells);
      decode_cell(codec, block.data(), cell % kBlockCells, y.data());
      codec.transform.output(y.data(), 1, &decoded[kind][size_t(cell) * D]);
      if (cell % kBlockCells != kBlockCells - 1) continue;
      block_to_cuda(codec.format, codec.kind, block.data(), &cache[kind][cell / kBlockCells * block_bytes]);
    }
  }
  std::vector<float> queries = random.normals(size_t(kStreams) * kGroup * D);
  for (int row = 0; outliers && row < kStreams * kGroup; row++) queries[size_t(row) * D + 5 * row % D] *= 6;

  AttendArgs a;
  a.n_streams = kStreams;
  a.group = kGroup;
  a.head_dim = D;
  a.n_cells = kCells;
  a.key_codec = tables[0].view();
  a.value_codec = tables[1].view();
  a.keys = {cache[0].data(), 0, cache[0].size(), S::kKeyBlock};
  a.values = {cache[1].data(), 0, cache[1].size(), S::kValueBlock};
  a.queries = queries.data();
  a.query_head_stride = D;
  a.query_token_stride = a.query_stream_stride = size_t(kGroup) * D;
  a.scale = 1 / std::sqrt(float(D));
  deal_out(a, 1, 0, std::bit_width(unsigned(kStreams)) - 1);
  const std::vector<float> output = emulate_attend<S>(a, 1);

  const auto attention = [&](const std::vector<float>(&of)[2]) {
    std::vector<double> outputs;
    for (int row = 0; row < kStreams * kGroup; row++) {
      double total = 0;
      std::vector<double> y(D);
      for (int cell = 0; cell < kCells; cell++) {
        double x = 0;
        for (int d = 0; d < D; d++) x += double(queries[size_t(row) * D + d]) * of[0][size_t(cell) * D + d];
        const double p = std::exp(x * a.scale);
        total += p;
        for (int d = 0; d < D; d++) y[d] += p * of[1][size_t(cell) * D + d];
      }
      for (int d = 0; d < D; d++) outputs.push_back(y[d] / total);
    }
    return outputs;
  };
  const std::vector<double> of_codes = attention(decoded), exact = attention(rows);
  const std::vector<float> rounded(of_codes.begin(), of_codes.end());
  EXPECT_LT(relative_error(output, of_codes), 0.1 * relative_error(rounded, exact)) << D << " " << outliers;
}

TEST(CudaAttend, ArithmeticErrorIsATenthOfTheCodecs) {
  for (bool outliers : {false, true}) {
    expect_small_arithmetic_error<AttendShape<64, 8, 8, true>>(outliers);
    expect_small_arithmetic_error<AttendShape<64, 4, 4, true>>(outliers);
    expect_small_arithmetic_error<AttendShape<64, 4, 4, false>>(outliers);
    expect_small_arithmetic_error<AttendShape<128, 8, 8, true>>(outliers);
    expect_small_arithmetic_error<AttendShape<128, 4, 8, true>>(outliers);
    expect_small_arithmetic_error<AttendShape<128, 2, 4, true>>(outliers);
    expect_small_arithmetic_error<AttendShape<128, 2, 2, true>>(outliers);
    expect_small_arithmetic_error<AttendShape<256, 4, 4, true>>(outliers);
    expect_small_arithmetic_error<Pair<128, 4, 4>>(outliers);
    expect_small_arithmetic_error<Direct<128, 8, 8>>(outliers);
    expect_small_arithmetic_error<Direct<128, 4, 4>>(outliers);
    expect_small_arithmetic_error<Direct<128, 2, 2>>(outliers);
  }
}

// Tables are not made where nothing is to be attended to from codes.
TEST(CudaAttend, NothingCoded) {
  for (int blocks_x : {1, 2}) {
    EXPECT_LT(
        error_of<Small>(
            {.n_streams = 3, .dense = true, .n_exact = 60, .n_fresh = 1, .blocks_x = blocks_x, .nothing_coded = true}),
        1e-4);
  }
  EXPECT_LT(error_of<Small>({.n_exact = 30, .n_splits = 2, .blocks_x = 2, .nothing_coded = true}), 3e-4);
}

}  // namespace
}  // namespace thimble::cuda
