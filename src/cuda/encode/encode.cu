#include <algorithm>

#include "cuda/encode/decode_kernel.h"
#include "cuda/encode/encode.h"
#include "cuda/encode/encode_kernel.h"
#include "cuda/encode/judge.h"
#include "cuda/encode/prompt_kernel.h"
#include "cuda/encode/transform_kernel.h"
#include "cuda/encode/window_kernel.h"
#include "cuda/formats.h"
#include "cuda/host/launch.h"

namespace thimble::cuda {
namespace {

constexpr int kFewTokens = 8, kManyTokens = 32;  // of a thread block: the two forms of EncodeKernel

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kResident)
    encode_kernel(const __grid_constant__ EncodeArgs a) {
  Kernel::run(a);
}

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads) leave_kernel(const __grid_constant__ LeaveArgs a) {
  Kernel::run_leaving(a);
}

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kResident)
    staged_kernel(const __grid_constant__ LeaveArgs a) {
  Kernel::run_staged(a);
}

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kResident)
    decode_kernel(const __grid_constant__ DecodeBothArgs a) {
  Kernel::run(a.sides[simt::block_z()]);
}

template <int HeadDim>
__global__ void __launch_bounds__(HeadDim) prompt_kernel(const __grid_constant__ PromptArgs a) {
  PromptKernel<HeadDim>::run(a);
}

template <int HeadDim>
Status launch_prompt(const DeviceInfo& device, const PromptArgs& args, cudaStream_t stream) {
  using Kernel = PromptKernel<HeadDim>;
  const dim3 grid(Kernel::n_groups(args), args.batch.n_kv_heads);
  return launch(device, prompt_kernel<HeadDim>, args, grid, Kernel::kThreads, Kernel::kSharedBytes, stream);
}

__global__ void __launch_bounds__(PlaceKernel::kThreads) place_kernel(const __grid_constant__ LeaveArgs a) {
  PlaceKernel::run(a);
}

template <int HeadDim>
__global__ void __launch_bounds__(HeadDim) transform_kernel(const __grid_constant__ TransformArgs a) {
  TransformKernel<HeadDim>::run(a);
}

template <int HeadDim>
Status launch_transform(const DeviceInfo& device, const TransformArgs& args, dim3 grid, cudaStream_t stream) {
  using Kernel = TransformKernel<HeadDim>;
  return launch(device, transform_kernel<HeadDim>, args, grid, HeadDim, Kernel::kSharedBytes, stream);
}

__global__ void __launch_bounds__(WindowKernel::kThreads) window_kernel(const __grid_constant__ WindowArgs a) {
  WindowKernel::run(a);
}

__global__ void __launch_bounds__(JudgeKernel::kThreads) judge_kernel(const __grid_constant__ JudgeArgs a) {
  JudgeKernel::run(a);
}

template <typename Kernel>
Status launch_encode(const DeviceInfo& device, const EncodeArgs& args, dim3 grid, cudaStream_t stream) {
  return launch(device, encode_kernel<Kernel>, args, grid, Kernel::kThreads, Kernel::kSharedBytes, stream);
}

template <typename Kernel>
Status launch_leave(const DeviceInfo& device, const LeaveArgs& args, dim3 grid, cudaStream_t stream) {
  if (args.staged.n_tokens > 0) {
    constexpr size_t kBytes = sizeof(typename Kernel::StagedShared);
    return launch(device, staged_kernel<Kernel>, args, grid, Kernel::kThreads, kBytes, stream);
  }
  return launch(device, leave_kernel<Kernel>, args, grid, Kernel::kThreads, Kernel::kSharedBytes, stream);
}

template <typename Kernel>
Status launch_decode(const DeviceInfo& device, const DecodeBothArgs& args, int n_sides, cudaStream_t stream) {
  const DecodeArgs& side = args.sides[0];
  const dim3 grid((side.n_cells / kBlockCells + Kernel::kBlocks - 1) / Kernel::kBlocks,
                  side.n_streams * side.n_kv_heads, n_sides);
  return launch(device, decode_kernel<Kernel>, args, grid, Kernel::kThreads, Kernel::kSharedBytes, stream);
}

