// Encoding of new keys and values, transforming of queries, and decoding of blocks.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// Floats of AttendArgs::queries, and rows, each with one factor, for these queries.
inline size_t query_rows(int n_streams, int n_tokens, int n_kv_heads, int group) {
  return size_t(n_streams) * n_kv_heads * row_groups(n_tokens, group) * kRowGroup;
}

/// Enqueues one kernel that codes args.n_tokens tokens' keys and values into their cells, bit for bit as encode_vector
/// does, writes their exact rows into the window, and transforms the queries. Any of the three may be absent. No two
/// tokens of a call may go to the same cell.
Status prepare(const DeviceInfo& device, PrepareArgs args, cudaStream_t stream);

/// Enqueues one kernel that takes new tokens' cells into the window and drops what they displace. Once a batch, before
/// `prepare` of any layer. Cells that are written again leave their old row.
Status update_window(const DeviceInfo& device, const WindowArgs& args, cudaStream_t stream);

/// Enqueues one kernel that decodes all cells to f16 rows.
Status decode_cells(const DeviceInfo& device, const DecodeArgs& args, cudaStream_t stream);

/// Enqueues one kernel that transforms queries for attention over decoded rows, or its outputs back.
Status transform_rows(const DeviceInfo& device, const TransformArgs& args, cudaStream_t stream);

}  // namespace thimble::cuda
