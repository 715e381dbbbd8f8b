#include <stdexcept>
#include <string>

#include "cuda/encode/encode.h"
#include "cuda/host/launch.h"
#include "cuda/host/memory.h"
#include "cuda/rows/rows.h"
#include "cuda/state/cells_kernel.h"
#include "cuda/state/state.h"

namespace thimble::cuda {
namespace {

template <bool ToBlocks>
__global__ void __launch_bounds__(CodesKernel::kThreads) codes_kernel(const __grid_constant__ CellArgs a) {
  CodesKernel::run<ToBlocks>(a);
}

template <int HeadDim>
__global__ void __launch_bounds__(RowsKernel<HeadDim>::kThreads) read_kernel(const __grid_constant__ CellArgs a) {
  RowsKernel<HeadDim>::read(a);
}

template <int HeadDim>
__global__ void __launch_bounds__(RowsKernel<HeadDim>::kThreads) put_kernel(const __grid_constant__ CellArgs a) {
  RowsKernel<HeadDim>::put(a);
}

template <bool Round>
__global__ void __launch_bounds__(ConvertKernel::kThreads) convert_kernel(const __grid_constant__ CellArgs a) {
  ConvertKernel::run<Round>(a);
}

unsigned groups(size_t n, size_t of) {
  return unsigned((n + of - 1) / of);
}

using Kernel = void (*)(CellArgs);

Status launch_rows(const DeviceInfo& device, const CellArgs& a, cudaStream_t stream, Kernel of_64, Kernel of_128,
                   Kernel of_256) {
  const Kernel kernel = a.head_dim == 64 ? of_64 : a.head_dim == 128 ? of_128 : of_256;
  const dim3 grid(groups(a.n, RowsKernel<64>::kWarps), a.n_kv_heads);
  const size_t shared = RowsKernel<64>::kWarps * a.head_dim * sizeof(float);
  return launch(device, kernel, a, grid, RowsKernel<64>::kThreads, shared, stream);
}

Status launch_convert(const DeviceInfo& device, const CellArgs& a, cudaStream_t stream, Kernel kernel) {
  const dim3 grid(groups(size_t(a.n) * a.n_kv_heads * a.head_dim, ConvertKernel::kNumbers));
  return launch(device, kernel, a, grid, ConvertKernel::kThreads, 0, stream);
}

void require(const Status& status) {
  if (!status.ok()) throw std::runtime_error(std::string("the state of a cache: ") + status.message);
}
void require(cudaError_t error) {
  require(Status::from(error));
}

class CudaStateKernels : public StateKernels {
public:
  explicit CudaStateKernels(const DeviceInfo& device) : device_(device) {
    require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~CudaStateKernels() override {
    if (host_) (void)cudaFreeHost(host_);
    (void)cudaStreamDestroy(stream_);
  }

  void* device_memory(Scratch which, size_t bytes) override {
    DeviceMemory& memory = scratch_[int(which)];
    require(memory.reserve(bytes));
    return memory.as<void>();
  }
  void* host_memory(size_t bytes) override {
    if (bytes <= host_bytes_) return host_;
    if (host_) require(cudaFreeHost(host_));
    host_ = nullptr;
    host_bytes_ = 0;
    require(cudaMallocHost(&host_, bytes));
    host_bytes_ = bytes;
    return host_;
  }

  void begin() override {
    require(cudaSetDevice(device_.ordinal));
    require(cudaDeviceSynchronize());
  }
  void wait() override { require(cudaStreamSynchronize(stream_)); }
  void copy(void* to, const void* from, size_t bytes) override {
    require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_));
  }

  void gather_codes(const CellArgs& a) override { codes(a, codes_kernel<false>); }
  void scatter_codes(const CellArgs& a) override { codes(a, codes_kernel<true>); }
  void read_rows(const CellArgs& a) override { require(cuda::read_rows(device_, a, stream_)); }
  void put_rows(const CellArgs& a) override {
    if (a.codec.width < 0) return require(put_any_rows(device_, a, stream_));
    require(launch_rows(device_, a, stream_, put_kernel<64>, put_kernel<128>, put_kernel<256>));
  }
  void widen(const CellArgs& a) override { require(cuda::widen(device_, a, stream_)); }
  void round(const CellArgs& a) override { require(launch_convert(device_, a, stream_, convert_kernel<true>)); }
  void encode(const EncodeArgs& args) override {
    require(args.key_codec.width < 0 ? encode_rows(device_, args, stream_) : cuda::encode(device_, args, stream_));
  }

private:
  void codes(const CellArgs& a, Kernel kernel) {
    const dim3 grid(groups(a.n, CodesKernel::kCells), a.n_kv_heads);
    require(launch(device_, kernel, a, grid, CodesKernel::kThreads, 0, stream_));
  }
  DeviceInfo device_;
  cudaStream_t stream_ = nullptr;
  DeviceMemory scratch_[int(Scratch::count)];
  void* host_ = nullptr;
  size_t host_bytes_ = 0;
};

}  // namespace

Status read_rows(const DeviceInfo& device, const CellArgs& a, cudaStream_t stream) {
  if (a.codec.width < 0) return read_any_rows(device, a, stream);
  return launch_rows(device, a, stream, read_kernel<64>, read_kernel<128>, read_kernel<256>);
}

Status widen(const DeviceInfo& device, const CellArgs& a, cudaStream_t stream) {
  return launch_convert(device, a, stream, convert_kernel<false>);
}

std::unique_ptr<StateKernels> state_kernels(const DeviceInfo& device) {
  return std::make_unique<CudaStateKernels>(device);
}

}  // namespace thimble::cuda