template <int HeadDim>
Status launch_decode(const DeviceInfo& device, const DecodeBothArgs& args, int n_sides, cudaStream_t stream) {
  const DecodeArgs& side = args.sides[0];
  return for_value<0, 2, 4, 8>(
      side.codec.width,
      [&]<int Width>() {
        if constexpr (Width > 0) {
          if (side.restored) return launch_decode<RestoreKernel<HeadDim, Width>>(device, args, n_sides, stream);
        }
        return side.shift ? launch_decode<DecodeKernel<HeadDim, Width, true>>(device, args, n_sides, stream)
                          : launch_decode<DecodeKernel<HeadDim, Width, false>>(device, args, n_sides, stream);
      },
      Status::unsupported("no kernel for this width"));
}

static_assert(kMaxJudgedDim == JudgeKernel::kMaxDim);

// Whether a device has the shared memory for many tokens a thread block: with 64 KiB not for heads of 256.
bool many_fit(const DeviceInfo& device, int head_dim) {
  return for_head_dim(
      head_dim,
      [&]<int HeadDim>() {
        return sizeof(typename EncodeKernel<HeadDim, kManyTokens>::StagedShared) <= device.shared_bytes;
      },
      false);
}

const Status kNoHeadSize = Status::unsupported("head size must be 64, 128 or 256");

bool complete(const CodecTables& codec, int head_dim, int n_kv_heads) {
  return codec.head_dim == head_dim && codec.n_kv_heads == n_kv_heads && codec.packed && codec.scale && codec.words &&
         codec.half_norms && (codec.width == 0 || codec.width == 2 || codec.width == 4 || codec.width == 8) &&
         (!codec.forward || (codec.mean && codec.undo));
}

// The first `n_sides` of `args`, which one kernel decodes.
Status decode_sides(const DeviceInfo& device, const DecodeBothArgs& args, int n_sides, cudaStream_t stream) {
  const DecodeArgs& side = args.sides[0];
  for (int i = 0; i < n_sides; i++) {
    const DecodeArgs& each = args.sides[i];
    if (each.n_streams < 1 || each.n_kv_heads < 1 || each.n_cells < 0 || each.n_cells % kBlockCells != 0) {
      return Status::invalid("a count is out of range");
    }
    if (!each.cache.data || !each.rows || !complete(each.codec, each.codec.head_dim, each.n_kv_heads)) {
      return Status::invalid("cache, rows or codec are missing");
    }
    if (each.restored && (each.shift || !can_restore(each.codec))) {
      return Status::invalid("rows of this transform or format cannot be restored");
    }
  }
  if (side.n_cells == 0) return {};
  return for_head_dim(
      side.codec.head_dim, [&]<int HeadDim>() { return launch_decode<HeadDim>(device, args, n_sides, stream); },
      kNoHeadSize);
}

}  // namespace

Status encode(const DeviceInfo& device, EncodeArgs args, cudaStream_t stream) {
  if (args.n_kv_heads < 1 || args.n_tokens < 0) return Status::invalid("a count is out of range");
  if (args.n_tokens == 0) return {};
  if (args.from_window) {
    if (!args.window.keys || !args.window.values || args.window.capacity < 1 || !(args.window_cells || args.cells)) {
      return Status::invalid("window rows are missing");
    }
  } else if ((!args.keys && !args.values) || !args.cells) {
    return Status::invalid("keys and values or cells are missing");
  }
  // Rows may go to dense attention alone.
  if (!args.dense.keys && (!args.key_cache.data || !(args.value_cache.data || args.store.values))) {
    return Status::invalid("caches are missing");
  }
  if (args.cells_per_stream < 1) return Status::invalid("streams have no cells");
  if (args.window.slots && (!args.window.keys || !args.window.values || args.window.capacity < 1)) {
    return Status::invalid("window rows are missing");
  }
  if (!complete(args.key_codec, args.head_dim, args.n_kv_heads) ||
      !complete(args.value_codec, args.head_dim, args.n_kv_heads)) {
    return Status::invalid("a codec is incomplete");
  }
  // Few tokens spread over the multiprocessors, many share what they read.
  const int vectors = args.n_tokens * args.n_kv_heads / device.multiprocessors;  // of keys, a multiprocessor
  const bool many = vectors >= kManyTokens / 2 && many_fit(device, args.head_dim);
  args.tokens_per_block = many ? kManyTokens : std::clamp(vectors, 1, kFewTokens);
  const dim3 grid((args.n_tokens + args.tokens_per_block - 1) / args.tokens_per_block, args.n_kv_heads * 2);
  return for_head_dim(
      args.head_dim,
      [&]<int HeadDim>() {
        return many ? launch_encode<EncodeKernel<HeadDim, kManyTokens>>(device, args, grid, stream)
                    : launch_encode<EncodeKernel<HeadDim, kFewTokens>>(device, args, grid, stream);
      },
      kNoHeadSize);
}

