// Decode attention over tiles, emulated: formats without a kernel with tables.
#define THIMBLE_SIMT_HOST
#include <gtest/gtest.h>

#include "cuda/attend/tile_kernel.h"
#include "cuda/attend/tile_shape.h"
#include "emulated_attend.h"

namespace thimble::cuda {
namespace {

using Case = AttendCase;

template <int HeadDim, bool Words = true>
std::vector<float> emulate(AttendArgs a, int blocks_x) {
  using Shape = TileShape<HeadDim, Words>;
  return emulate_attend<Shape>(a, blocks_x, TileKernel<Shape>::attend);
}

double error_of_tiles(const TileCase& format, const Case& c) {
  const auto run = format.head_dim == 64 ? emulate<64> : format.head_dim == 128 ? emulate<128> : emulate<256>;
  return error_of({format.head_dim, format.rates, 1, run, /*tiles=*/true}, c);
}

TEST(CudaTiles, AllFormats) {
  for (const TileCase& format : kTileCases) {
    EXPECT_LT(error_of_tiles(format, {.n_cells = 192}), kTileTolerance)
        << format.head_dim << " at " << format.rates.keys << "/" << format.rates.values;
  }
}

TEST(CudaTiles, Cases) {
  for (const Case& c : kAttendCases) {
    // Weights of exact rows are rounded to f16.
    EXPECT_LT(error_of_tiles({64, {3, 1.25}}, c), c.n_exact > 0 ? 1.5e-3 : kTileTolerance) << c.name;
  }
}

TEST(CudaTiles, NewRows) {
  const Case c{.n_cells = 192, .mask = true, .n_exact = 150, .n_fresh = 3};
  EXPECT_LT(error_of_tiles({128, {1.5, 3}}, c), 1.5e-3);
  EXPECT_LT(error_of_tiles({256, {1.25, 1.5}}, c), 1.5e-3);
}

TEST(CudaTiles, CodewordsInGlobalMemory) {
  Case c = kManyOptions;
  EXPECT_LT(error_of({256, {3, 1.25}, 1, emulate<256, false>, /*tiles=*/true}, c), 1.5e-3);
  c.n_exact = c.n_fresh = 0;
  EXPECT_LT(error_of({256, {4, 1}, 1, emulate<256, false>, /*tiles=*/true}, c), kTileTolerance);
}

TEST(CudaTiles, NothingCoded) {
  for (int blocks_x : {1, 2}) {
    const Case c{
        .n_streams = 3, .dense = true, .n_exact = 60, .n_fresh = 1, .blocks_x = blocks_x, .nothing_coded = true};
    EXPECT_LT(error_of_tiles({64, {3, 3}}, c), 1e-4);
  }
}

}  // namespace
}  // namespace thimble::cuda
