// Encoding, also of what leaves the window, and transforms: the CUDA kernel's own source, emulated; codes and scales
// bit for bit the codec's.
#define THIMBLE_SIMT_HOST
#include <gtest/gtest.h>

#include <set>

#include "cuda/encode/decode_kernel.h"
#include "cuda/encode/encode_kernel.h"
#include "cuda/encode/transform_kernel.h"
#include "cuda/encode/window_kernel.h"
#include "fixture.h"
#include "support/window_vectors.h"
#include "test_window.h"

namespace thimble::cuda {
namespace {

/// With the kernel's form for few tokens a thread block or, where `tokens_per_block` is 32, that for many.
template <int D, int MaxTokensPerBlock = 8>
void check(double key_bits, double value_bits, bool dense, int n_tokens, int tokens_per_block, bool tiles = false) {
  constexpr int kHeads = 2, kStreams = 2, kCells = 192, kCapacity = 5;
  Random random(7);
  std::vector<HeadCodec> key_codecs, value_codecs;
  for (int h = 0; h < kHeads; h++) {
    key_codecs.push_back(random_codec(Kind::key, D, key_bits, dense, random));
    value_codecs.push_back(random_codec(Kind::value, D, value_bits, dense, random));
    for (HeadCodec* codec :
         {&key_codecs.back(), &value_codecs.back()}) {  // two codewords are equal: the first is taken
      for (int d = 0; d < D; d++) {
        codec->codebook.words[size_t(d) * kCodewords + 77] = codec->codebook.words[size_t(d) * kCodewords + 5];
      }
      codec->derive_tables();
    }
  }
  const HostTables key_tables = pack_tables(key_codecs, tiles), value_tables = pack_tables(value_codecs, tiles);
  const size_t key_block = key_codecs[0].format.block_bytes(), value_block = value_codecs[0].format.block_bytes();
  const int n_blocks = kCells / kBlockCells;

  EncodeArgs a;
  a.n_kv_heads = kHeads;
  a.head_dim = D;
  a.n_tokens = n_tokens;
  a.tokens_per_block = tokens_per_block;
  std::vector<float> keys = random.normals(size_t(n_tokens) * kHeads * D), values = random.normals(keys.size());
  std::fill_n(keys.begin(), D, 0.0f);  // what has no direction
  values[D + 3] = INFINITY;
  a.keys = keys.data();
  a.values = values.data();
  a.key_token_stride = a.value_token_stride = kHeads * D;
  a.key_head_stride = a.value_head_stride = D;
  std::vector<int64_t> cells(n_tokens);
  std::vector<int32_t> slots(n_tokens, -1);
  for (int i = 0; i < n_tokens; i++) cells[i] = (i % kStreams) * kCells + (i * 37) % kCells;
  for (int i = 0; i < std::min(n_tokens, kCapacity); i++) slots[i] = kCapacity - 1 - i;
  a.cells = cells.data();
  a.cells_per_stream = kCells;
  std::vector<uint8_t> key_cache(kStreams * kHeads * n_blocks * key_block);
  std::vector<uint8_t> value_cache(kStreams * kHeads * n_blocks * value_block);
  a.key_cache = {key_cache.data(), kHeads * n_blocks * key_block, n_blocks * key_block, key_block};
  a.value_cache = {value_cache.data(), n_blocks * kHeads * value_block, value_block, kHeads * value_block};
  a.key_codec = key_tables.view();
  a.value_codec = value_tables.view();
  std::vector<uint16_t> window_keys(kStreams * kHeads * kCapacity * D), window_values(window_keys.size());
  a.window = {window_keys.data(), window_values.data(), slots.data(), kCapacity};
  constexpr int kDenseCells = 128;  // of the second stream only
  std::vector<uint16_t> dense_keys(kHeads * kDenseCells * D, 0x7e00), dense_values(dense_keys);
  const std::vector<float> shift = random.normals(kHeads * D);  // of values
  a.dense = {dense_keys.data(), dense_values.data(), 1, 1, kDenseCells, nullptr, shift.data()};

  using Kernel = EncodeKernel<D, MaxTokensPerBlock>;
  const int blocks = (n_tokens + tokens_per_block - 1) / tokens_per_block;
  simt::Machine::launch({blocks, 2 * kHeads}, Kernel::kThreads, Kernel::kSharedBytes, [&] { Kernel::run(a); });

  std::vector<float> y(D);
  const auto check_vector = [&](const HeadCodec& codec, const float* x, const uint8_t* block, int cell,
                                const uint16_t* exact) {
    for (int d = 0; exact && d < D; d++) EXPECT_EQ(exact[d], float_to_half(x[d]));
    codec.transform.forward(x, y.data());
    const Format& format = codec.format;
    std::vector<uint8_t> expected(size_t(format.vector_bytes())), got(expected.size()), cpu(format.block_bytes());
    const uint16_t scale = encode_vector(codec, y.data(), expected.data());
    std::memcpy(&expected[format.n_subspaces()], &scale, 2);
    block_from_cuda(format, codec.kind, block, cpu.data(), tiles);
    copy_cell_out(format, codec.kind, cpu.data(), cell, got.data());
    EXPECT_EQ(got, expected);
  };
  for (int i = 0; i < n_tokens; i++) {
    const int stream = int(cells[i]) / kCells, cell = int(cells[i]) % kCells;
    for (int h = 0; h < kHeads; h++) {
      const size_t at = (size_t(i) * kHeads + h) * D;
      const size_t row = ((stream * kHeads + h) * kCapacity + slots[i]) * size_t(D);
      check_vector(key_codecs[h], &keys[at],
                   &key_cache[((stream * kHeads + h) * n_blocks + cell / kBlockCells) * key_block], cell % kBlockCells,
                   slots[i] < 0 ? nullptr : &window_keys[row]);
      check_vector(value_codecs[h], &values[at],
                   &value_cache[((stream * n_blocks + cell / kBlockCells) * kHeads + h) * value_block],
                   cell % kBlockCells, slots[i] < 0 ? nullptr : &window_values[row]);
      if (stream == 1 && cell < kDenseCells && std::isfinite(values[at + 3])) {
        const size_t dense = (h * kDenseCells + cell) * size_t(D);
        key_codecs[h].transform.forward(&keys[at], y.data());
        for (int d = 0; d < D; d++) EXPECT_EQ(dense_keys[dense + d], float_to_half(y[d]));
        value_codecs[h].transform.forward(&values[at], y.data());
        for (int d = 0; d < D; d++) EXPECT_EQ(dense_values[dense + d], float_to_half(y[d] + shift[h * D + d]));
      }
    }
  }

  // Rows that leave are coded where they belong by now, as f16: here, 64 cells on.
  std::vector<int64_t> displaced(n_tokens, -1);
  for (int i = 1; i < n_tokens; i++) {
    if (slots[i] >= 0) displaced[i] = cells[i] / kCells * kCells + (cells[i] % kCells + 64) % kCells;
  }
  EncodeArgs layer = a;
  layer.keys = layer.values = nullptr;
  layer.cells = nullptr;
  layer.dense = {};
  EncodeArgs other = layer;  // of another head size: another kernel's
  other.head_dim = 2 * D;
  const std::vector<EncodeArgs> layers{other, layer};
  std::fill(key_cache.begin(), key_cache.end(), uint8_t(0));
  std::fill(value_cache.begin(), value_cache.end(), uint8_t(0));
  LeaveArgs leave;
  leave.layers = layers.data();
  leave.n_layers = 2;
  leave.n_kv_heads = kHeads + 1;  // another layer's
  leave.n_tokens = n_tokens;
  int n_leaving[2] = {n_tokens, 0};
  WindowBooks books{};
  books.n_batches = 1;
  LayerWindow window;
  window.leaving_cells = displaced.data();
  window.leaving_slots = slots.data();
  window.n_leaving = n_leaving;
  window.books = &books;
  const std::vector<LayerWindow> windows{{}, window};
  leave.windows = windows.data();
  leave.tokens_per_block = tokens_per_block;
  simt::Machine::launch({blocks, 2 * 2 * leave.n_kv_heads}, Kernel::kThreads, Kernel::kSharedBytes,
                        [&] { Kernel::run_leaving(leave); });
  std::vector<float> x(D);
  for (int i = 0; i < n_tokens; i++) {
    if (displaced[i] < 0) continue;
    const int stream = int(displaced[i]) / kCells, cell = int(displaced[i]) % kCells;
    for (int h = 0; h < kHeads; h++) {
      const size_t at = (size_t(i) * kHeads + h) * D;
      for (int d = 0; d < D; d++) x[d] = half_to_float(float_to_half(keys[at + d]));
      check_vector(key_codecs[h], x.data(),
                   &key_cache[((stream * kHeads + h) * n_blocks + cell / kBlockCells) * key_block], cell % kBlockCells,
                   nullptr);
      for (int d = 0; d < D; d++) x[d] = half_to_float(float_to_half(values[at + d]));
      check_vector(value_codecs[h], x.data(),
                   &value_cache[((stream * n_blocks + cell / kBlockCells) * kHeads + h) * value_block],
                   cell % kBlockCells, nullptr);
    }
  }

  // Rows of the window for dense attention.
  std::vector<int32_t> window_cells(kStreams * kCapacity, -1);
  window_cells[1] = 3;
  window_cells[kCapacity + 2] = kDenseCells - 1;
  window_cells[kCapacity + 3] = kDenseCells;  // not among these
  window_cells[kCapacity + 4] = 7;
  std::fill(dense_keys.begin(), dense_keys.end(), uint16_t(0x1234));
  for (uint16_t& v : window_keys) v = float_to_half(random.normal());
  EncodeArgs rows = layer;
  rows.from_window = true;
  rows.window_cells = window_cells.data();
  rows.n_tokens = kStreams * kCapacity;
  rows.dense = a.dense;
  const std::vector<uint8_t> coded = key_cache;
  simt::Machine::launch({(rows.n_tokens + tokens_per_block - 1) / tokens_per_block, 2 * kHeads}, Kernel::kThreads,
                        Kernel::kSharedBytes, [&] { Kernel::run(rows); });
  EXPECT_EQ(key_cache, coded);
  for (int h = 0; h < kHeads; h++) {
    for (int cell = 0; cell < kDenseCells; cell++) {
      const int slot = cell == 7 ? 4 : cell == kDenseCells - 1 ? 2 : -1;
      const uint16_t* got = &dense_keys[(h * kDenseCells + cell) * size_t(D)];
      if (slot < 0) {
        EXPECT_EQ(got[5], 0x1234);
        continue;
      }
      for (int d = 0; d < D; d++) {
        x[d] = half_to_float(window_keys[((kHeads + h) * kCapacity + slot) * size_t(D) + d]);
      }
      key_codecs[h].transform.forward(x.data(), y.data());
      for (int d = 0; d < D; d++) EXPECT_EQ(got[d], float_to_half(y[d]));
    }
  }
}

template <int D>
void check_transform(bool dense) {
  constexpr int kHeads = 2, kGroup = 3, kStreams = 2, kTokens = 7, kAll = kHeads * kGroup;
  Random random(11);
  std::vector<HeadCodec> codecs;
  for (int h = 0; h < kHeads; h++) codecs.push_back(random_codec(Kind::value, D, 2, dense, random));
  const HostTables tables = pack_tables(codecs);
  // As llama.cpp permutes queries: heads outside tokens.
  const std::vector<float> in = random.normals(size_t(kStreams) * kAll * kTokens * D);
  std::vector<float> out(in.size(), NAN), expected(D);
  TransformArgs a;
  a.n_streams = kStreams;
  a.n_tokens = kTokens;
  a.n_kv_heads = kHeads;
  a.group = kGroup;
  a.head_dim = D;
  a.in = in.data();
  a.token_stride = D;
  a.head_stride = kTokens * D;
  a.stream_stride = kAll * kTokens * D;
  a.codec = tables.view();
  a.add_mean = true;
  a.out = out.data();
  using Kernel = TransformKernel<D>;
  const int blocks = (kStreams * kTokens * kGroup + kTransformRows - 1) / kTransformRows;
  simt::Machine::launch({blocks, kHeads}, D, Kernel::kSharedBytes, [&] { Kernel::run(a); });
  for (int s = 0; s < kStreams; s++) {
    for (int t = 0; t < kTokens; t++) {
      for (int h = 0; h < kAll; h++) {
        codecs[h / kGroup].transform.inverse(&in[((s * kAll + h) * kTokens + t) * size_t(D)], expected.data());
        for (int d = 0; d < D; d++) {
          EXPECT_NEAR(out[((s * kTokens + t) * kAll + h) * size_t(D) + d], expected[d], 1e-4);
        }
      }
    }
  }
}

template <int D, int Width>
void check_decode(double bits) {
  constexpr int kHeads = 2, kStreams = 2, kCells = 192;
  Random random(3);
  for (Kind kind : {Kind::key, Kind::value}) {
    std::vector<HeadCodec> codecs;
    for (int h = 0; h < kHeads; h++) codecs.push_back(random_codec(kind, D, bits, false, random));
    const HostTables tables = pack_tables(codecs, Width == 0);
    const std::vector<float> shift = random.normals(kHeads * D);
    const bool is_shifted = kind == Kind::value;
    std::vector<uint8_t> cache;
    std::vector<uint16_t> expected;
    for (int i = 0; i < kStreams * kHeads; i++) {
      const CodedHead head = random_head(codecs[i % kHeads], kCells, random, Width == 0);
      cache.insert(cache.end(), head.blocks.begin(), head.blocks.end());
      for (size_t k = 0; k < head.decoded.size(); k++) {
        const float x = head.decoded[k];
        expected.push_back(float_to_half(is_shifted ? x + shift[i % kHeads * D + k % D] : x));
      }
    }
    std::vector<uint16_t> rows(expected.size(), 0x7e00);
    DecodeArgs a;
    a.n_streams = kStreams;
    a.n_kv_heads = kHeads;
    a.n_cells = kCells;
    a.codec = tables.view();
    const size_t block = a.codec.block_bytes(), head = block * (kCells / kBlockCells);
    a.cache = {cache.data(), kHeads * head, head, block};
    a.is_key = kind == Kind::key;
    a.rows = rows.data();
    if (is_shifted) a.shift = shift.data();
    using Kernel = DecodeKernel<D, Width, false>;
    const int groups = (kCells / kBlockCells + Kernel::kBlocks - 1) / Kernel::kBlocks;
    simt::Machine::launch({groups, kStreams * kHeads}, Kernel::kThreads, Kernel::kSharedBytes,
                          [&] { is_shifted ? DecodeKernel<D, Width, true>::run(a) : Kernel::run(a); });
    EXPECT_EQ(rows, expected) << D << " at " << bits;
  }
}

TEST(CudaDecode, EqualsTheCodecBitForBit) {
  check_decode<64, 2>(4);
  check_decode<128, 8>(1);
  check_decode<256, 4>(2);
  check_decode<64, 0>(1.25);
  check_decode<128, 0>(3);
  check_decode<128, 0>(4);
  check_decode<256, 0>(1.5);
}

// Rows as the model wrote them, to what two roundings to f16 make: less than 2^-11 of a row's norm in a component, and
// a half of its own ulp.
template <int D, int Width>
void check_restored(double bits) {
  constexpr int kHeads = 2, kStreams = 2, kCells = 576 - 128 * (D / 128);  // not a multiple of a thread block's
  Random random(4);
  for (Kind kind : {Kind::key, Kind::value}) {
    std::vector<HeadCodec> codecs;
    for (int h = 0; h < kHeads; h++) codecs.push_back(random_codec(kind, D, bits, false, random));
    const HostTables tables = pack_tables(codecs);
    ASSERT_TRUE(can_restore(tables.view()));
    std::vector<uint8_t> cache;
    std::vector<float> expected;
    for (int i = 0; i < kStreams * kHeads; i++) {
      const CodedHead head = random_head(codecs[i % kHeads], kCells, random);
      cache.insert(cache.end(), head.blocks.begin(), head.blocks.end());
      std::vector<float> row(D);
      for (int cell = 0; cell < kCells; cell++) {
        codecs[i % kHeads].transform.inverse(&head.decoded[size_t(cell) * D], row.data());
        expected.insert(expected.end(), row.begin(), row.end());
      }
    }
    std::vector<uint16_t> rows(expected.size(), 0x7e00);
    DecodeArgs a;
    a.n_streams = kStreams;
    a.n_kv_heads = kHeads;
    a.n_cells = kCells;
    a.codec = tables.view();
    const size_t block = a.codec.block_bytes(), head = block * (kCells / kBlockCells);
    a.cache = {cache.data(), kHeads * head, head, block};
    a.is_key = kind == Kind::key;
    a.rows = rows.data();
    a.restored = true;
    using Kernel = RestoreKernel<D, Width>;
    const int groups = (kCells / kBlockCells + Kernel::kBlocks - 1) / Kernel::kBlocks;
    simt::Machine::launch({groups, kStreams * kHeads}, Kernel::kThreads, Kernel::kSharedBytes, [&] { Kernel::run(a); });
    for (size_t first = 0; first < rows.size(); first += D) {
      double norm = 0;
      for (int d = 0; d < D; d++) norm += double(expected[first + d]) * expected[first + d];
      const double bound = std::sqrt(norm) * 0x1p-11;
      for (int d = 0; d < D; d++) {
        const float x = expected[first + d];
        ASSERT_NEAR(half_to_float(rows[first + d]), x, bound + std::abs(x) * 0x1p-11)
            << D << " at " << bits << ", row " << first / D << ", component " << d;
      }
    }
  }
}

TEST(CudaDecode, RestoresWhatTheModelWrote) {
  check_restored<64, 2>(4);
  check_restored<64, 8>(1);
  check_restored<128, 2>(4);
  check_restored<128, 4>(2);
  check_restored<128, 8>(1);
  check_restored<256, 4>(2);
  check_restored<256, 2>(4);
}

// With them a transformed query's product with a transformed key is that of the vectors themselves, and weights that do
// not sum up to 1, as with sinks, weigh the values' means as they do the values.
TEST(CudaTransform, RowsWithTheirMeans) {
  constexpr int kDim = 64;
  Random random(5);
  const auto product = [](const std::vector<float>& a, const std::vector<float>& b) {
    double sum = 0;
    for (int d = 0; d < kDim; d++) sum += double(a[d]) * b[d];
    return sum;
  };
  for (Kind kind : {Kind::key, Kind::value}) {
    std::vector<HeadCodec> codecs;
    for (int h = 0; h < 2; h++) codecs.push_back(random_codec(kind, kDim, 2, /*dense=*/true, random));
    const std::vector<float> means = transformed_means(codecs);
    ASSERT_EQ(means.size(), 2u * kDim);
    const std::vector<float> x = random.normals(kDim), q = random.normals(kDim);
    std::vector<float> y(kDim), turned(kDim), back(kDim);
    const Transform& transform = codecs[1].transform;
    transform.forward(x.data(), y.data());
    for (int d = 0; d < kDim; d++) y[d] += means[kDim + d];
    transform.query(q.data(), turned.data());
    if (kind == Kind::key) {
      EXPECT_NEAR(product(turned, y), product(q, x), 1e-3);
    } else {
      for (float& v : y) v *= 0.25f;
      transform.output(y.data(), /*weight=*/0, back.data());
      for (int d = 0; d < kDim; d++) EXPECT_NEAR(back[d], 0.25f * x[d], 1e-3);
    }
  }
  EXPECT_TRUE(transformed_means({make_uncalibrated_codec(Kind::key, make_format(kDim, 2))}).empty());
}

TEST(CudaTransform, Rows) {
  for (bool dense : {false, true}) {
    check_transform<64>(dense);
    check_transform<128>(dense);
    check_transform<256>(dense);
  }
}

TEST(CudaEncode, EqualsTheCodecBitForBit) {
  check<64>(4, 2, false, 9, 4);
  check<64>(2, 1, true, 2, 1);
  check<128>(2, 2, false, 11, 8);
  check<128>(1, 4, true, 3, 2);
  check<256>(2, 1, false, 2, 1);
  check<64>(3, 1.5, true, 5, 4, /*tiles=*/true);
  check<128>(1.25, 3, false, 3, 2, /*tiles=*/true);
  check<128>(4, 1, false, 2, 1, /*tiles=*/true);
  check<256>(1.5, 1.25, false, 2, 1, /*tiles=*/true);
}

TEST(CudaEncode, EqualsTheCodecBitForBitOfManyTokens) {
  check<64, 32>(4, 2, false, 33, 32);
  check<64, 32>(2, 1, true, 70, 32);
  check<128, 32>(2, 2, false, 31, 32);
  check<128, 32>(1, 4, true, 3, 32);
  check<256, 32>(2, 1, false, 34, 32);
  check<128, 32>(1.25, 3, true, 35, 32, /*tiles=*/true);
}

// The scripts that every implementation is held to: those without a judge (judge_test.cpp), in which no states are
// loaded.
TEST(CudaWindow, Vectors) {
  int n_scripts = 0, n_checked = 0;
  for (const WindowScript& script : read_window_scripts(THIMBLE_TEST_DATA "/window_vectors.txt")) {
    if (!script.name.ends_with("_oldest_first") || script.name.starts_with("loaded")) continue;
    n_scripts++;
    const int n_cells = int(script.cells_per_stream);
    TestWindow window(script.size, script.slots, n_cells, script.n_streams);
    WindowOwners owners;
    for (const WindowScript::Step& step : script.steps) {
      const std::vector<int64_t> cells = owners.take(step);
      if (step.what == WindowScript::Step::remove) continue;
      std::vector<uint16_t> mask;
      for (int64_t token : cells) {
        for (int64_t cell = token / n_cells * n_cells, i = 0; i < n_cells; i++) {
          mask.push_back(owners.sees(token, cell + i) ? 0 : 0xfc00);
        }
      }
      const std::vector<int64_t> before = window.exact();
      window.update(cells, mask);
      const std::vector<int64_t> exact = window.exact();
      if (int(cells.size()) <= kMaxTokens) {
        ASSERT_EQ(exact, step.exact) << script.name << ", batch " << window.books[0].n_batches;
        n_checked++;
      }
      // Cells' bits and tokens' rows are those of the books; what is exact no longer, nor written again, is to be
      // coded.
      for (int64_t cell = 0; cell < n_cells * script.n_streams; cell++) {
        ASSERT_EQ(window.hidden[cell / 32] >> cell % 32 & 1, uint32_t(std::count(exact.begin(), exact.end(), cell)));
      }
      for (size_t i = 0; i < cells.size(); i++) {
        const int slot = window.token_slots[i];
        if (slot < 0) continue;
        const size_t row = size_t(cells[i] / n_cells) * window.a.capacity + slot;
        EXPECT_EQ(window.window[row], cells[i] % n_cells);
        EXPECT_EQ(window.tokens[row], int(i));
      }
      std::multiset<int64_t> left, expected;
      for (int i = 0; i < window.n_left(); i++) left.insert(window.leaving_cells[i]);
      for (int64_t cell : before) {
        const bool stays = std::count(exact.begin(), exact.end(), cell) > 0;
        const bool again = std::count(cells.begin(), cells.end(), cell) > 0;
        if (!stays && !again) expected.insert(cell);
      }
      for (int64_t cell : cells) left.erase(cell);
      EXPECT_EQ(left, expected) << script.name;
    }
  }
  EXPECT_EQ(n_scripts, 8);
  EXPECT_GT(n_checked, 250);
}

}  // namespace
}  // namespace thimble::cuda