Status code_leaving(const DeviceInfo& device, LeaveArgs args, int head_dim, cudaStream_t stream) {
  if (args.n_layers < 1 || args.n_kv_heads < 1 || args.n_tokens < 0) return Status::invalid("a count is out of range");
  if (!args.layers || !args.windows) return Status::invalid("layers are missing");
  if ((args.staged.layers[0] | args.staged.layers[1]) &&
      (args.n_layers > StagedRows::kMaxLayers || !args.staged.rows || !args.staged.cells || !args.staged.slots)) {
    return Status::invalid("staged rows are missing");
  }
  if (args.n_tokens == 0) return {};
  // Layers and heads are enough to fill a device. How many cells leave only the device knows: blocks take them in turn.
  const bool many = args.n_tokens >= 4 * kManyTokens && many_fit(device, head_dim);
  args.tokens_per_block = many ? kManyTokens : kFewTokens;
  const dim3 grid(std::clamp(args.n_tokens / args.tokens_per_block, 1, 16), args.n_layers * args.n_kv_heads * 2);
  return for_head_dim(
      head_dim,
      [&]<int HeadDim>() {
        return many ? launch_leave<EncodeKernel<HeadDim, kManyTokens>>(device, args, grid, stream)
                    : launch_leave<EncodeKernel<HeadDim, kFewTokens>>(device, args, grid, stream);
      },
      kNoHeadSize);
}

Status update_window(const DeviceInfo& device, const WindowArgs& args, cudaStream_t stream) {
  if (args.n_layers < 1 || args.n_streams < 1 || args.n_tokens < 0 || args.cells_per_stream < 1 || args.slots < 0 ||
      args.capacity < args.slots || args.capacity > kMaxWindowRows || args.mask_tokens < 1 ||
      args.n_batch_streams < 1 || args.n_judges < 0) {
    return Status::invalid("a count is out of range");
  }
  const bool has_batch = args.part != WindowArgs::finish, is_part = has_batch && args.part != WindowArgs::whole;
  if (has_batch && args.n_tokens == 0) return {};
  if (!args.layers || (has_batch && !args.cells) || (is_part && !args.flags)) {
    return Status::invalid("an array is missing");
  }
  return launch(device, window_kernel, args, dim3(args.n_layers, args.n_streams), WindowKernel::kThreads,
                WindowKernel::kSharedBytes, stream);
}

Status judge_cells(const DeviceInfo& device, const JudgeArgs& args, cudaStream_t stream) {
  if (args.n_streams < 1 || args.n_kv_heads < 1 || args.group < 1 || args.stream_tokens < 1 || args.head_dim < 8 ||
      args.head_dim > kMaxJudgedDim || args.head_dim % 8 != 0 || args.list.max_entries % kJudgeTile != 0) {
    return Status::invalid("a count is out of range");
  }
  if (!args.layers || !args.list.jobs || !args.list.n_jobs || !args.list.entries || !args.list.scores ||
      !(args.means.data ? args.staged.rows != nullptr : args.keys && args.queries)) {
    return Status::invalid("an array is missing");
  }
  if (args.n_layers < 1 || args.n_layers > (args.means.data ? StagedRows::kMaxLayers : 1)) {
    return Status::invalid("a count is out of range");
  }
  const dim3 grid(args.list.max_entries / kJudgeTile, args.n_kv_heads, args.n_layers * args.n_streams);
  return launch(device, judge_kernel, args, grid, JudgeKernel::kThreads, JudgeKernel::kSharedBytes, stream);
}

Status decode_cells(const DeviceInfo& device, const DecodeArgs& args, cudaStream_t stream) {
  return decode_sides(device, {{args, {}}}, 1, stream);
}

