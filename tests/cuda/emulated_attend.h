// Attention's kernel under emulation. Include it where THIMBLE_SIMT_HOST is defined.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "cases.h"
#include "cuda/attend/kernel.h"
#include "cuda/attend/shape.h"
#include "cuda/attend/shared.h"
#include "cuda/types.h"
#include "fixture.h"

namespace thimble::cuda {

/// Runs the kernel `body` on `blocks_x` blocks a KV head and row group; `a` is dealt out already. Returns the output,
/// [n_streams][n_tokens][n_heads][head_dim].
template <typename S>
std::vector<float> emulate_attend(AttendArgs a, int blocks_x, void (*body)(const AttendArgs&)) {
  const int pairs = a.n_kv_heads * a.row_groups;
  std::vector<float> partials(size_t(a.n_streams) * (a.n_splits + 1) * pairs * S::kPartialFloats, NAN);
  std::vector<int> arrived(a.n_streams * pairs);
  std::vector<float> output(size_t(a.n_streams) * a.n_tokens * a.n_kv_heads * a.group * a.head_dim, NAN);
  a.partials = partials.data();
  a.arrived = arrived.data();
  a.output = output.data();
  simt::Machine::launch({blocks_x, a.n_kv_heads, a.row_groups}, S::kThreads, shared_bytes<S>(), [&] { body(a); });
  for (int n : arrived) EXPECT_EQ(n, 0);
  return output;
}
template <typename S>
std::vector<float> emulate_attend(AttendArgs a, int blocks_x) {
  return emulate_attend<S>(a, blocks_x, AttendKernel<S>::run);
}

/// A kernel as a value, so that code that does not depend on its shape is compiled once. A kernel takes seconds to
/// compile, so each is compiled in one file only: large tables in attend_test.cpp, small ones in attend_small_test.cpp,
/// batches in attend_batch_test.cpp.
struct EmulatedAttend {
  int head_dim;
  Rates rates;
  int slots;  // items that a thread block takes at once, at most
  std::vector<float> (*run)(AttendArgs a, int blocks_x);
  bool tiles = false;
};

/// Whether this build has the kernel. Builds with sanitizers, in which ten kernels take a minute to compile, have one
/// of each kind; others have all.
template <typename S>
constexpr bool is_compiled() {
#ifdef THIMBLE_FEW_KERNELS
  return (S::kHeadDim == 64 && S::kKeyWidth == S::kValueWidth && S::kKeyWidth <= 4) ||
         (S::kHeadDim == 128 && S::kKeyWidth == 2 && S::kValueWidth == (S::kSlots == 1 && S::kLarge ? 4 : 2)) ||
         (S::kHeadDim == 256 && S::kKeyWidth == 8);
#else
  return true;
#endif
}

template <typename S>
inline constexpr EmulatedAttend kEmulated{
    S::kHeadDim, {8.0 / S::kKeyWidth, 8.0 / S::kValueWidth}, S::kSlots, emulate_attend<S>};

/// The relative error of a case's output, compared with the codec's specification in double (attend_problem.cpp).
double error_of(const EmulatedAttend& kernel, const AttendCase& c);
/// The error that the kernel's arithmetic adds to outputs, divided by the codec's own error, for normally distributed
/// keys and values. `outliers`: one component of each query is six times as large.
double share_of_codecs_error(const EmulatedAttend& kernel, bool outliers);

/// The same for one shape; 0 where this build does not have the kernel.
template <typename S>
double error_of(const AttendCase& c) {
  if constexpr (is_compiled<S>()) return error_of(kEmulated<S>, c);
  return 0;
}

/// `error_of` divided by the error that the format's arithmetic may add.
template <typename S>
double share_of_tolerance(const AttendCase& c) {
  return error_of<S>(c) / tolerance(S::kKeyWidth, S::kValueWidth);
}

// Calls f<S>() with the shape of each format of a list.
template <const auto& Formats, bool Large, typename F>
void for_each_shape(const F& f) {
  [&]<size_t... I>(std::index_sequence<I...>) {
    (f.template operator()<AttendShape<Formats[I].head_dim, Formats[I].key_width, Formats[I].value_width, Large>>(),
     ...);
  }
  (std::make_index_sequence<std::size(Formats)>());
}

template <typename S>
std::string name_of() {
  return std::to_string(S::kHeadDim) + ", widths " + std::to_string(S::kKeyWidth) + "/" +
         std::to_string(S::kValueWidth);
}

template <typename S>
void expect_small_arithmetic_error() {
  if constexpr (is_compiled<S>()) {
    for (bool outliers : {false, true}) {
      EXPECT_LT(share_of_codecs_error(kEmulated<S>, outliers), 0.1) << name_of<S>() << " " << outliers;
    }
  }
}

}  // namespace thimble::cuda
