// Makes problems of decode attention and computes their results by the codec's specification, in double.
#define THIMBLE_SIMT_HOST
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <utility>

#include "emulated_attend.h"
#include "fixture.h"

namespace thimble::cuda {

double error_of(const EmulatedAttend& kernel, const AttendCase& c) {
  Random random(1);
  const int d = kernel.head_dim, n_heads = c.n_kv_heads * c.group;
  std::vector<HeadCodec> key_codecs, value_codecs;
  for (int h = 0; h < c.n_kv_heads; h++) {
    key_codecs.push_back(random_codec(Kind::key, d, kernel.rates.keys, c.dense || c.dense_keys, random));
    value_codecs.push_back(random_codec(Kind::value, d, kernel.rates.values, c.dense, random));
  }
  const HostTables key_tables = pack_tables(key_codecs, kernel.tiles),
                   value_tables = pack_tables(value_codecs, kernel.tiles);

  AttendArgs a = attend_args(c, d);
  a.key_codec = key_tables.view();
  a.value_codec = value_tables.view();

  std::vector<CodedHead> keys, values;  // [stream][KV head]
  std::vector<uint8_t> key_cache, value_cache;
  for (int i = 0; i < c.n_streams * c.n_kv_heads; i++) {
    keys.push_back(random_head(key_codecs[i % c.n_kv_heads], c.n_cells, random, kernel.tiles));
    values.push_back(random_head(value_codecs[i % c.n_kv_heads], c.n_cells, random, kernel.tiles));
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
        double lacking = 0;  // of coded cells' scores
        if (c.dense || c.dense_keys) {
          lacking = transform.query_bias(q) + scale * key_codecs[kv_head].score_bias(transformed.data());
        }
        double total = c.sinks ? std::exp(double(sinks[head])) : 0, weight = 0;
        std::vector<double> y(d, 0.0), y_exact(d, 0.0);
        for (int cell = 0; cell < c.n_cells; cell++) {
          const int row = exact_of[s][cell];
          if (row < 0 && c.nothing_coded) continue;
          const size_t exact_at = (size_t(at) * c.n_exact + row) * d;
          double x = row >= 0 ? 0 : lacking;
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

double share_of_codecs_error(const EmulatedAttend& kernel, bool outliers) {
  constexpr int kCells = 512, kGroup = 4;
  const int dim = kernel.head_dim, n_streams = kernel.slots;
  Random random(7);
  const HeadCodec codecs[2] = {make_uncalibrated_codec(Kind::key, make_format(dim, kernel.rates.keys)),
                               make_uncalibrated_codec(Kind::value, make_format(dim, kernel.rates.values))};
  const HostTables tables[2] = {pack_tables({codecs[0]}, kernel.tiles), pack_tables({codecs[1]}, kernel.tiles)};
  std::vector<float> rows[2], decoded[2];  // as the model has them; of the stream 0, which all others equal
  std::vector<uint8_t> cache[2];
  for (int kind = 0; kind < 2; kind++) {
    const HeadCodec& codec = codecs[kind];
    const size_t block_bytes = codec.format.block_bytes();
    rows[kind] = random.normals(size_t(kCells) * dim);
    decoded[kind].resize(rows[kind].size());
    cache[kind].resize(block_bytes * kCells / kBlockCells);
    std::vector<uint8_t> block(block_bytes);
    std::vector<float> y(dim);
    for (int cell = 0; cell < kCells; cell++) {
      codec.transform.forward(&rows[kind][size_t(cell) * dim], y.data());
      encode_cell(codec, y.data(), block.data(), cell % kBlockCells);
      decode_cell(codec, block.data(), cell % kBlockCells, y.data());
      codec.transform.output(y.data(), 1, &decoded[kind][size_t(cell) * dim]);
      if (cell % kBlockCells != kBlockCells - 1) continue;
      block_to_cuda(codec.format, codec.kind, block.data(), &cache[kind][cell / kBlockCells * block_bytes],
                    kernel.tiles);
    }
  }
  std::vector<float> queries = random.normals(size_t(n_streams) * kGroup * dim);
  for (int row = 0; outliers && row < n_streams * kGroup; row++) queries[size_t(row) * dim + 5 * row % dim] *= 6;

  AttendArgs a;
  a.n_streams = n_streams;
  a.group = kGroup;
  a.head_dim = dim;
  a.n_cells = kCells;
  a.key_codec = tables[0].view();
  a.value_codec = tables[1].view();
  a.keys = {cache[0].data(), 0, cache[0].size(), codecs[0].format.block_bytes()};
  a.values = {cache[1].data(), 0, cache[1].size(), codecs[1].format.block_bytes()};
  a.queries = queries.data();
  a.query_head_stride = dim;
  a.query_token_stride = a.query_stream_stride = size_t(kGroup) * dim;
  a.scale = 1 / std::sqrt(float(dim));
  deal_out(a, 1, 0, std::bit_width(unsigned(n_streams)) - 1);
  const std::vector<float> output = kernel.run(a, 1);

  const auto attention = [&](const std::vector<float>(&of)[2]) {
    std::vector<double> outputs;
    for (int row = 0; row < n_streams * kGroup; row++) {
      double total = 0;
      std::vector<double> y(dim);
      for (int cell = 0; cell < kCells; cell++) {
        double x = 0;
        for (int d = 0; d < dim; d++) x += double(queries[size_t(row) * dim + d]) * of[0][size_t(cell) * dim + d];
        const double p = std::exp(x * a.scale);
        total += p;
        for (int d = 0; d < dim; d++) y[d] += p * of[1][size_t(cell) * dim + d];
      }
      for (int d = 0; d < dim; d++) outputs.push_back(y[d] / total);
    }
    return outputs;
  };
  const std::vector<double> of_codes = attention(decoded), exact = attention(rows);
  const std::vector<float> rounded(of_codes.begin(), of_codes.end());
  return relative_error(output, of_codes) / relative_error(rounded, exact);
}

}  // namespace thimble::cuda
