// The CUDA block layout: a permutation, and back.
#include "cuda/layout.h"

#include <gtest/gtest.h>

#include <set>

#include "fixture.h"

namespace thimble::cuda {
namespace {

struct Order {
  Format format;
  bool tiles;
};

std::vector<Order> orders() {
  std::vector<Order> all;
  for (int head_dim : {64, 128, 256}) {
    for (double bits : {4.0, 2.0, 1.0}) all.push_back({make_format(head_dim, bits), false});
    for (double bits : {4.0, 3.0, 2.0, 1.5, 1.25, 1.0}) all.push_back({make_format(head_dim, bits), true});
  }
  return all;
}

TEST(CudaLayout, IsAPermutationOfTheRecord) {
  for (const auto& [format, tiles] : orders()) {
    for (Kind kind : {Kind::key, Kind::value}) {
      std::set<int> seen;
      for (int m = 0; m < format.n_subspaces(); m++) {
        for (int cell = 0; cell < kBlockCells; cell++) {
          seen.insert(code_order(format, tiles).position(kind, m, cell));
        }
      }
      EXPECT_EQ(seen.size(), format.codes_bytes());
      EXPECT_EQ(*seen.begin(), 0);
      EXPECT_EQ(*seen.rbegin(), int(format.codes_bytes()) - 1);
    }
  }
}

TEST(CudaLayout, BlocksSurviveTheRoundTrip) {
  Random random(1);
  for (const auto& [format, tiles] : orders()) {
    for (Kind kind : {Kind::key, Kind::value}) {
      std::vector<uint8_t> block(format.block_bytes()), cuda(block.size()), back(block.size());
      for (uint8_t& b : block) b = uint8_t(random.below(256));
      block_to_cuda(format, kind, block.data(), cuda.data(), tiles);
      block_from_cuda(format, kind, cuda.data(), back.data(), tiles);
      EXPECT_EQ(block, back);
      std::vector<uint8_t> row(size_t(format.vector_bytes()));
      copy_cell_out(format, kind, block.data(), 37, row.data());
      for (int m = 0; m < format.n_subspaces(); m++) {
        EXPECT_EQ(row[m], cuda[code_order(format, tiles).position(kind, m, 37)]);
      }
    }
  }
}

// In the scores' inner loop the 32 lanes of a warp must look into 32 different subspaces (16 for half a warp).
TEST(CudaLayout, KeysOfAStepAreInDifferentBanks) {
  for (int n_subspaces : {16, 32, 64, 128}) {
    const int per_cell = n_subspaces / 4;
    for (int step = 0; step < per_cell; step++) {
      for (int first = 0; first < 32; first += 16) {
        std::set<int> slots;
        for (int lane = first; lane < first + 16; lane++) {
          const int g = lane / 4, position = stream_position(g, lane % 4, step);
          for (int m = 0; m < n_subspaces; m++) {
            if (cuda_key_position(n_subspaces, m, 8 * g) == position) slots.insert(m % 16);
          }
        }
        EXPECT_EQ(slots.size(), 16u);
      }
    }
  }
}

// What a lane of the kernels over tiles reads of a unit is adjacent, in the order in which it reads.
TEST(CudaLayout, CodesOfATilesLaneAreAdjacent) {
  const CodeOrder order = code_order(make_format(128, 3), true);  // 32 subspaces of width 2, then 16 of width 4
  for (int i = 0; i < 8; i++) {
    for (int k = 0; k < 4; k++) EXPECT_EQ(order.position(Kind::key, 4 + k, 8 * i + 5), 256 + 5 * 32 + 4 * i + k);
    for (int k = 0; k < 2; k++) EXPECT_EQ(order.position(Kind::key, 34 + k, 8 * i + 5), 34 * 64 + 5 * 16 + 2 * i + k);
  }
  for (int i = 0; i < 16; i++) {
    const int cell = i / 4 * 16 + i / 2 % 2 * 8 + 2 * 3 + i % 2;
    for (int k = 0; k < 4; k++) EXPECT_EQ(order.position(Kind::value, 8 + k, cell), 512 + 3 * 64 + 4 * i + k);
    for (int k = 0; k < 2; k++) EXPECT_EQ(order.position(Kind::value, 32 + k, cell), 32 * 64 + 3 * 32 + 2 * i + k);
  }
}

TEST(CudaLayout, SubspacesOfComponents) {
  for (const auto& [format, tiles] : orders()) {
    const CodeOrder order = code_order(format, tiles);
    EXPECT_EQ(order.n_subspaces(), format.n_subspaces());
    for (int m = 0; m < format.n_subspaces(); m++) {
      for (int i = 0; i < format.width(m); i++) EXPECT_EQ(order.subspace_of(format.offset(m) + i), m);
    }
  }
}

TEST(CudaLayout, SupportsOneWidthAlone) {
  EXPECT_TRUE(cuda_supports(make_format(128, 2)));
  EXPECT_FALSE(cuda_supports(make_format(128, 1.5)));
  EXPECT_FALSE(cuda_supports(make_format(128, 16)));
  EXPECT_FALSE(cuda_supports(make_format(96, 2)));
  EXPECT_TRUE(tiles_support(make_format(128, 1.5)));
  EXPECT_FALSE(tiles_support(make_format(128, 16)));
  EXPECT_FALSE(tiles_support(make_format(96, 2)));
}

}  // namespace
}  // namespace thimble::cuda
