// Checks blocks and rows that a caller describes, and turns them into the core's types.
#pragma once

#include "api/handles.h"
#include "cache/layer.h"

namespace thimble::api {

/// Whether n by m pieces of `size`, these strides apart, do not overlap and their extent does not overflow.
bool apart(int64_t n, size_t n_stride, int64_t m, size_t m_stride, size_t size);

/// Throws a Failure, which begins with `name`, where the codec is null.
void check_codec(const thimble_codec* codec, const char* name);

/// Throws a Failure where blocks are missing or overlap.
void check_blocks(const thimble_blocks& blocks, const thimble_codec& codec, const char* name);

/// A view of checked blocks as one side of a layer. With one stream of all blocks and no table, its cells are those of
/// the memory. Blocks that the caller lends for reading only must not be written to through it.
CacheSide side_of(const thimble_blocks& blocks, const thimble_codec& codec, int64_t cells_per_stream, int n_streams,
                  const int32_t* table);

}  // namespace thimble::api
