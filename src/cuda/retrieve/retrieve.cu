#include <algorithm>
#include <type_traits>

#include "cuda/host/launch.h"
#include "cuda/layout.h"
#include "cuda/retrieve/kernel.h"
#include "cuda/retrieve/retrieve.h"

namespace thimble::cuda {
namespace {

template <bool OneGroup>
__global__ void __launch_bounds__(RetrieveKernel::kThreads) choose_kernel(const __grid_constant__ RetrieveArgs a) {
  RetrieveKernel::choose<OneGroup>(a);
}
__global__ void __launch_bounds__(RetrieveKernel::kThreads) gather_kernel(const __grid_constant__ RetrieveArgs a) {
  RetrieveKernel::gather(a);
}

Status check(const RetrieveArgs& a) {
  if (a.n_streams < 1 || a.n_kv_heads < 1 || a.row_groups < 1 || a.top < 1) {
    return Status::invalid("a count is out of range");
  }
  if (a.top > kMaxTop) return Status::unsupported("more cells to choose than the kernel can list");
  if (a.n_cells < 1 || a.n_cells % kBlockCells != 0) return Status::invalid("cells must be a multiple of 64");
  if (!a.cells) return Status::invalid("place for chosen cells is missing");
  return {};
}

// Calls take(array, elements) for each of the arrays in scratch memory.
template <typename Take>
void for_each_array(RetrieveArgs& a, Take take) {
  const size_t pairs = size_t(a.n_streams) * a.n_kv_heads, rows = pairs * a.top * a.head_dim;
  take(a.scores, pairs * a.row_groups * a.n_cells);
  take(a.block_maxima, pairs * a.row_groups * (a.n_cells / kBlockCells));
  take(a.all_hidden, pairs * (a.n_cells / 32));
  take(a.cells, pairs * a.top);
  take(a.keys, rows);
  take(a.values, rows);
}

constexpr size_t aligned(size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

}  // namespace

size_t retrieval_bytes(const RetrieveArgs& args) {
  RetrieveArgs a = args;
  size_t bytes = 0;
  for_each_array(a, [&](auto* array, size_t n) { bytes += aligned(n * sizeof(*array)); });
  return bytes;
}

void place_retrieval(void* memory, RetrieveArgs* args) {
  uint8_t* at = static_cast<uint8_t*>(memory);
  for_each_array(*args, [&](auto*& array, size_t n) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(at);
    at += aligned(n * sizeof(*array));
  });
}

Status choose_cells(const DeviceInfo& device, const RetrieveArgs& args, cudaStream_t stream) {
  if (Status s = check(args); !s.ok()) return s;
  if (!args.scores || !args.block_maxima || !args.all_hidden)
    return Status::invalid("scores or place for bits are missing");
  const auto kernel = args.row_groups == 1 ? choose_kernel<true> : choose_kernel<false>;
  return launch(device, kernel, args, dim3(1, args.n_streams * args.n_kv_heads), RetrieveKernel::kThreads,
                RetrieveKernel::kSharedBytes, stream);
}

Status gather_cells(const DeviceInfo& device, const RetrieveArgs& args, cudaStream_t stream) {
  if (Status s = check(args); !s.ok()) return s;
  if (args.head_dim % 8 != 0 || args.store_cells < 1) return Status::invalid("store is of another shape");
  if (!args.store_keys || !args.store_values || !args.keys || !args.values) return Status::invalid("rows are missing");
  const int vectors = args.top * (args.head_dim / 8) * 2;
  const int blocks = std::min((vectors + RetrieveKernel::kThreads - 1) / RetrieveKernel::kThreads, 16);
  return launch(device, gather_kernel, args, dim3(blocks, args.n_streams * args.n_kv_heads), RetrieveKernel::kThreads,
                0, stream);
}

Status retrieve_step(const DeviceInfo& device, const AttendArgs& attend_args, const RetrieveArgs& retrieve_args,
                     bool drop_tail, void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  if (attend_args.fresh.keys) return Status::invalid("new rows are not in the store yet");
  if (retrieve_args.n_streams != attend_args.n_streams || retrieve_args.n_kv_heads != attend_args.n_kv_heads ||
      retrieve_args.n_cells != attend_args.n_cells || retrieve_args.head_dim != attend_args.head_dim ||
      retrieve_args.row_groups != row_groups(attend_args.n_tokens, attend_args.group)) {
    return Status::invalid("the cells that are retrieved are not those that are attended to");
  }
  const ScoreArgs score{attend_args, retrieve_args.scores, retrieve_args.block_maxima, retrieve_args.all_hidden};
  if (Status s = score_cells(device, score, stream); !s.ok()) return s;
  if (Status s = choose_cells(device, retrieve_args, stream); !s.ok()) return s;
  if (Status s = gather_cells(device, retrieve_args, stream); !s.ok()) return s;
  return attend(device, with_retrieved(attend_args, retrieve_args, drop_tail), workspace, workspace_bytes, stream);
}

}  // namespace thimble::cuda
