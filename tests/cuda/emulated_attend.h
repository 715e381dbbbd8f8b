// Attention's kernel under emulation. Include it where THIMBLE_SIMT_HOST is defined.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "cases.h"
#include "cuda/attend/kernel.h"
#include "cuda/attend/shape.h"
#include "cuda/attend/shared.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// Runs the kernel on `blocks_x` blocks a KV head and row group; `a` is dealt out already. Returns the output,
/// [n_streams][n_tokens][n_heads][head_dim].
template <typename S>
std::vector<float> emulate_attend(AttendArgs a, int blocks_x) {
  const int pairs = a.n_kv_heads * a.row_groups;
  std::vector<float> partials(size_t(a.n_streams) * (a.n_splits + 1) * pairs * S::kPartialFloats, NAN);
  std::vector<int> arrived(a.n_streams * pairs);
  std::vector<float> output(size_t(a.n_streams) * a.n_tokens * a.n_kv_heads * a.group * a.head_dim, NAN);
  a.partials = partials.data();
  a.arrived = arrived.data();
  a.output = output.data();
  simt::Machine::launch({blocks_x, a.n_kv_heads, a.row_groups}, S::kThreads, shared_bytes<S>(),
                        [&] { AttendKernel<S>::run(a); });
  for (int n : arrived) EXPECT_EQ(n, 0);
  return output;
}

/// A kernel, as a value: what does not depend on its shape need not be compiled for each.
struct EmulatedAttend {
  FormatCase format;
  std::vector<float> (*run)(AttendArgs a, int blocks_x);
};

template <typename S>
inline constexpr EmulatedAttend kEmulated{{S::kHeadDim, S::kKeyWidth, S::kValueWidth}, emulate_attend<S>};

}  // namespace thimble::cuda
