// Top-k, gathering and tile decode: the CUDA kernels' own source, emulated, against the specification.
#define THIMBLE_SIMT_HOST
#include <gtest/gtest.h>

#include <algorithm>

#include "cuda/encode/decode_kernel.h"
#include "cuda/retrieve/kernel.h"
#include "fixture.h"

namespace thimble::cuda {
namespace {

void run_choose(const RetrieveArgs& a) {
  simt::Machine::launch({1, a.n_streams * a.n_kv_heads}, RetrieveKernel::kThreads, RetrieveKernel::kSharedBytes, [&] {
    a.row_groups == 1 ? RetrieveKernel::choose<true>(a) : RetrieveKernel::choose<false>(a);
  });
}

// Every way through the kernel: fewer and more blocks than cells to choose, many equals, more blocks than its lists
// hold.
struct Choice {
  int n_cells, top, row_groups;
  float step;  // scores are multiples of it: how many are equal
};

void check_choice(const Choice& c) {
  SCOPED_TRACE(testing::Message() << c.n_cells << " cells, top " << c.top << ", " << c.row_groups << " row groups, "
                                  << c.step);
  constexpr int kPairs = 2;
  Random random(3);
  const int n_blocks = c.n_cells / kBlockCells;
  std::vector<float> scores(size_t(kPairs) * c.row_groups * c.n_cells),
      block_maxima(scores.size() / kBlockCells, -INFINITY);
  for (size_t i = 0; i < scores.size(); i++) {
    const int cell = int(i % c.n_cells);
    scores[i] = cell % 3 == 0 || cell == 37 ? -INFINITY : std::round(random.normal() / c.step) * c.step;
    block_maxima[i / kBlockCells] = std::max(block_maxima[i / kBlockCells], scores[i]);
  }
  std::vector<uint32_t> all_hidden(size_t(kPairs) * c.n_cells / 32);
  for (int p = 0; p < kPairs; p++) all_hidden[p * (c.n_cells / 32) + 1] = 1u << 5;
  std::vector<int32_t> cells(size_t(kPairs) * c.top, 99);
  RetrieveArgs a;
  a.n_kv_heads = kPairs;
  a.n_cells = c.n_cells;
  a.row_groups = c.row_groups;
  a.top = c.top;
  a.scores = scores.data();
  a.block_maxima = block_maxima.data();
  a.all_hidden = all_hidden.data();
  a.cells = cells.data();
  run_choose(a);
  for (int p = 0; p < kPairs; p++) {
    std::vector<float> best(c.n_cells, -INFINITY);
    for (int r = 0; r < c.row_groups; r++) {
      for (int i = 0; i < c.n_cells; i++) {
        best[i] = std::max(best[i], scores[(size_t(p) * c.row_groups + r) * c.n_cells + i]);
      }
    }
    const std::vector<int32_t> expected = greatest(best, c.top);
    const std::vector<int32_t> got(&cells[p * c.top], &cells[p * c.top] + expected.size());
    EXPECT_EQ(got, expected);
    for (size_t i = expected.size(); i < size_t(c.top); i++) EXPECT_EQ(cells[p * c.top + i], -1);
    for (int i = 0; i < c.n_cells; i++) {
      const bool bit = all_hidden[(size_t(p) * n_blocks * 64 + i) / 32] >> i % 32 & 1;
      ASSERT_EQ(bit, i == 37 || std::binary_search(expected.begin(), expected.end(), i)) << i;
    }
  }
}

TEST(CudaRetrieve, ChoosesTheGreatest) {
  for (const int n_cells : {64, 1088}) {
    for (const int top : {1, 7, 64, 700}) {
      check_choice({n_cells, top, 1, 0.25f});
      check_choice({n_cells, top, 3, 1e-4f});
    }
  }
  check_choice({64 * 130, 64, 2, 100});      // all are equal
  check_choice({64 * 130, 70, 1, 100});      // and more than the list of candidates holds
  check_choice({64 * 4200, 64, 1, 1e-4f});   // more blocks than are kept
  check_choice({64 * 4200, 4096, 1, 0.1f});  // and more candidates
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
  simt::Machine::launch({2, kPairs}, RetrieveKernel::kThreads, 0, [&] { RetrieveKernel::gather(a); });
  for (int i = 0; i < kPairs * kTop; i++) {
    if (cells[i] < 0) continue;
    const size_t from = (size_t(i / kTop) * kCells + cells[i]) * kDim;
    for (int d = 0; d < kDim; d++) {
      EXPECT_EQ(out_keys[i * kDim + d], keys[from + d]);
      EXPECT_EQ(out_values[i * kDim + d], values[from + d]);
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
  using Kernel = DecodeKernel<D, W, false>;
  const int groups = (kCells / 64 + Kernel::kBlocks - 1) / Kernel::kBlocks;
  simt::Machine::launch({groups, kHeads}, Kernel::kThreads, Kernel::kSharedBytes, [&] { Kernel::run(a); });
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
