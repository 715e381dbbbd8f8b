// Scores, top-k, gathering and tile decode: the CUDA kernels' own source, emulated, against the specification.
#define THIMBLE_SIMT_HOST
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "cuda/attend_kernel.h"
#include "cuda/decode_kernel.h"
#include "cuda/retrieve_kernel.h"
#include "cuda_fixture.h"

namespace thimble::cuda {
namespace {

void run_choose(const RetrieveArgs& a) {
  simt::Machine::launch(1, a.n_streams * a.n_kv_heads, RetrieveKernel::kThreads, RetrieveKernel::kSharedBytes,
                        [&] { RetrieveKernel::choose(a); });
}

TEST(CudaRetrieve, ChoosesTheGreatest) {
  Random random(3);
  for (const int n_cells : {64, 1088}) {
    for (const int top : {1, 7, 64}) {
      constexpr int kPairs = 2;
      std::vector<float> scores(kPairs * n_cells);
      for (float& s : scores) s = std::round(4 * random.normal()) / 4;  // many are equal
      for (int i = 0; i < n_cells; i += 3) scores[i] = -INFINITY;
      std::vector<uint32_t> hidden(n_cells / 32), all_hidden(kPairs * hidden.size());
      hidden[1] = 0x10;
      for (int p = 0; p < kPairs; p++) scores[p * n_cells + 36] = -INFINITY;
      std::vector<int32_t> cells(kPairs * top, 99);
      RetrieveArgs a;
      a.n_kv_heads = kPairs;
      a.n_cells = n_cells;
      a.top = top;
      a.scores = scores.data();
      a.hidden = hidden.data();
      a.cells = cells.data();
      a.all_hidden = all_hidden.data();
      run_choose(a);
      for (int p = 0; p < kPairs; p++) {
        const float* s = &scores[p * n_cells];
        std::vector<int> order(n_cells);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [=](int x, int y) { return s[x] > s[y]; });
        std::vector<int32_t> expected;
        for (int i = 0; i < std::min(top, n_cells) && s[order[i]] > -INFINITY; i++) expected.push_back(order[i]);
        std::sort(expected.begin(), expected.end());
        std::vector<int32_t> got(&cells[p * top], &cells[p * top] + expected.size());
        // Greater ones and equal ones are interleaved in cell order only among themselves.
        std::sort(got.begin(), got.end());
        EXPECT_EQ(got, expected);
        for (size_t i = expected.size(); i < size_t(top); i++) EXPECT_EQ(cells[p * top + i], -1);
        for (int c = 0; c < n_cells; c++) {
          const bool bit = all_hidden[(p * n_cells + c) / 32] >> c % 32 & 1;
          EXPECT_EQ(bit, c == 36 || std::binary_search(expected.begin(), expected.end(), c));
        }
      }
    }
  }
}

TEST(CudaRetrieve, GathersRows) {
  constexpr int kPairs = 2, kTop = 5, kCells = 64, kDim = 64;
  Random random(5);
  std::vector<uint16_t> keys(kPairs * kCells * kDim), values(keys.size()), out_keys(kPairs * kTop * kDim),
      out_values(out_keys.size());
  for (uint16_t& v : keys) v = uint16_t(random.below(60000));
  for (uint16_t& v : values) v = uint16_t(random.below(60000));
  std::vector<int32_t> cells{3, 9, 63, -1, 0, 1, 2, 3, 4, 5};
  RetrieveArgs a;
  a.n_kv_heads = kPairs;
  a.head_dim = kDim;
  a.top = kTop;
  a.store_keys = keys.data();
  a.store_values = values.data();
  a.store_cells = kCells;
  a.cells = cells.data();
  a.keys = out_keys.data();
  a.values = out_values.data();
  simt::Machine::launch(2, kPairs, RetrieveKernel::kThreads, 0, [&] { RetrieveKernel::gather(a); });
  for (int i = 0; i < kPairs * kTop; i++) {
    if (cells[i] < 0) continue;
    const size_t from = (size_t(i / kTop) * kCells + cells[i]) * kDim;
    for (int d = 0; d < kDim; d++) {
      EXPECT_EQ(out_keys[i * kDim + d], keys[from + d]);
      EXPECT_EQ(out_values[i * kDim + d], values[from + d]);
    }
  }
}

TEST(CudaRetrieve, ScoresCells) {
  using S = AttendShape<64, 4, 4, true>;
  constexpr int kStreams = 2, kHeads = 2, kGroup = 3, kCells = 64 * 3, kDim = 64;
  Random random(6);
  std::vector<HeadCodec> codecs;
  for (int h = 0; h < kHeads; h++) codecs.push_back(random_codec(Kind::key, kDim, 2, false, random));
  const HostTables tables = pack_tables(codecs);
  std::vector<CodedHead> heads;
  std::vector<uint8_t> cache;
  for (int i = 0; i < kStreams * kHeads; i++) {
    heads.push_back(random_head(codecs[i % kHeads], kCells, random));
    cache.insert(cache.end(), heads.back().blocks.begin(), heads.back().blocks.end());
  }
  const std::vector<float> queries = random.normals(kStreams * kHeads * kGroup * kDim);
  std::vector<uint32_t> hidden(kStreams * kCells / 32);
  hidden[2] = 1u << 5;
  AttendArgs a;
  a.n_streams = kStreams;
  a.n_kv_heads = kHeads;
  a.group = kGroup;
  a.head_dim = kDim;
  a.n_cells = kCells;
  a.n_splits = 2;
  a.keys = {cache.data(), kHeads * (kCells / 64) * size_t(S::kKeyBlock), (kCells / 64) * size_t(S::kKeyBlock),
            S::kKeyBlock};
  a.key_codec = a.value_codec = tables.view();
  a.queries = queries.data();
  a.query_head_stride = kDim;
  a.query_token_stride = a.query_stream_stride = kHeads * kGroup * kDim;
  a.scale = 0.2f;
  a.hidden = hidden.data();
  a.hidden_stream_stride = kCells / 32;
  std::vector<float> scores(kStreams * kHeads * kCells, NAN);
  simt::Machine::launch(3, kHeads, S::kThreads, S::kSharedBytes, [&] { AttendKernel<S>::score(a, scores.data()); });
  for (int i = 0; i < kStreams * kHeads; i++) {
    for (int cell = 0; cell < kCells; cell++) {
      double best = -INFINITY;
      for (int r = 0; r < kGroup; r++) {
        double x = 0;
        std::vector<float> q(kDim);
        codecs[i % kHeads].transform.query(&queries[(i * kGroup + r) * kDim], q.data());
        for (int d = 0; d < kDim; d++) x += q[d] * heads[i].decoded[size_t(cell) * kDim + d];
        best = std::max(best, x * 0.2 * 1.44269504);
      }
      if (i < kHeads && cell == 69) best = -INFINITY;
      const float got = scores[i * kCells + cell];
      if (best == -INFINITY) {
        EXPECT_EQ(got, -INFINITY);
      } else {
        EXPECT_NEAR(got, best, 5e-3);
      }
    }
  }
}

template <int D, int W>
void check_decode(Kind kind) {
  constexpr int kHeads = 2, kCells = 128;
  Random random(9);
  std::vector<HeadCodec> codecs;
  std::vector<CodedHead> heads;
  std::vector<uint8_t> cache;
  for (int h = 0; h < kHeads; h++) {
    codecs.push_back(random_codec(kind, D, 8.0 / W, false, random));
    heads.push_back(random_head(codecs[h], kCells, random));
    cache.insert(cache.end(), heads[h].blocks.begin(), heads[h].blocks.end());
  }
  const HostTables tables = pack_tables(codecs);
  std::vector<uint16_t> rows(kHeads * kCells * D);
  DecodeArgs a;
  a.n_kv_heads = kHeads;
  a.n_cells = kCells;
  a.codec = tables.view();
  a.cache = {cache.data(), 0, 2 * a.codec.block_bytes(), a.codec.block_bytes()};
  a.is_key = kind == Kind::key;
  a.rows = rows.data();
  simt::Machine::launch(kCells / 64, kHeads, 256, 0, [&] { DecodeKernel<D, W>::run(a); });
  for (int i = 0; i < kHeads * kCells * D; i++) {
    EXPECT_EQ(rows[i], float_to_half(heads[i / D / kCells].decoded[i % (kCells * D)]));
  }
}

TEST(CudaDecode, EqualsTheCodec) {
  check_decode<64, 4>(Kind::key);
  check_decode<64, 2>(Kind::value);
  check_decode<128, 8>(Kind::value);
  check_decode<256, 2>(Kind::key);
}

}  // namespace
}  // namespace thimble::cuda
