// CudaOps on a device.
#include <cuda_runtime_api.h>

#include <string>
#include <utility>
#include <vector>

#include "api/cuda/ops.h"
#include "api/status.h"
#include "cuda/attend/attend.h"
#include "cuda/encode/encode.h"
#include "cuda/host/device.h"
#include "cuda/state/state.h"

namespace thimble::api {
namespace {

void require_ok(const cuda::Status& status) {
  if (status.ok()) return;
  using Code = cuda::Status::Code;
  const bool no_memory = status.error == cudaErrorMemoryAllocation;
  if (status.code == Code::cuda) (void)cudaGetLastError();  // the next call's errors are its own
  throw Failure(status.code == Code::unsupported ? THIMBLE_UNSUPPORTED
                : no_memory                      ? THIMBLE_OUT_OF_MEMORY
                                                 : THIMBLE_INTERNAL,
                std::string("CUDA: ") + status.message);
}

void require_ok(cudaError_t error) {
  require_ok(cuda::Status::from(error));
}

/// Makes a device the thread's current one for a while.
class Current {
public:
  explicit Current(int device) {
    require_ok(cudaGetDevice(&before_));
    require_ok(cudaSetDevice(device));
  }
  ~Current() { (void)cudaSetDevice(before_); }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

private:
  int before_ = 0;
};

class Tables : public CudaTables {
public:
  explicit Tables(const cuda::HostTables& tables) {
    require_ok(tables_.upload(tables));
    require_ok(cudaStreamSynchronize(nullptr));  // a copy from pageable memory may return before it has arrived
  }
  const cuda::CodecTables& view() const override { return tables_.view(); }

private:
  cuda::DeviceTables tables_;
};

class DeviceOps : public CudaOps {
public:
  explicit DeviceOps(const cuda::DeviceInfo& device)
      : device_(device), name_("sm_" + std::to_string(device.capability)) {
    cudaMemPoolProps props = {};
    props.allocType = cudaMemAllocationTypePinned;
    props.location.type = cudaMemLocationTypeDevice;
    props.location.id = device.ordinal;
    require_ok(cudaMemPoolCreate(&pool_, &props));
    // Scratch memory stays with the context: to get it from the system for each call would wait for the device.
    uint64_t keep = UINT64_MAX;
    if (const cudaError_t e = cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &keep);
        e != cudaSuccess) {
      (void)cudaMemPoolDestroy(pool_);
      require_ok(e);
    }
  }
  ~DeviceOps() override { (void)cudaMemPoolDestroy(pool_); }

  const char* name() const override { return name_.c_str(); }
  bool fits(int head_dim, int key_width, int value_width) const override {
    return cuda::attend_fits(device_, head_dim, key_width, value_width, false);
  }
  int tokens_at_once() const override { return 128; }
  std::unique_ptr<CudaTables> tables(const cuda::HostTables& tables) override {
    const Current current(device_.ordinal);
    return std::make_unique<Tables>(tables);
  }

  void begin(void* stream) override {
    stream_ = static_cast<cudaStream_t>(stream);
    auto current = std::make_unique<Current>(device_.ordinal);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    require_ok(cudaStreamIsCapturing(stream_, &status));
    if (status != cudaStreamCaptureStatusNone) {
      throw Failure(THIMBLE_UNSUPPORTED,
                    "the stream is being captured: a graph would read index arrays that are gone when it is launched; "
                    "call outside of the capture");
    }
    current_ = std::move(current);
  }
  void end() noexcept override {
    for (void* memory : scratch_) (void)cudaFreeAsync(memory, stream_);
    scratch_.clear();
    current_.reset();
  }
  void* scratch(size_t bytes) override {
    scratch_.reserve(scratch_.size() + 1);
    void* memory = nullptr;
    require_ok(cudaMallocFromPoolAsync(&memory, bytes, pool_, stream_));
    scratch_.push_back(memory);
    return memory;
  }
  void* upload(const void* from, size_t bytes) override {
    void* to = scratch(bytes);
    require_ok(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_));
    return to;
  }

  void encode(const cuda::EncodeArgs& args) override { require_ok(cuda::encode(device_, args, stream_)); }
  void read_rows(const cuda::CellArgs& args) override { require_ok(cuda::read_rows(device_, args, stream_)); }
  void widen(const cuda::CellArgs& args) override { require_ok(cuda::widen(device_, args, stream_)); }
  void attend(const cuda::AttendArgs& args) override {
    const size_t bytes = cuda::attend_workspace_bytes(device_, args);
    void* workspace = scratch(bytes);
    require_ok(cudaMemsetAsync(workspace, 0, cuda::kAttendCounterBytes, stream_));
    require_ok(cuda::attend(device_, args, workspace, bytes, stream_));
    scratch_.pop_back();  // of many launches, each takes the place of the one before
    require_ok(cudaFreeAsync(workspace, stream_));
  }

private:
  cuda::DeviceInfo device_;
  std::string name_;
  cudaMemPool_t pool_ = nullptr;
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<Current> current_;
  std::vector<void*> scratch_;
};

}  // namespace

std::unique_ptr<CudaOps> make_cuda_ops(int index) {
  int n_devices = 0;
  if (const cudaError_t e = cudaGetDeviceCount(&n_devices); e != cudaSuccess || index >= n_devices) {
    (void)cudaGetLastError();
    throw Failure(THIMBLE_UNSUPPORTED, "there is no CUDA device " + std::to_string(index) + " (" +
                                           (e == cudaSuccess ? std::to_string(n_devices) + " were found"
                                                             : std::string(cudaGetErrorString(e))) +
                                           "): use another device_index or THIMBLE_DEVICE_CPU");
  }
  const Current current(index);
  cuda::DeviceInfo device;
  require_ok(cuda::query_device(index, &device));
  int has_pools = 0;
  require_ok(cudaDeviceGetAttribute(&has_pools, cudaDevAttrMemoryPoolsSupported, index));
  if (device.capability < 80 || !has_pools) {
    throw Failure(THIMBLE_UNSUPPORTED, "the CUDA device " + std::to_string(index) +
                                           " is too old: the kernels take sm_80 and later, with memory pools");
  }
  return std::make_unique<DeviceOps>(device);
}

}  // namespace thimble::api
