// The fixture of the kernels' tests: each runs with every instruction set that the machine has, and holds it to the
// scalar specification. kernels_test.cpp instantiates it for all files.
#pragma once

#include <gtest/gtest.h>

#include <limits>

#include "kernels/kernels.h"

namespace thimble {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

class KernelsOn : public testing::TestWithParam<const Kernels*> {
protected:
  const Kernels& k() const { return *GetParam(); }
  const Kernels& spec() const { return scalar_kernels(); }
  bool is_spec() const { return &k() == &spec(); }
};

}  // namespace thimble
