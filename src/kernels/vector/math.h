// The vector operations that the loops of all instruction sets are written with. A unit first includes the header of
// its instruction set (avx2.h, avx512.h, neon.h), which defines:
//
//   Floats, kLanes              a register of kLanes floats; + - * / are the compiler's
//   Lanes, first_lanes(n)       some of the lanes: the first n, or all where n is more
//   all_of(x)                   x in every lane
//   load, store                 at any address; with Lanes only these lanes, and a load sets the others to 0
//   load_lanes, store_lanes     the first n lanes, or all where n is more
//   load_half(p)                kLanes f16 numbers as floats
//   load_halves(p, n)           the first n of them, or all where n is more
//   fused(a, b, c)              a * b + c, rounded once
//   magnitude(x)                |x|
//   greater(x, y)               the greater of the two; y where x is NaN
//   smaller(x, y)               the smaller of the two; NaN where y is NaN
//   choose(bits, x, y)          x in the lanes whose bit is set, y in the others
//   lanes_at_least(x, y)        a bit for each lane: whether x is y or more
//   max_of(x), sum_of(x)        over the lanes
//   times_power(p, shifted, x)  see exp2_of
//   butterfly<Half>(x)          lanes l and l + Half of every 2 * Half become their sum and their difference
//   transpose(rows)             transposes a matrix of kLanes vectors
//   Best, keep_better, lowest_best   which codeword is best, see nearest in tile_loops.h
//   Bytes, zip_low, zip_high    interleave the lower, the upper halves of two vectors of 16 bytes
//   kColumns, kMultiplyRows     vectors and rows of a matrix product that fit into the registers
//   kMaxima                     how many running maxima a loop keeps, so that none waits for the one before
//
// Everything in this folder is in an anonymous namespace: each unit has a copy, compiled with its flags. If the linker
// shared one, it might run on machines that lack the instruction set.
#pragma once

#include "kernels/isa.h"

namespace thimble {
namespace {

// 2^x, relative error 3e-6; 0 for x < -64, as in weight_of. NaN stays NaN. x is split into a whole number and f in
// [-1/2, 1/2]; a polynomial gives 2^f.
inline Floats exp2_of(Floats x) {
  const Floats magic = all_of(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in low bits
  const Floats shifted = x + magic;
  const Floats f = x - (shifted - magic);
  Floats p = fused(f, all_of(0.0095701023f), all_of(0.055917859f));
  p = fused(p, f, all_of(0.24024744f));
  p = fused(p, f, all_of(0.69312179f));
  p = fused(p, f, all_of(0.99999928f));
  return times_power(p, shifted, x);
}

// tanh(x) = 1 - 2 / (e^2x + 1)
inline Floats tanh_of(Floats x) {
  const Floats e = exp2_of(smaller(all_of(20.0f), x) * all_of(2 * kLog2e));
  return all_of(1.0f) - all_of(2.0f) / (e + all_of(1.0f));
}

}  // namespace
}  // namespace thimble
