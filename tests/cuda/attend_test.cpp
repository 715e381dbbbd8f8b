// Decode attention: the CUDA kernel's own source, emulated, against the codec's specification in double. Kernels with
// large tables, see emulated_attend.h.
#define THIMBLE_SIMT_HOST
#include <gtest/gtest.h>

#include <algorithm>

#include "emulated_attend.h"

namespace thimble::cuda {
namespace {

using Case = AttendCase;

TEST(CudaAttend, AllFormats) {
  const Case c{.n_cells = 192};
  for_each_shape<kFormatCases, true>([&]<typename S>() { EXPECT_LT(share_of_tolerance<S>(c), 1) << name_of<S>(); });
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
  EXPECT_LT((share_of_tolerance<AttendShape<256, 8, 8, true>>(c)), 1);
}

TEST(CudaAttend, ArithmeticErrorIsATenthOfTheCodecs) {
  expect_small_arithmetic_error<AttendShape<64, 8, 8, true>>();
  expect_small_arithmetic_error<AttendShape<64, 4, 4, true>>();
  expect_small_arithmetic_error<AttendShape<128, 8, 8, true>>();
  expect_small_arithmetic_error<AttendShape<128, 4, 8, true>>();
  expect_small_arithmetic_error<AttendShape<128, 2, 4, true>>();
  expect_small_arithmetic_error<AttendShape<128, 2, 2, true>>();
  expect_small_arithmetic_error<AttendShape<256, 4, 4, true>>();
}

// A layer's keys may have a matrix of their own where its values are only rotated.
TEST(CudaAttend, KeysAloneHaveMatrices) {
  EXPECT_LT(
      (share_of_tolerance<Small>({.n_streams = 2, .n_tokens = 2, .dense_keys = true, .n_exact = 30, .blocks_x = 2})),
      1);
  EXPECT_LT((share_of_tolerance<Small>({.dense_keys = true, .n_splits = 2, .blocks_x = 2})), 1);
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
