// What thimble_attend_args says of a sequence.
#pragma once

#include <cmath>
#include <cstdint>

#include "api/handles.h"
#include "codec/format.h"

namespace thimble::api {

inline int64_t first_token(const thimble_attend_args& args, int64_t sequence) {
  return args.first_tokens ? args.first_tokens[sequence] : sequence;
}

/// Blocks that hold the first n cells of a sequence.
inline int64_t blocks_for(int64_t n_cells) {
  return (n_cells + kBlockCells - 1) / kBlockCells;
}

inline float scale_of(const thimble_attend_args& args) {
  return args.scale != 0 ? args.scale : 1.0f / std::sqrt(float(args.keys->format().head_dim));
}

}  // namespace thimble::api
