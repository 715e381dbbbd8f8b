// Kernels that are made of an instruction set's loops (isa.h) and the logic that all instruction sets share.
#pragma once

#include "kernels/kernels.h"

namespace thimble {

// A build defines the functions of its instruction sets only (THIMBLE_AVX512, THIMBLE_AVX2, THIMBLE_NEON).
const Kernels& avx512_kernels();
const Kernels& avx2_kernels();
const Kernels& neon_kernels();

}  // namespace thimble
