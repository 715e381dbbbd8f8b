#include <algorithm>

#include "cuda/launch.h"
#include "cuda/layout.h"
#include "cuda/retrieve.h"
#include "cuda/retrieve_kernel.h"

namespace thimble::cuda {
namespace {

__global__ void __launch_bounds__(RetrieveKernel::kThreads) choose_kernel(const __grid_constant__ RetrieveArgs a) {
  RetrieveKernel::choose(a);
}
__global__ void __launch_bounds__(RetrieveKernel::kThreads) gather_kernel(const __grid_constant__ RetrieveArgs a) {
  RetrieveKernel::gather(a);
}

Status check(const RetrieveArgs& a) {
  if (a.n_streams < 1 || a.n_kv_heads < 1 || a.top < 1) return Status::invalid("a count is out of range");
  if (a.n_cells < 1 || a.n_cells % kBlockCells != 0) return Status::invalid("cells must be a multiple of 64");
  if (!a.cells) return Status::invalid("place for chosen cells is missing");
  return {};
}

}  // namespace

Status choose_cells(const DeviceInfo& device, const RetrieveArgs& args, cudaStream_t stream) {
  if (Status s = check(args); !s.ok()) return s;
  if (!args.scores || !args.all_hidden) return Status::invalid("scores or place for bits are missing");
  return launch(device, choose_kernel, args, dim3(1, args.n_streams * args.n_kv_heads), RetrieveKernel::kThreads,
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

}  // namespace thimble::cuda
