// Decode attention over codes: 1 to 8 query tokens a stream, any number of streams.
#pragma once

#include <cuda_runtime_api.h>

#include "codec/format.h"
#include "cuda/attend/formats.h"
#include "cuda/host/device.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// Counters come first in a workspace, in a part of constant size: calls of other shapes must find them zero.
inline constexpr size_t kAttendCounterBytes = 64 << 10;

/// Device memory for one attend call at a time (on one stream), aligned to 256 bytes. Its counters must be zeroed
/// before its first use; then calls of any shape may share the largest.
size_t attend_workspace_bytes(const DeviceInfo& device, const AttendArgs& args);

/// Whether the device has a kernel with tables (shape.h) for keys and values of these widths, and the shared memory for
/// it; `scores`: for score_cells as well.
bool attend_fits(const DeviceInfo& device, int head_dim, int key_width, int value_width, bool scores);

/// How a layer's keys and values are coded and attended to on a device (formats.h).
AttendBy attend_by(const DeviceInfo& device, const Format& keys, const Format& values, bool scores);

/// How many streams a thread block takes at once in such a call. With more than 2, scores come from the codewords
/// themselves (direct.h); so they do with 2 in formats that have no kernel for pairs (shape.h).
int attend_batch(const DeviceInfo& device, const AttendArgs& args);

/// Whether all thread blocks of such a call run at once and take one batch each. Else one may write its output before
/// another reads new rows (NewRows), so the memory of the two must not overlap.
bool runs_at_once(const DeviceInfo& device, const AttendArgs& args);

/// Enqueues one kernel on `stream`. It fills in the row groups, splits, partials and counters of `args`.
Status attend(const DeviceInfo& device, AttendArgs args, void* workspace, size_t workspace_bytes, cudaStream_t stream);

/// Enqueues one kernel that fills args.scores, args.block_maxima and args.all_hidden.
Status score_cells(const DeviceInfo& device, ScoreArgs args, cudaStream_t stream);

}  // namespace thimble::cuda
