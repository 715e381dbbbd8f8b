// The CUDA kernels on a device against the codec's specification: small cases of every format, head size and option,
// through the host API, from encoding to retrieval. The cases of attention are those of the emulated tests (cases.h),
// and some for which emulation is too slow. Prints a line a check; exit status 1 if any fails, 77 without a device.
//
// usage: cuda_device_check [--quick]    --quick: few cases, for compute-sanitizer
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "cases.h"
#include "cuda/attend/attend.h"
#include "cuda/attend/launch.h"
#include "cuda/attend/shape.h"
#include "cuda/encode/encode.h"
#include "cuda/retrieve/retrieve.h"
#include "cuda/rows/rows.h"
#include "fixture.h"
#include "judge_pair.h"
#include "on_device.h"
#include "prompt_check.h"

using namespace thimble;
using namespace thimble::cuda;

namespace {

struct Case {
  const char* name = "";
  int head_dim, key_width, value_width;
  int n_streams = 1, n_tokens = 1, n_kv_heads = 2, group = 4, n_cells = 256;
  bool dense = false, mask = false, alibi = false, sinks = false;
  float softcap = 0;
  int n_window = 0, top = 0;
  int batch = 1;  // streams that a thread block is to take at once
  Rates rates{};  // where widths are 0: by tiles

