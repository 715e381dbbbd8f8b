// Kernels made of an instruction set's loops (isa.h) and the logic that all of them share.
#pragma once

#include "kernels/kernels.h"

namespace thimble {

// Only those that this build has (THIMBLE_AVX512, THIMBLE_AVX2, THIMBLE_NEON) may be called.
const Kernels& avx512_kernels();
const Kernels& avx2_kernels();
const Kernels& neon_kernels();

}  // namespace thimble
