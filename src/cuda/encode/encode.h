// Encoding of keys and values, the window's books, and rows for dense attention.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/host/device.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// Enqueues one kernel that encodes args.n_tokens tokens' keys and values into their cells, bit for bit as
/// encode_vector does, and writes their exact rows into the window. No two tokens of a call may go to the same cell.
Status encode(const DeviceInfo& device, EncodeArgs args, cudaStream_t stream);

/// Enqueues one kernel that takes new tokens' cells into the windows of layers and decides which cells leave them. To
/// be called once a batch and layer, before `encode`, and followed by code_leaving. A cell that is written again gives
/// up its old row.
Status update_window(const DeviceInfo& device, const WindowArgs& args, cudaStream_t stream);

inline constexpr int kMaxJudgedDim = 256;  // the largest head size of which cells are judged

/// Enqueues one kernel between the two of a prompt (WindowArgs::begin and end), which scores the cells that may leave.
Status judge_cells(const DeviceInfo& device, const JudgeArgs& args, cudaStream_t stream);

/// Enqueues one kernel that encodes the cells which left the windows in update_window, of all layers of a head size. To
/// be called before their rows are overwritten.
Status code_leaving(const DeviceInfo& device, LeaveArgs args, int head_dim, cudaStream_t stream);

/// Enqueues one kernel that puts the rows of staged tokens into the windows of `args.layers`, behind code_leaving.
Status place_staged(const DeviceInfo& device, const LeaveArgs& args, cudaStream_t stream);

/// Enqueues one kernel that decodes all cells to f16 rows.
Status decode_cells(const DeviceInfo& device, const DecodeArgs& args, cudaStream_t stream);
/// The same of keys and of values, by one kernel where they have one format.
Status decode_cells(const DeviceInfo& device, const DecodeBothArgs& args, cudaStream_t stream);

/// Enqueues one kernel that writes a prompt's exact rows for dense attention, keeps its tokens' rows until they are
/// coded and transforms its queries. Behind decode_cells, whose rows it overwrites.
Status prepare_prompt(const DeviceInfo& device, const PromptArgs& args, cudaStream_t stream);

/// Enqueues one kernel that transforms queries for attention over decoded rows, or its outputs back.
Status transform_rows(const DeviceInfo& device, const TransformArgs& args, cudaStream_t stream);

}  // namespace thimble::cuda
