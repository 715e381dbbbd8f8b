#include <algorithm>

#include "cuda/host/launch.h"
#include "cuda/rows/rows.h"
#include "cuda/rows/rows_kernel.h"

namespace thimble::cuda {
namespace {

using Rows = RowsOfAnySize;

__global__ void __launch_bounds__(Rows::kThreads) read_any_kernel(const __grid_constant__ CellArgs a) {
  Rows::read(a);
}
__global__ void __launch_bounds__(Rows::kThreads) put_any_kernel(const __grid_constant__ CellArgs a) {
  Rows::put(a);
}
__global__ void __launch_bounds__(Rows::kThreads) encode_rows_kernel(const __grid_constant__ EncodeRowsArgs a) {
  Rows::encode(a);
}
template <bool InFlight>
__global__ void __launch_bounds__(Rows::kThreads) mark_rows_kernel(const __grid_constant__ ReadRowsArgs a) {
  Rows::mark<InFlight>(a);
}
__global__ void __launch_bounds__(Rows::kThreads) read_all_kernel(const __grid_constant__ ReadRowsArgs a) {
  Rows::read_all(a);
}
__global__ void __launch_bounds__(Rows::kThreads) keep_kernel(const __grid_constant__ KeepQueriesArgs a) {
  Rows::keep(a);
}

unsigned groups(size_t n, size_t of) {
  return unsigned((n + of - 1) / of);
}

Status check(const CellArgs& side) {
  if (side.n_kv_heads < 1 || side.cells_per_stream < 1 || side.head_dim < 1) {
    return Status::invalid("a count is out of range");
  }
  if (side.head_dim > kMaxRowDim) return Status::unsupported("heads of more than 512 numbers");
  if (side.codec.head_dim != side.head_dim) return Status::invalid("codec tables are of another shape");
  return {};
}

template <typename Args>
Status launch_for(const DeviceInfo& device, void (*kernel)(Args), const Args& args, const CellArgs& side,
                  unsigned blocks, cudaStream_t stream) {
  if (Status s = check(side); !s.ok()) return s;
  if (blocks == 0) return {};
  return launch(device, kernel, args, dim3(blocks, side.n_kv_heads), Rows::kThreads, Rows::shared_bytes(side.head_dim),
                stream);
}

}  // namespace

Status encode_rows(const DeviceInfo& device, const EncodeArgs& args, cudaStream_t stream) {
  if (args.dense.keys || args.window_cells) return Status::invalid("these layers have no dense rows");
  if (args.n_tokens == 0) return {};
  if (!args.cells) return Status::invalid("cells are missing");
  for (Kind kind : {Kind::key, Kind::value}) {
    const bool is_key = kind == Kind::key;
    const float* rows = is_key ? args.keys : args.values;
    EncodeRowsArgs e;
    e.side = side_of(args, kind);
    if (e.side.head_dim == 0 || (!rows && !args.from_window)) continue;
    e.side.n = args.n_tokens;
    e.side.cells = args.cells;
    e.side.slots = args.window.slots;
    e.rows = args.from_window ? nullptr : rows;
    e.row_stride = is_key ? args.key_token_stride : args.value_token_stride;
    e.head_stride = is_key ? args.key_head_stride : args.value_head_stride;
    const unsigned blocks = groups(args.n_tokens, Rows::kWarps);
    if (Status s = launch_for(device, encode_rows_kernel, e, e.side, blocks, stream); !s.ok()) return s;
  }
  return {};
}

Status code_leaving_rows(const DeviceInfo& device, const EncodeArgs& layer, const LayerWindow& window, int n_tokens,
                         cudaStream_t stream) {
  for (Kind kind : {Kind::key, Kind::value}) {
    EncodeRowsArgs e;
    e.side = side_of(layer, kind);
    if (e.side.head_dim == 0) continue;
    e.side.cells = window.leaving_cells;
    e.side.slots = window.leaving_slots;
    e.books = window.books;
    e.n_leaving = window.n_leaving;
    const unsigned blocks = std::clamp(groups(n_tokens, Rows::kWarps), 1u, 32u);
    if (Status s = launch_for(device, encode_rows_kernel, e, e.side, blocks, stream); !s.ok()) return s;
  }
  return {};
}

Status read_rows(const DeviceInfo& device, const ReadRowsArgs& args, cudaStream_t stream) {
  if (!args.exact || !args.out || args.n_streams < 1 || args.n_cells < 0) {
    return Status::invalid("places for rows are missing");
  }
  const size_t n = size_t(args.n_streams) * args.n_cells;
  if (n == 0) return {};
  if (const cudaError_t e = cudaMemsetAsync(args.exact, 0, n * sizeof(int32_t), stream); e != cudaSuccess) {
    return Status::from(e);
  }
  const auto mark = [&](auto kernel, size_t rows) {
    if (rows == 0) return Status();
    return launch(device, kernel, args, dim3(groups(rows, Rows::kThreads)), Rows::kThreads, 0, stream);
  };
  if (args.window_cells) {
    if (Status s = mark(mark_rows_kernel<false>, size_t(args.n_streams) * args.side.capacity); !s.ok()) return s;
  }
  if (Status s = mark(mark_rows_kernel<true>, size_t(args.flight.n)); !s.ok()) return s;
  return launch_for(device, read_all_kernel, args, args.side, groups(n, Rows::kWarps), stream);
}

Status read_any_rows(const DeviceInfo& device, const CellArgs& args, cudaStream_t stream) {
  return launch_for(device, read_any_kernel, args, args, groups(args.n, Rows::kWarps), stream);
}

Status put_any_rows(const DeviceInfo& device, const CellArgs& args, cudaStream_t stream) {
  return launch_for(device, put_any_kernel, args, args, groups(args.n, Rows::kWarps), stream);
}

Status keep_queries(const DeviceInfo& device, const KeepQueriesArgs& args, cudaStream_t stream) {
  if (args.n_judges == 0) return {};
  return launch(device, keep_kernel, args, dim3(args.n_judges, args.n_streams), Rows::kThreads, 0, stream);
}

}  // namespace thimble::cuda
