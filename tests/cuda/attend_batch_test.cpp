// Decode attention of many streams, emulated: thread blocks take several items at once.
#define THIMBLE_SIMT_HOST
#include <gtest/gtest.h>

#include <map>

#include "cuda/attend/direct.h"
#include "emulated_attend.h"

namespace thimble::cuda {
namespace {

using Case = AttendCase;

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
  Case many{.n_streams = 5, .n_tokens = 3, .n_cells = 192, .dense = true, .blocks_x = 2, .batch_shift = 1};
  many.mask = many.alibi = many.sinks = true;
  many.softcap = 2;
  EXPECT_LT(share_of_tolerance<S>(many), 1);
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

TEST(CudaAttend, ArithmeticErrorOfBatches) {
  expect_small_arithmetic_error<Pair<128, 4, 4>>();
  expect_small_arithmetic_error<Direct<128, 8, 8>>();
  expect_small_arithmetic_error<Direct<128, 4, 4>>();
  expect_small_arithmetic_error<Direct<128, 2, 2>>();
}

}  // namespace
}  // namespace thimble::cuda
