#include "cuda/encode/bias.h"
#include "cuda/encode/bias_kernel.h"
#include "cuda/host/launch.h"

namespace thimble::cuda {
namespace {

using Bias = BiasKernel;

__global__ void __launch_bounds__(Bias::kThreads) coded_kernel(const __grid_constant__ BiasArgs a) {
  Bias::coded(a);
}
__global__ void __launch_bounds__(Bias::kThreads) exact_kernel(const __grid_constant__ BiasArgs a) {
  Bias::exact(a);
}
__global__ void __launch_bounds__(Bias::kThreads) queries_kernel(const __grid_constant__ BiasArgs a) {
  Bias::queries(a);
}

}  // namespace

Status add_bias(const DeviceInfo& device, const BiasArgs& a, cudaStream_t stream) {
  if (!a.codec.error || !a.codec.carriers || !a.rows.keys || !a.queries || a.codec.head_dim < 2 ||
      a.rows_kv_heads < 1 || a.group < 1) {
    return Status::invalid("rows, queries or errors are missing");
  }
  const auto run = [&](void (*kernel)(BiasArgs), size_t n, int per_block, int heads) {
    if (n == 0) return Status();
    return launch(device, kernel, a, dim3(unsigned((n + per_block - 1) / per_block), heads), Bias::kThreads, 0, stream);
  };
  const size_t n_cells = size_t(a.rows.n_streams) * a.rows.n_cells;
  if (Status s = run(coded_kernel, n_cells, Bias::kThreads, a.rows_kv_heads); !s.ok()) return s;
  const size_t n_exact = size_t(a.n_window_streams) * a.capacity + a.n_tokens;
  if (Status s = run(exact_kernel, n_exact, Bias::kThreads, a.rows_kv_heads); !s.ok()) return s;
  return run(queries_kernel, size_t(a.n_queries) * a.rows_kv_heads * a.group, Bias::kWarps, 1);
}

}  // namespace thimble::cuda