Status decode_cells(const DeviceInfo& device, const DecodeBothArgs& args, cudaStream_t stream) {
  const auto& [keys, values] = args.sides;
  if (keys.codec.head_dim == values.codec.head_dim && keys.codec.width == values.codec.width &&
      !keys.shift == !values.shift && keys.restored == values.restored && keys.n_cells == values.n_cells &&
      keys.n_streams == values.n_streams && keys.n_kv_heads == values.n_kv_heads) {
    return decode_sides(device, args, 2, stream);
  }
  if (Status s = decode_cells(device, keys, stream); !s.ok()) return s;
  return decode_cells(device, values, stream);
}

Status prepare_prompt(const DeviceInfo& device, const PromptArgs& args, cudaStream_t stream) {
  const EncodeArgs& b = args.batch;
  const TransformArgs& q = args.queries;
  if (b.n_kv_heads < 1 || b.n_tokens < 0 || b.cells_per_stream < 1 || args.first_window_row < 0 ||
      args.n_window_rows < 0 || q.n_streams < 0 || q.n_tokens < 0 || q.group < 1) {
    return Status::invalid("a count is out of range");
  }
  if (b.n_tokens > 0 && ((!b.keys && !b.values) || !b.cells || !args.staged_keys || !args.staged_values)) {
    return Status::invalid("keys, values or cells are missing");
  }
  if (args.n_window_rows > 0 && (!b.window.keys || !b.window.values || b.window.capacity < 1 || !b.window_cells)) {
    return Status::invalid("window rows are missing");
  }
  if (!complete(b.key_codec, b.head_dim, b.n_kv_heads) || !complete(b.value_codec, b.head_dim, b.n_kv_heads)) {
    return Status::invalid("a codec is incomplete");
  }
  if (q.n_streams * q.n_tokens > 0 &&
      (!q.in || !q.out || q.n_kv_heads != b.n_kv_heads || !complete(q.codec, b.head_dim, b.n_kv_heads))) {
    return Status::invalid("queries are missing");
  }
  for (const Kind kind : {Kind::key, Kind::value}) {
    if (args.is_restored[int(kind)] && !can_restore(kind == Kind::key ? b.key_codec : b.value_codec)) {
      return Status::invalid("rows of this transform or format cannot be restored");
    }
  }
  const JudgeArgs& judge = args.judge;
  if (judge.means.data && (!judge.layers || !judge.queries || !judge.list.jobs || judge.n_kv_heads != b.n_kv_heads ||
                           judge.head_dim != b.head_dim)) {
    return Status::invalid("what is judged is missing");
  }
  if (b.n_tokens == 0 && args.n_window_rows == 0 && q.n_streams * q.n_tokens == 0) return {};
  return for_head_dim(
      b.head_dim, [&]<int HeadDim>() { return launch_prompt<HeadDim>(device, args, stream); }, kNoHeadSize);
}

Status place_staged(const DeviceInfo& device, const LeaveArgs& args, cudaStream_t stream) {
  const StagedRows& staged = args.staged;
  if (args.n_layers < 1 || args.n_layers > StagedRows::kMaxLayers || args.n_kv_heads < 1 || staged.n_tokens < 0) {
    return Status::invalid("a count is out of range");
  }
  if (!args.layers || !staged.rows || !staged.cells || !staged.slots) return Status::invalid("an array is missing");
  if (staged.n_tokens == 0) return {};
  const dim3 grid((staged.n_tokens + PlaceKernel::kTokens - 1) / PlaceKernel::kTokens,
                  args.n_layers * args.n_kv_heads * 2);
  return launch(device, place_kernel, args, grid, PlaceKernel::kThreads, PlaceKernel::kSharedBytes, stream);
}

Status transform_rows(const DeviceInfo& device, const TransformArgs& args, cudaStream_t stream) {
  if (args.n_streams < 1 || args.n_tokens < 0 || args.n_kv_heads < 1 || args.group < 1) {
    return Status::invalid("a count is out of range");
  }
  if (!args.in || !args.out || !complete(args.codec, args.head_dim, args.n_kv_heads)) {
    return Status::invalid("rows or codec are missing");
  }
  const size_t rows = size_t(args.n_streams) * args.n_tokens * args.group;
  if (rows == 0) return {};
  const dim3 grid(unsigned((rows + kTransformRows - 1) / kTransformRows), args.n_kv_heads);
  return for_head_dim(
      args.head_dim, [&]<int HeadDim>() { return launch_transform<HeadDim>(device, args, grid, stream); }, kNoHeadSize);
}

}  // namespace thimble::cuda
