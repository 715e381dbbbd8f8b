// Decode attention on devices whose thread blocks have less shared memory, emulated.
#define THIMBLE_SIMT_HOST
#include <gtest/gtest.h>

#include "emulated_attend.h"

namespace thimble::cuda {
namespace {

using Case = AttendCase;

TEST(CudaAttend, SmallSharedMemory) {
  const Case c{.n_cells = 128, .mask = true};
  for_each_shape<kSmallFormatCases, false>(
      [&]<typename S>() { EXPECT_LT(share_of_tolerance<S>(c), 1) << name_of<S>(); });
}

TEST(CudaAttend, NewRowsInSmallSharedMemory) {
  const Case c{.n_cells = 192, .mask = true, .n_exact = 150, .n_fresh = 3};
  EXPECT_LT((share_of_tolerance<AttendShape<128, 2, 2, false>>(c)), 1);
}

TEST(CudaAttend, ArithmeticErrorInSmallSharedMemory) {
  expect_small_arithmetic_error<AttendShape<64, 4, 4, false>>();
}

}  // namespace
}  // namespace thimble::cuda
