// Layers that are read as rows, for attention that the program around computes: MLA, head sizes and pairs of them that
// the kernels of attend/ do not take, models without flash attention. Any format, any head size up to kMaxRowDim.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/host/device.h"
#include "cuda/rows/row_args.h"

namespace thimble::cuda {

/// Enqueues a kernel for each side of EncodeArgs, whose codecs are in the plain order. As `encode` (encode/encode.h),
/// but that rows are rounded to f16 first, and that those which get a row in the window are not coded; without dense
/// rows.
Status encode_rows(const DeviceInfo& device, const EncodeArgs& args, cudaStream_t stream);

/// The same for the cells that left the window of one layer in update_window (encode/encode.h). `n_tokens` of the batch
/// says about how many there may be.
Status code_leaving_rows(const DeviceInfo& device, const EncodeArgs& layer, const LayerWindow& window, int n_tokens,
                         cudaStream_t stream);

/// Enqueues kernels that read rows of a layer with any order of codes.
Status read_rows(const DeviceInfo& device, const ReadRowsArgs& args, cudaStream_t stream);

/// RowsOfAnySize::read and put.
Status read_any_rows(const DeviceInfo& device, const CellArgs& args, cudaStream_t stream);
Status put_any_rows(const DeviceInfo& device, const CellArgs& args, cudaStream_t stream);

Status keep_queries(const DeviceInfo& device, const KeepQueriesArgs& args, cudaStream_t stream);

}  // namespace thimble::cuda
