// How decode attention deals its work out, on a device of 132 multiprocessors: 16 thread blocks to each of 8 KV heads.
// And which formats fit which devices.
#include "cuda/attend/deal.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>

#include "cuda/attend/formats.h"
#include "cuda/layout.h"

namespace thimble::cuda {
namespace {

struct Expected {
  int n_splits, batch;
};

void expect_deal(int key_width, int value_width, int n_streams, int n_cells, Expected expected, bool batches = true) {
  const DealOptions options = deal_options(128, key_width, value_width, 16, batches);
  const Deal deal = choose_deal(n_streams, n_cells / kBlockCells, 0, options);
  EXPECT_EQ(deal.n_splits, expected.n_splits) << key_width << " " << n_streams << "x" << n_cells;
  EXPECT_EQ(1 << deal.batch_shift, expected.batch) << key_width << " " << n_streams << "x" << n_cells;
}

// What was the fastest on an H200 (docs/results/speed-gpu.md).
TEST(CudaDeal, LongSequencesAreSplitAndShortOnesShareABlock) {
  for (int width : {8, 4}) {
    expect_deal(width, width, 1, 196608, {16, 1});
    expect_deal(width, width, 8, 32768, {2, 1});
    expect_deal(width, width, 32, 8192, {1, 2});  // a score table each
    expect_deal(width, width, 128, 2048, {1, 8});
  }
  expect_deal(2, 2, 1, 196608, {16, 1});
  expect_deal(2, 2, 8, 32768, {2, 1});
  expect_deal(2, 2, 32, 8192, {1, 2});  // by codewords: score tables of two do not fit
  expect_deal(2, 2, 128, 2048, {1, 8});
}

TEST(CudaDeal, SmallDevicesTakeOneStreamAtATime) {
  for (int width : {8, 4, 2}) {
    for (int n_streams : {1, 32, 128}) {
      const Deal deal = choose_deal(n_streams, 32, 0, deal_options(128, width, width, 16, false));
      EXPECT_EQ(deal.batch_shift, 0) << width << " " << n_streams;
    }
  }
}

TEST(CudaDeal, NoMoreSplitsThanThereIsToDo) {
  EXPECT_EQ(choose_deal(1, 0, 0, deal_options(128, 4, 4, 16, true)).n_splits, 1);
  EXPECT_LE(choose_deal(1, 3, 0, deal_options(128, 4, 4, 16, true)).n_splits, 3);
  EXPECT_LE(choose_deal(1, 3, 136, deal_options(128, 4, 4, 16, true)).n_splits, 4);
}

// What a block may have, as CUDA's programming guide lists it by compute capability.
TEST(CudaFormats, FitTheSharedMemoryOfDevices) {
  constexpr size_t kSm80 = 163 << 10, kSm86 = 99 << 10, kSm90 = 227 << 10;
  for (const auto& [keys, values] : {std::pair{8, 8}, {4, 8}, {4, 4}, {2, 4}, {2, 2}}) {
    const std::string widths = std::to_string(keys) + "/" + std::to_string(values);
    for (int head_dim : {64, 128}) EXPECT_LE(attend_shared_bytes(false, head_dim, keys, values), kSm86) << widths;
    const size_t large_heads = attend_shared_bytes(false, 256, keys, values);
    EXPECT_GT(large_heads, kSm86) << widths;
    EXPECT_EQ(large_heads <= kSm80, keys > 2) << widths;
    for (int head_dim : {64, 128, 256}) {
      EXPECT_GT(attend_shared_bytes(true, head_dim, keys, values), 0u) << widths;
      EXPECT_LE(attend_shared_bytes(true, head_dim, keys, values), kSm90) << widths;
    }
  }
  EXPECT_EQ(attend_shared_bytes(true, 128, 8, 4), 0u);
  EXPECT_EQ(attend_shared_bytes(true, 96, 8, 8), 0u);
}

}  // namespace
}  // namespace thimble::cuda
