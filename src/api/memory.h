// Blocks and rows that a caller describes: checked, and as the core takes them.
#pragma once

#include "api/handles.h"
#include "cache/layer.h"

namespace thimble::api {

/// Whether n by m things of `size`, these strides apart, leave one another alone, and their extent can be counted.
bool apart(int64_t n, size_t n_stride, int64_t m, size_t m_stride, size_t size);

/// Throws a Failure where the codec is null or not of this kind, `name` before it.
void check_codec(const thimble_codec* codec, const char* name);

/// Throws a Failure where blocks are missing or overlap.
void check_blocks(const thimble_blocks& blocks, const thimble_codec& codec, const char* name);

/// Checked blocks as one side of a layer. With one stream of all blocks and no table, they are the cells of the memory.
/// What the caller lends for reading must not be written to through it.
CacheSide side_of(const thimble_blocks& blocks, const thimble_codec& codec, int64_t cells_per_stream, int n_streams,
                  const int32_t* table);

}  // namespace thimble::api