  bool tiles() const { return key_width == 0; }
  double key_bits() const { return tiles() ? rates.keys : 8.0 / key_width; }
  double value_bits() const { return tiles() ? rates.values : 8.0 / value_width; }
  /// Weights of exact rows are rounded to f16.
  double error() const {
    if (!tiles()) return tolerance(key_width, value_width);
    return n_window + top > 0 ? 1.5e-3 : 5 * kTileTolerance;
  }
};

/// A case of the emulated tests. Splits and thread blocks are the launcher's choice here; one row of each stream is new
/// wherever there are exact rows.
Case case_of(const FormatCase& f, const AttendCase& c) {
  return {.name = c.name,
          .head_dim = f.head_dim,
          .key_width = f.key_width,
          .value_width = f.value_width,
          .n_streams = c.n_streams,
          .n_tokens = c.n_tokens,
          .n_kv_heads = c.n_kv_heads,
          .group = c.group,
          .n_cells = c.n_cells,
          .dense = c.dense,
          .mask = c.mask,
          .alibi = c.alibi,
          .sinks = c.sinks,
          .softcap = c.softcap,
          .n_window = c.n_exact};
}

/// The same of a format that is attended to by tiles.
Case case_of(const TileCase& f, const AttendCase& c) {
  Case made = case_of(FormatCase{f.head_dim, 0, 0}, c);
  made.rates = f.rates;
  return made;
}

int failures = 0;

void report(const Case& c, const char* what, bool good, double value) {
  std::printf("%s %s%sD=%d bits %g/%g%s streams %d tokens %d group %d cells %d%s%s%s%s window %d top %d: %s %.2e\n",
              good ? "ok  " : "FAIL", c.name, *c.name ? ": " : "", c.head_dim, c.key_bits(), c.value_bits(),
              c.tiles() ? " by tiles" : "", c.n_streams, c.n_tokens, c.group, c.n_cells, c.dense ? " dense" : "",
              c.mask ? " mask" : "", c.alibi ? " ALiBi" : "", c.sinks ? " sinks" : "", c.n_window, c.top, what, value);
  if (!good) failures++;
}

/// Returns whether the case ran; a device may lack the memory for a format.
bool accept(const Case& c, const Status& status, const char* what) {
  if (status.ok()) return true;
  const bool unsupported = status.code == Status::Code::unsupported;
  std::printf("%s D=%d bits %g/%g %s: %s\n", unsupported ? "none" : "FAIL", c.head_dim, c.key_bits(), c.value_bits(),
              what, status.message);
  if (!unsupported) failures++;
  return false;
}

void run(const DeviceInfo& device, const Case& c) {
  Random random(11);
  const int d = c.head_dim, pairs = c.n_streams * c.n_kv_heads, n_heads = c.n_kv_heads * c.group;
  std::vector<HeadCodec> key_codecs, value_codecs;
  for (int h = 0; h < c.n_kv_heads; h++) {
    key_codecs.push_back(random_codec(Kind::key, d, c.key_bits(), c.dense, random));
    value_codecs.push_back(random_codec(Kind::value, d, c.value_bits(), c.dense, random));
  }
  DeviceTables key_tables, value_tables;
  if (!accept(c, key_tables.upload(pack_tables(key_codecs, c.tiles())), "tables")) return;
  if (!accept(c, value_tables.upload(pack_tables(value_codecs, c.tiles())), "tables")) return;
  const Format key_format = key_codecs[0].format, value_format = value_codecs[0].format;

  // Encode every cell of every stream; the last ones of each are in the window, too.
  const int n_all = c.n_streams * c.n_cells, n_blocks = c.n_cells / kBlockCells;
  Array<float> keys(random.normals(size_t(n_all) * c.n_kv_heads * d)), values(random.normals(keys.host.size()));
  std::vector<int64_t> cells(n_all);
  std::vector<int32_t> slots(n_all, -1), window_cells(c.n_streams * c.n_window, -1);
  std::vector<uint32_t> hidden(n_all / 32);
  for (int i = 0; i < n_all; i++) {
    cells[i] = (int64_t(i) * 37) % n_all;  // shuffled: 37 is prime to all sizes here
    const int stream = int(cells[i]) / c.n_cells, cell = int(cells[i]) % c.n_cells;
    if (cell < c.n_cells - c.n_window) continue;
    slots[i] = c.n_cells - 1 - cell;
    window_cells[stream * c.n_window + slots[i]] = cell;
    hidden[cells[i] / 32] |= 1u << cell % 32;
  }
  Array<int64_t> cells_d(cells);
  Array<int32_t> slots_d(slots), window_cells_d(window_cells);
  Array<uint32_t> hidden_d(hidden);
  const size_t key_block = key_format.block_bytes(), value_block = value_format.block_bytes();
  Array<uint8_t> key_cache(pairs * n_blocks * key_block), value_cache(pairs * n_blocks * value_block);
  require(cudaMemset(key_cache.device(), 0, key_cache.host.size()));
  require(cudaMemset(value_cache.device(), 0, value_cache.host.size()));
  Array<uint16_t> window_keys(size_t(pairs) * c.n_window * d), window_values(size_t(pairs) * c.n_window * d);

  EncodeArgs p;
  p.n_kv_heads = c.n_kv_heads;
  p.head_dim = d;
  p.n_tokens = n_all;
  p.keys = keys.device();
  p.values = values.device();
  p.key_token_stride = p.value_token_stride = size_t(c.n_kv_heads) * d;
  p.key_head_stride = p.value_head_stride = d;
  p.cells = cells_d.device();
  p.cells_per_stream = c.n_cells;
  p.key_cache = {key_cache.device(), c.n_kv_heads * n_blocks * key_block, n_blocks * key_block, key_block};
  p.value_cache = {value_cache.device(), c.n_kv_heads * n_blocks * value_block, n_blocks * value_block, value_block};
  p.key_codec = key_tables.view();
  p.value_codec = value_tables.view();
  uint16_t* store = nullptr;
  if (c.top > 0) {
    const size_t numbers = size_t(pairs) * c.n_cells * d;
    require(cudaHostAlloc(reinterpret_cast<void**>(&store), 2 * numbers * sizeof(uint16_t), cudaHostAllocMapped));
    p.store = {store, store + numbers, 0, c.n_streams, c.n_cells};
  }
  if (c.n_window > 0) p.window = {window_keys.device(), window_values.device(), slots_d.device(), c.n_window};

  if (!accept(c, encode(device, p, nullptr), "encoding")) return;
  Array<float> raw(random.normals(size_t(c.n_streams) * c.n_tokens * n_heads * d));
  AttendArgs a = attend_args(c, d);
  a.keys = p.key_cache;
  a.values = p.value_cache;
  a.key_codec = p.key_codec;
  a.value_codec = p.value_codec;
  a.queries = raw.device();
  a.query_head_stride = d;
  a.query_token_stride = size_t(n_heads) * d;
  a.query_stream_stride = c.n_tokens * a.query_token_stride;
  a.scale = 1.5f / std::sqrt(float(d));
  std::vector<uint16_t> mask(size_t(n_all) * c.n_tokens);
  for (uint16_t& m : mask) m = float_to_half(random.below(4) == 0 ? -INFINITY : -0.125f * float(random.below(8)));
  Array<uint16_t> mask_d(mask);
  if (c.mask) {
    a.mask = mask_d.device();
    a.mask_token_stride = c.n_cells;
    a.mask_stream_stride = size_t(c.n_cells) * c.n_tokens;
  }
  Array<float> sinks(random.normals(n_heads)), output(size_t(c.n_streams) * c.n_tokens * n_heads * d);
  if (c.sinks) a.sinks = sinks.device();
  Array<float> slopes(n_heads);
  for (float& v : slopes.host) v = 0.25f * float(1 + random.below(4));
  if (c.alibi) a.slopes = slopes.upload();
  Array<int32_t> new_tokens(window_cells.size());
  Array<float> fresh_keys(size_t(c.n_streams) * c.n_tokens * c.n_kv_heads * d), fresh_values(fresh_keys.host.size());
  Array<float> kept(size_t(c.n_streams) * 2 * n_heads * d);
  if (c.n_window > 0) {
    a.exact[0] = {window_keys.device(), window_values.device(), window_cells_d.device(), c.n_window, false};
    a.hidden = hidden_d.device();
    a.hidden_stream_stride = c.n_cells / 32;
    // The latest cell of each stream is new: attention takes its row into the window.
    // It is its stream's last token; the queries of every other stream's are kept.
    std::vector<int32_t> tokens(window_cells.size(), -1);
    const size_t row = size_t(c.n_kv_heads) * d;
    for (int i = 0; i < n_all; i++) {
      if (slots[i] != 0) continue;
      const int stream = int(cells[i]) / c.n_cells, token = stream * c.n_tokens + c.n_tokens - 1;
      tokens[stream * c.n_window] = token | (stream % 2 == 0 ? 2 << kJudgeShift : 0);
      for (int h = 0; h < c.n_kv_heads; h++) {
        std::copy_n(&keys.host[i * p.key_token_stride + h * p.key_head_stride], d,
                    &fresh_keys.host[token * row + h * d]);
        std::copy_n(&values.host[i * p.value_token_stride + h * p.value_head_stride], d,
                    &fresh_values.host[token * row + h * d]);
      }
    }
    new_tokens.host = tokens;
    EncodeArgs fresh = p;
    fresh.keys = fresh_keys.upload();
    fresh.values = fresh_values.upload();
    fresh.key_token_stride = fresh.value_token_stride = row;
    fresh.key_head_stride = fresh.value_head_stride = d;
    a.fresh = new_rows(fresh, new_tokens.upload());
    a.kept_queries = kept.upload();
    a.n_judges = 2;
    window_keys.download();
    window_values.download();
    for (size_t i = 0; i < window_keys.host.size(); i++) {
      if (i / d % c.n_window == 0) window_keys.host[i] = window_values.host[i] = 0x7e00;
    }
    window_keys.upload();
    window_values.upload();
  }
  a.output = output.device();
  require(cudaMemset(output.device(), 0xff, output.host.size() * 4));
  Array<uint8_t> workspace(attend_workspace_bytes(device, a));
  require(cudaMemset(workspace.device(), 0, workspace.host.size()));
  report(c, "streams at once", attend_batch(device, a) == c.batch, attend_batch(device, a));
  if (!accept(c, attend(device, a, workspace.device(), workspace.host.size(), nullptr), "attend")) return;
  require(cudaDeviceSynchronize());

  // Codes, bit for bit; then everything as numbers, [pair][cell][d]: exact rows as they are, codes transformed.
  std::vector<float> exact_keys(size_t(pairs) * c.n_cells * d), exact_values(exact_keys.size());
  std::vector<float> coded_keys(exact_keys.size()), coded_values(exact_keys.size());
  int wrong = 0;
  const auto check_codes = [&](const std::vector<HeadCodec>& codecs, const Array<float>& input,
                               const std::vector<uint8_t>& cache, std::vector<float>& exact,
                               std::vector<float>& coded) {
    const Format& format = codecs[0].format;
    std::vector<uint8_t> row(size_t(format.vector_bytes())), got(row.size()), block(format.block_bytes());
    for (int i = 0; i < n_all; i++) {
      for (int h = 0; h < c.n_kv_heads; h++) {
        const int pair = int(cells[i]) / c.n_cells * c.n_kv_heads + h, cell = int(cells[i]) % c.n_cells;
        const float* x = &input.host[(size_t(i) * c.n_kv_heads + h) * d];
        std::vector<float> y(d);
        codecs[h].transform.forward(x, y.data());
        const uint16_t scale = encode_vector(codecs[h], y.data(), row.data());
        std::memcpy(&row[format.n_subspaces()], &scale, 2);
        block_from_cuda(format, codecs[h].kind, &cache[(size_t(pair) * n_blocks + cell / kBlockCells) * block.size()],
                        block.data(), c.tiles());
        copy_cell_out(format, codecs[h].kind, block.data(), cell % kBlockCells, got.data());
        wrong += got != row;
        decode_vector(codecs[h], row.data(), scale, &coded[(size_t(pair) * c.n_cells + cell) * d]);
        for (int k = 0; k < d; k++) {
          exact[(size_t(pair) * c.n_cells + cell) * d + k] = half_to_float(float_to_half(x[k]));
        }
      }
    }
  };
  check_codes(key_codecs, keys, key_cache.download(), exact_keys, coded_keys);
  check_codes(value_codecs, values, value_cache.download(), exact_values, coded_values);
  report(c, "vectors coded otherwise than by the specification", wrong == 0, wrong);

  // Attention in double, with the cells in `is_exact` [pair][cell] exact.
  const auto attention = [&](const std::vector<char>& is_exact, bool drop_tail = false) {
    std::vector<double> expected;
    std::vector<float> transformed(d), mean(d), out(d);
    for (int s = 0; s < c.n_streams; s++) {
      for (int t = 0; t < c.n_tokens; t++) {
        for (int head = 0; head < n_heads; head++) {
          const int kv_head = head / c.group, pair = s * c.n_kv_heads + kv_head;
          const float* q = &raw.host[(size_t(s * c.n_tokens + t) * n_heads + head) * d];
          key_codecs[kv_head].transform.query(q, transformed.data());
          double lacking = 0;  // of coded cells' scores
          if (c.dense) lacking += a.scale * key_codecs[kv_head].score_bias(transformed.data());
          for (int i = 0; c.dense && i < d; i++) {
            lacking += double(q[i]) * key_codecs[kv_head].transform.mean()[i];
          }
          double total = c.sinks ? std::exp(double(sinks.host[head])) : 0, weight = 0;
          std::vector<double> y(d), y_exact(d);
          for (int cell = 0; cell < c.n_cells; cell++) {
            const size_t at = (size_t(pair) * c.n_cells + cell) * d;
            const bool exact = is_exact[pair * c.n_cells + cell];
            if (drop_tail && !exact) continue;
            const float *k = &(exact ? exact_keys : coded_keys)[at], *v = &(exact ? exact_values : coded_values)[at];
            double x = exact ? 0 : lacking;
            for (int i = 0; i < d; i++) x += double(exact ? q[i] : transformed[i]) * k[i];
            x *= a.scale;
            if (c.softcap != 0) x = c.softcap * std::tanh(x / c.softcap);
            if (c.mask) {
              x += half_to_float(mask[(size_t(s) * c.n_tokens + t) * c.n_cells + cell]) *
                   (c.alibi ? slopes.host[head] : 1.0f);
            }
            const double e = std::exp(x);
            total += e;
            weight += exact ? 0 : e;
            for (int i = 0; i < d; i++) (exact ? y_exact : y)[i] += e * v[i];
          }
          for (int i = 0; i < d; i++) mean[i] = float(y[i] / total);
          value_codecs[kv_head].transform.output(mean.data(), float(weight / total), out.data());
          for (int i = 0; i < d; i++) expected.push_back(out[i] + y_exact[i] / total);
        }
      }
    }
    return expected;
  };
  std::vector<char> is_exact(pairs * c.n_cells);
  for (int i = 0; i < pairs * c.n_cells; i++) is_exact[i] = i % c.n_cells >= c.n_cells - c.n_window;
  double error = relative_error(output.download(), attention(is_exact));
  report(c, "attention, relative error", error < c.error(), error);
  const std::vector<float> first = output.host;
  if (!accept(c, attend(device, a, workspace.device(), workspace.host.size(), nullptr), "attend")) return;
  if (c.n_window > 0) {
    kept.download();
    wrong = 0;
    for (size_t i = 0, size = size_t(n_heads) * d; i < kept.host.size(); i++) {
      const size_t stream = i / size / 2, at = (stream * c.n_tokens + c.n_tokens - 1) * size + i % size;
      wrong += kept.host[i] != (i / size % 2 == 1 && stream % 2 == 0 ? raw.host[at] : 0.0f);
    }
    report(c, "numbers of queries kept wrongly", wrong == 0, wrong);
  }
  report(c, "differs when run again", std::memcmp(first.data(), output.download().data(), first.size() * 4) == 0, 0);

  if (c.n_window > 0) {
    wrong = 0;
    window_keys.download();
    window_values.download();
    for (int pair = 0; pair < pairs; pair++) {
      const size_t last = (size_t(pair) * c.n_cells + c.n_cells - 1) * d, row = size_t(pair) * c.n_window * d;
      for (int i = 0; i < d; i++) {
        wrong += half_to_float(window_keys.host[row + i]) != exact_keys[last + i];
        wrong += half_to_float(window_values.host[row + i]) != exact_values[last + i];
      }
    }
    report(c, "new rows that differ", wrong == 0, wrong);
  }

  // Rows for dense attention: decoded, and those of the window in their place.
  Array<uint16_t> decoded(exact_keys.size());
  for (const bool is_key : {true, false}) {
    DecodeArgs t;
    t.n_streams = c.n_streams;
    t.n_kv_heads = c.n_kv_heads;
    t.n_cells = c.n_cells;
    t.cache = is_key ? a.keys : a.values;
    t.codec = is_key ? a.key_codec : a.value_codec;
    t.is_key = is_key;
    t.rows = decoded.device();
    if (!accept(c, decode_cells(device, t, nullptr), "decode")) return;
    if (c.n_window > 0) {
      EncodeArgs w = p;
      w.from_window = true;
      w.window_cells = window_cells_d.device();
      w.n_tokens = c.n_streams * c.n_window;
      (is_key ? w.dense.keys : w.dense.values) = decoded.device();
      w.dense.n_streams = c.n_streams;
      w.dense.n_cells = c.n_cells;
      if (!accept(c, encode(device, w, nullptr), "rows of the window")) return;
    }
    decoded.download();
    wrong = 0;
    std::vector<float> y(d);
    for (size_t row = 0; row < is_exact.size(); row++) {
      const float* from = &(is_key ? coded_keys : coded_values)[row * d];
      if (is_exact[row]) {
        const HeadCodec& codec = (is_key ? key_codecs : value_codecs)[row / c.n_cells % c.n_kv_heads];
        codec.transform.forward(&(is_key ? exact_keys : exact_values)[row * d], y.data());
        from = y.data();
      }
      for (int i = 0; i < d; i++) wrong += decoded.host[row * d + i] != float_to_half(from[i]);
    }
    report(c, is_key ? "decoded keys that differ" : "decoded values that differ", wrong == 0, wrong);
    if (!can_restore(t.codec)) continue;
    t.restored = true;
    if (!accept(c, decode_cells(device, t, nullptr), "decode")) return;
    decoded.download();
    wrong = 0;
    for (size_t row = 0; row < is_exact.size(); row++) {
      const HeadCodec& codec = (is_key ? key_codecs : value_codecs)[row / c.n_cells % c.n_kv_heads];
      codec.transform.inverse(&(is_key ? coded_keys : coded_values)[row * d], y.data());
      double norm = 0;
      for (const float x : y) norm += double(x) * x;
      for (int i = 0; i < d; i++) {
        const double bound = (std::sqrt(norm) + std::abs(y[i])) * 0x1p-11;
        wrong += !(std::abs(half_to_float(decoded.host[row * d + i]) - y[i]) <= bound);
      }
    }
    report(c, is_key ? "restored keys that differ" : "restored values that differ", wrong == 0, wrong);
  }

  // Cells that leave the window: coded anew, from the rows that it has.
  if (c.n_window > 0) {
    Array<EncodeArgs> layers(std::vector<EncodeArgs>{p});
    Array<uint8_t> coded(key_cache.host);
    layers.host[0].key_cache.data = coded.device();
    LeaveArgs leave;
    leave.layers = layers.upload();
    leave.n_layers = 1;
    leave.n_kv_heads = c.n_kv_heads;
    leave.n_tokens = n_all;
    std::vector<int64_t> leaving = cells;
    for (int i = 0; i < n_all; i++) {
      if (slots[i] < 0) leaving[i] = -1;
    }
    Array<int64_t> leaving_d(leaving);
    Array<int> n_leaving(std::vector<int>{n_all, 0});
    Array<WindowBooks> books(std::vector<WindowBooks>{{1, 0, 0, 0, 0, 0, 0, {}, 0, 0}});
    LayerWindow window;
    window.leaving_cells = leaving_d.device();
    window.leaving_slots = slots_d.device();
    window.n_leaving = n_leaving.device();
    window.books = books.device();
    Array<LayerWindow> windows(std::vector<LayerWindow>{window});
    leave.windows = windows.device();
    if (!accept(c, code_leaving(device, leave, d, nullptr), "leaving")) return;
    coded.download();
    wrong = 0;
    std::vector<uint8_t> row(size_t(key_format.vector_bytes())), got(row.size()), block(key_format.block_bytes());
    std::vector<float> y(d);
    for (int i = 0; i < n_all; i++) {
      for (int h = 0; slots[i] >= 0 && h < c.n_kv_heads; h++) {
        const int pair = int(cells[i]) / c.n_cells * c.n_kv_heads + h, cell = int(cells[i]) % c.n_cells;
        key_codecs[h].transform.forward(&exact_keys[(size_t(pair) * c.n_cells + cell) * d], y.data());
        const uint16_t scale = encode_vector(key_codecs[h], y.data(), row.data());
        std::memcpy(&row[key_format.n_subspaces()], &scale, 2);
        block_from_cuda(key_format, Kind::key,
                        &coded.host[(size_t(pair) * n_blocks + cell / kBlockCells) * block.size()], block.data(),
                        c.tiles());
        copy_cell_out(key_format, Kind::key, block.data(), cell % kBlockCells, got.data());
        wrong += got != row;
      }
    }
    report(c, "vectors coded otherwise as they left the window", wrong == 0, wrong);
  }

  // Retrieval: the best cells exact, from pinned memory, where the first step left them.
  if (c.top == 0) return;
  wrong = 0;
  for (size_t i = 0; i < exact_keys.size(); i++) {
    wrong += p.store.keys[i] != float_to_half(exact_keys[i]) || p.store.values[i] != float_to_half(exact_values[i]);
  }
  report(c, "numbers stored wrongly", wrong == 0, wrong);
  RetrieveArgs r;
  r.n_streams = c.n_streams;
  r.n_kv_heads = c.n_kv_heads;
  r.head_dim = d;
  r.n_cells = c.n_cells;
  r.row_groups = row_groups(c.n_tokens, c.group);
  r.top = c.top;
  r.store_keys = p.store.keys;
  r.store_values = p.store.values;
  r.store_cells = c.n_cells;
  Array<uint8_t> scratch(retrieval_bytes(r));
  require(cudaMemset(scratch.device(), 0xff, scratch.host.size()));
  place_retrieval(scratch.device(), &r);
  a.fresh = {};  // they are in the store and in the window
  for (const bool drop_tail : {false, true}) {
    if (drop_tail) a.values = {};  // of which there need not be codes
    Array<uint8_t> more_workspace(attend_workspace_bytes(device, with_retrieved(a, r, drop_tail)));
    require(cudaMemset(more_workspace.device(), 0, more_workspace.host.size()));
    const Status status =
        retrieve_step(device, a, r, drop_tail, more_workspace.device(), more_workspace.host.size(), nullptr);
    if (!accept(c, status, "retrieval")) break;
    require(cudaDeviceSynchronize());
    const auto copied = [](auto* from, size_t n) {
      std::vector<std::remove_cvref_t<decltype(*from)>> to(n);
      require(cudaMemcpy(to.data(), from, n * sizeof(*from), cudaMemcpyDeviceToHost));
      return to;
    };
    const std::vector<float> scores = copied(r.scores, size_t(pairs) * r.row_groups * c.n_cells);
    const std::vector<int32_t> chosen = copied(r.cells, size_t(pairs) * c.top);
    std::vector<char> with_chosen = is_exact;
    wrong = 0;
    for (int pair = 0; pair < pairs; pair++) {
      std::vector<float> best(c.n_cells, -INFINITY);
      for (int i = 0; i < r.row_groups * c.n_cells; i++) {
        best[i % c.n_cells] = std::max(best[i % c.n_cells], scores[size_t(pair) * r.row_groups * c.n_cells + i]);
      }
      std::vector<int32_t> got;
      for (int i = 0; i < c.top; i++) {
        const int cell = chosen[size_t(pair) * c.top + i];
        if (cell < 0) continue;
        got.push_back(cell);
        wrong += is_exact[pair * c.n_cells + cell];
        with_chosen[pair * c.n_cells + cell] = 1;
      }
      std::sort(got.begin(), got.end());
      wrong += got != greatest(best, c.top);
    }
    report(c, "cells chosen wrongly", wrong == 0, wrong);
    error = relative_error(output.download(), attention(with_chosen, drop_tail));
    report(c,
           drop_tail ? "attention to retrieved cells alone, relative error"
                     : "attention with retrieved cells, relative error",
           error < c.error(), error);
  }
  require(cudaFreeHost(store));
}

void report(const char* script, const ScriptResult& result) {
  const bool good = result.failed < 0 && result.n_unlike_oldest > 5;
  std::printf("%s exact cells of %s: first other batch %d, unlike the oldest %d\n", good ? "ok  " : "FAIL", script,
              result.failed, result.n_unlike_oldest);
  if (!good) failures++;
}

/// The same cells are exact as on the CPU.
void run_windows(const DeviceInfo& device) {
  OnDevice::device = device;
  report("tokens one by one", token_by_token<OnDevice>({16, 5, 8}));
  report("tokens one by one, which leave one by one", token_by_token<OnDevice>({16, 5, 0}));
  report("prompts", prompts<OnDevice>({16, 5, 8}));
  report("short prompts", prompts<OnDevice>({16, 5, 12}));
  report("drafts", drafts<OnDevice>());
  report("prompts that are judged behind the graph", prompts<OnDevice>({16, 5, 8}, true));
  report("chats", chats<OnDevice>());
  report("chats that are judged behind the graph", chats<OnDevice>(true));
  report("streams", streams<OnDevice>());
  report("streams that are judged behind the graph", streams<OnDevice>(true));
  report("batches that were finished", finished<OnDevice>());
}

/// A prompt's tokens: attended to, kept, coded and put into the window.
void run_prompt(const DeviceInfo& device, const PromptCase& c, int n_tokens) {
  const std::string wrong = PromptCheck<OnDevice>(device, c, n_tokens).run();
  std::printf("%s prompt of %d tokens, D=%d bits %g/%g%s%s: %s\n", wrong.empty() ? "ok  " : "FAIL", n_tokens,
              c.head_dim, c.key_bits, c.value_bits, c.dense ? " dense" : "",
              c.tiles      ? " by tiles"
              : c.restored ? " as written"
                           : "",
              wrong.empty() ? "nothing wrong" : wrong.c_str());
  if (!wrong.empty()) failures++;
}

/// A prompt's rows that are prepared beside the decoding of the other cells are those that are prepared behind it.
void run_early(const DeviceInfo& device, bool dense, int n_cells) {
  constexpr int kDim = 128, kHeads = 8, kTokens = 512, kRounds = 6;
  Random random(11);
  const size_t size = size_t(kHeads) * kDim, n_numbers = size * n_cells;
  Array<float> rows(random.normals(kTokens * size));
  Array<int64_t> cells{size_t{kTokens}};
  for (int i = 0; i < kTokens; i++) cells.host[i] = int64_t(i) * n_cells / kTokens;
  DecodeBothArgs both;
  PromptArgs prompt;
  EncodeArgs& batch = prompt.batch;
  batch.n_kv_heads = kHeads;
  batch.head_dim = kDim;
  batch.n_tokens = kTokens;
  batch.keys = batch.values = rows.device();
  batch.key_token_stride = batch.value_token_stride = size;
  batch.key_head_stride = batch.value_head_stride = kDim;
  batch.cells = cells.upload();
  batch.cells_per_stream = n_cells;
  Array<uint16_t> keys(n_numbers), values(n_numbers), staged(2 * size * kTokens);
  batch.dense = {keys.device(), values.device(), 0, 1, n_cells};
  prompt.staged_keys = staged.device();
  prompt.staged_values = staged.device() + size * kTokens;
  prompt.queries.n_streams = 0;
  prompt.is_restored[0] = prompt.is_restored[1] = !dense;
  OnDevice::Tables tables[2];
  const size_t block = make_format(kDim, 2).block_bytes(), head = block * (n_cells / kBlockCells);
  Array<uint8_t> cache(kHeads * head);  // of both sides
  for (const Kind kind : {Kind::key, Kind::value}) {
    std::vector<HeadCodec> codecs;
    for (int h = 0; h < kHeads; h++) codecs.push_back(random_codec(kind, kDim, 2, dense, random));
    tables[int(kind)] = OnDevice::tables_of(pack_tables(codecs));
    const CodecTables& codec = (kind == Kind::key ? batch.key_codec : batch.value_codec) = tables[int(kind)].view();
    DecodeArgs& d = both.sides[int(kind)];
    d.n_kv_heads = kHeads;
    d.n_cells = n_cells;
    d.codec = codec;
    d.cache = {cache.upload(), kHeads * head, head, block};
    d.is_key = kind == Kind::key;
    d.rows = kind == Kind::key ? batch.dense.keys : batch.dense.values;
    d.restored = !dense;
  }
  cudaStream_t stream = nullptr;
  require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  std::vector<uint16_t> expected[2];
  int wrong = 0;  // sides of rounds
  for (int round = 0; round < kRounds; round++) {
    prompt.early = round > 0;
    for (Array<uint16_t>* side : {&keys, &values}) require(cudaMemset(side->device(), 0xff, n_numbers * 2));
    require(cudaDeviceSynchronize());
    Status status = decode_cells(device, both, stream);
    if (status.ok() && !prompt.early) require(cudaDeviceSynchronize());
    if (status.ok()) status = prepare_prompt(device, prompt, stream);
    if (!status.ok()) {
      std::printf("FAIL rows beside the decoding: %s\n", status.message);
      failures++;
      return;
    }
    require(cudaDeviceSynchronize());
    for (Array<uint16_t>* side : {&keys, &values}) {
      std::vector<uint16_t>& whole = expected[side == &values];
      if (round == 0) whole = side->download();
      wrong += round > 0 && side->download() != whole;
    }
  }
  require(cudaStreamDestroy(stream));
  // What is decoded is zero, as the cache is; a token's row is not.
  const size_t token = size_t(kTokens - 1) * n_cells / kTokens * kDim;
  const bool good = wrong == 0 && (expected[0][0] & 0x7fff) != 0 && (expected[0][token] & 0x7fff) != 0 &&
                    (expected[0][token + kDim] & 0x7fff) == 0;
  std::printf("%s rows beside the decoding of %d cells%s: %d of %d sides differ\n", good ? "ok  " : "FAIL", n_cells,
              dense ? ", dense" : "", wrong, 2 * (kRounds - 1));
  if (!good) failures++;
}

// Layers that are read as rows: cells are encoded and read again, bit for bit as specified. Two of them are in flight.
void run_rows(const DeviceInfo& device, int head_dim, double bits, bool dense) {
  constexpr int kHeads = 2, kCells = 128, kTokens = 100;
  Random random(7);
  std::vector<HeadCodec> codecs;
  for (int h = 0; h < kHeads; h++) codecs.push_back(random_codec(Kind::key, head_dim, bits, dense, random));
  const Format& format = codecs[0].format;
  DeviceTables tables;
  const size_t size = size_t(kHeads) * head_dim, stream = format.block_bytes() * kCells / kBlockCells;
  Array<uint8_t> blocks(stream * kHeads);
  blocks.upload();
  Array<float> rows(random.normals(kTokens * size)), flight(random.normals(2 * size));
  Array<int64_t> cells{size_t{kTokens}}, in_flight(std::vector<int64_t>{5, 127});
  for (int i = 0; i < kTokens; i++) cells.host[i] = (i * 3 + 1) % kCells;
  EncodeArgs args;
  args.n_kv_heads = kHeads;
  args.head_dim = head_dim;
  args.n_tokens = kTokens;
  args.cells = cells.upload();
  args.cells_per_stream = kCells;
  args.keys = rows.upload();
  args.key_token_stride = size;
  args.key_head_stride = size_t(head_dim);
  args.key_cache = {blocks.device(), stream * kHeads, stream, format.block_bytes()};
  Array<int32_t> exact{size_t{kCells}};
  Array<uint16_t> out(kCells * size);
  Status status = tables.upload(pack_row_tables(codecs));
  args.key_codec = tables.view();
  if (status.ok()) status = encode_rows(device, args, nullptr);
  ReadRowsArgs read;
  read.side = side_of(args, Kind::key);
  read.n_cells = kCells;
  read.flight = {2, in_flight.upload(), flight.upload()};
  read.exact = exact.upload();
  read.out = out.upload();
  if (status.ok()) status = read_rows(device, read, nullptr);
  if (status.ok()) require(cudaDeviceSynchronize());
  out.download();
  int wrong = 0;
  const auto expect = [&](int64_t cell, const float* row, bool is_coded) {
    for (int h = 0; h < kHeads; h++) {
      std::vector<float> x(head_dim), y(head_dim), block(format.block_bytes() / sizeof(float) + 1);
      uint8_t* coded = reinterpret_cast<uint8_t*>(block.data());
      for (int d = 0; d < head_dim; d++) x[d] = half_to_float(float_to_half(row[h * head_dim + d]));
      if (is_coded) {
        codecs[h].transform.forward(x.data(), y.data());
        encode_cell(codecs[h], y.data(), coded, 0);
        decode_cell(codecs[h], coded, 0, y.data());
        codecs[h].transform.inverse(y.data(), x.data());
      }
      for (int d = 0; d < head_dim; d++) wrong += out.host[cell * size + h * head_dim + d] != float_to_half(x[d]);
    }
  };
  for (int i = 0; i < kTokens; i++) {
    if (cells.host[i] != 5 && cells.host[i] != 127) expect(cells.host[i], &rows.host[i * size], true);
  }
  for (int i = 0; i < 2; i++) expect(in_flight.host[i], &flight.host[i * size], false);
  const bool good = status.ok() && wrong == 0;
  std::printf("%s rows: D=%d bits %g%s: %s, %d numbers differ\n", good ? "ok  " : "FAIL", head_dim, bits,
              dense ? " dense" : "", status.ok() ? "encoded and read" : status.message, wrong);
  if (!good) failures++;
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;  // for memory checkers
  int n_devices = 0;
  if (const cudaError_t e = cudaGetDeviceCount(&n_devices); e != cudaSuccess || n_devices == 0) {
    std::printf("skipped: there is no CUDA device (%s)\n", cudaGetErrorString(e));
    return 77;
  }
  DeviceInfo device;
  if (const Status s = query_device(0, &device); !s.ok()) {
    std::printf("%s\n", s.message);
    return 1;
  }
  std::printf("compute capability %d, %d multiprocessors, %zu bytes of shared memory a block\n", device.capability,
              device.multiprocessors, device.shared_bytes);
  DeviceInfo small = device;  // takes the kernels for smaller devices
  small.capability = 89;
  run_windows(device);
  for (const FormatCase& f : kFormatCases) {
    if (quick && (f.head_dim == 256 || f.key_width != f.value_width)) continue;
    run(device, {.head_dim = f.head_dim, .key_width = f.key_width, .value_width = f.value_width});
  }
  for (const FormatCase& f : kSmallFormatCases) {
    if (quick) break;
    run(small, {.head_dim = f.head_dim, .key_width = f.key_width, .value_width = f.value_width, .mask = true});
  }
  // Formats of the emulated tests' lists are not all that there are.
  for (const FormatCase& f : {FormatCase{64, 2, 4}, {64, 4, 8}, {256, 2, 4}, {256, 4, 8}}) {
    if (quick) break;
    run(device, {.head_dim = f.head_dim, .key_width = f.key_width, .value_width = f.value_width});
    run(small, {.head_dim = f.head_dim, .key_width = f.key_width, .value_width = f.value_width, .mask = true});
  }
  for (const FormatCase& f : {kBytes, kWide}) {
    for (const AttendCase& c : kAttendCases) {
      if (!quick) run(device, case_of(f, c));
    }
  }
  for (const TileCase& f : kTileCases) {
    run(device, {.head_dim = f.head_dim, .key_width = 0, .value_width = 0, .rates = f.rates});
    if (quick) break;
  }
  DeviceInfo smallest = device;  // of which codewords do not fit into shared memory
  smallest.shared_bytes = 64 << 10;
  run(smallest, {.head_dim = 256, .key_width = 0, .value_width = 0, .mask = true, .rates = {3, 1.25}});
  for (const AttendCase& c : kAttendCases) {
    if (!quick) run(device, case_of(TileCase{64, {3, 1.25}}, c));
  }
  run(device, {.head_dim = 128,
               .key_width = 0,
               .value_width = 0,
               .n_streams = 2,
               .n_tokens = 2,
               .n_cells = 512,
               .dense = true,
               .mask = true,
               .sinks = true,
               .n_window = 24,
               .top = 16,
               .rates = {1.5, 3}});
  if (!quick) {
    run(device, {.head_dim = 128,
                 .key_width = 0,
                 .value_width = 0,
                 .n_cells = 16384,
                 .n_window = 136,
                 .top = 64,
                 .rates = {3, 1.5}});
    run(device, {.head_dim = 128,
                 .key_width = 0,
                 .value_width = 0,
                 .n_streams = 35,
                 .n_cells = 192,
                 .n_window = 20,
                 .rates = {3, 1.5}});
  }
  DeviceInfo narrow = device;  // whose thread blocks take many streams at once
  narrow.multiprocessors = 4;
  if (has_large_tables(device)) {
    for (const int head_dim : {64, 128}) {
      for (const auto& [key, value] : {std::pair(8, 8), {4, 4}, {2, 2}, {2, 4}, {4, 8}}) {
        if (!has_direct(head_dim, key) || (quick && key != value)) continue;
        run(narrow,
            {.head_dim = head_dim, .key_width = key, .value_width = value, .n_streams = 11, .mask = true, .batch = 8});
      }
    }
    run(narrow, {.head_dim = 128,
                 .key_width = 4,
                 .value_width = 4,
                 .n_streams = 7,
                 .n_tokens = 3,
                 .group = 3,
                 .n_cells = 512,
                 .dense = true,
                 .mask = true,
                 .sinks = true,
                 .n_window = 24,
                 .batch = 4});
  }
  run(device, {.head_dim = 128,
               .key_width = 4,
               .value_width = 4,
               .n_streams = 2,
               .n_tokens = 1,
               .n_cells = 512,
               .dense = true,
               .mask = true,
               .sinks = true,
               .n_window = 24,
               .top = 16});
  run(device, {.head_dim = 64,
               .key_width = 2,
               .value_width = 4,
               .n_streams = 2,
               .n_tokens = 5,
               .group = 2,
               .mask = true,
               .softcap = 3,
               .n_window = 9,
               .top = 33});
  if (!quick) {
    for (const int group : {1, 2, 4, 8}) {
      run(device, {.head_dim = 128,
                   .key_width = 4,
                   .value_width = 4,
                   .n_tokens = 8,
                   .group = group,
                   .n_cells = 1024,
                   .dense = group == 2,
                   .mask = true,
                   .n_window = 136,
                   .top = 64});
    }
    run(device, {.head_dim = 128, .key_width = 8, .value_width = 8, .n_streams = 35, .n_cells = 192, .n_window = 20});
    run(device, {.head_dim = 128, .key_width = 4, .value_width = 4, .n_cells = 16384, .n_window = 136, .top = 64});
  }
  for (const PromptCase& c : kPromptCases) {
    run_prompt(device, c, 45);
    if (!quick) run_prompt(device, c, 300);
  }
  for (const bool dense : {false, true}) run_early(device, dense, quick ? 1024 : 16384);
  for (const int head_dim : {32, 48, 64, 80, 96, 112, 160, 192, 256, 512}) {
    run_rows(device, head_dim, head_dim % 64 == 0 ? 2 : 4, head_dim % 96 == 0 || head_dim == 256);
    if (quick) continue;
    for (const double bits : {16.0, 3.0, 1.5, 1.25, 1.0}) run_rows(device, head_dim, bits, false);
  }
  std::printf(failures == 0 ? "all good\n" : "%d FAILURES\n", failures);
  return failures != 0;
}
