// The fixture of the kernels' tests: each runs with every instruction set that the machine has, and holds it to the
// scalar specification. kernels_test.cpp instantiates it for all files.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <vector>

#include "kernels/kernels.h"

namespace thimble {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Compares bits, so that NaNs count as equal and zeros of different sign do not.
inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

class KernelsOn : public testing::TestWithParam<const Kernels*> {
protected:
  const Kernels& k() const { return *GetParam(); }
  const Kernels& spec() const { return scalar_kernels(); }
  bool is_spec() const { return &k() == &spec(); }
};

}  // namespace thimble
