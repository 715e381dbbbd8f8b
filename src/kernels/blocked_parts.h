// What blocked.cpp and blocked_codes.cpp share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/isa.h"
#include "kernels/kernels.h"

namespace thimble {

struct IsaOps {
  const char* name;
  const TileOps& tiles;
  const CodeOps& codes;
};

// Hands out arrays, each at a multiple of 64 bytes, from one piece of memory; with null it only counts their bytes.
class Carver {
public:
  explicit Carver(uint8_t* memory) : memory_(reinterpret_cast<uintptr_t>(memory)) {}
  template <typename T>
  T* take(size_t n) {
    T* p = reinterpret_cast<T*>(memory_ + used_);
    used_ += (n * sizeof(T) + 63) / 64 * 64;
    return p;
  }
  size_t used() const { return used_; }

private:
  uintptr_t memory_;
  size_t used_ = 0;
};

namespace blocked {

/// By component: the row of codes it is looked up with, and its subspace's scale.
struct CodeRows {
  uint8_t row[kMaxHeadDim];
  float scale[kMaxHeadDim];
  explicit CodeRows(const HeadCodec& codec);
};

inline uint64_t first_bits(int n) {
  return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
}

/// A mask of 64 numbers: `mask` itself where it has 64, else its n numbers and -inf behind them, in `room` [64].
const uint16_t* padded(const uint16_t* mask, int n, uint16_t* room);
/// Which of up to 64 cells a token's mask leaves visible.
uint64_t visible(const IsaOps& ops, const uint16_t* mask, int n_cells);
void decode_block(const IsaOps& ops, const HeadCodec& codec, const uint8_t* block, float* tile);
void attend_tile(const IsaOps& ops, const Queries& queries, const Tile& tile, const Mask& mask, Softmax& softmax,
                 Scratch& scratch);
/// Attends block by block, each decoded once for all tokens: for f16 blocks, and for more tokens than kMaxCodeTokens
/// (blocked_prompts.cpp).
void attend_decoded(const IsaOps& ops, const Queries& queries, const CodedCells& cells, const Mask& mask,
                    Softmax& softmax, Scratch& scratch);

// As in Kernels.
void attend_codes(const IsaOps& ops, const Queries& queries, const CodedCells& cells, const Mask& mask,
                  Softmax& softmax, Scratch& scratch);
void score_codes(const IsaOps& ops, const Queries& queries, const CodedCells& cells, const Mask& mask, float* best,
                 Scratch& scratch);

}  // namespace blocked
}  // namespace thimble
