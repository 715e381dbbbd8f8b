#include "engine/cuda/cuda_engine.h"

#include <stdexcept>

#include "cuda/attend/attend.h"
#include "cuda/layout.h"
#include "engine/cuda/cuda_caches.h"
#include "engine/cuda/cuda_queue.h"
#include "engine/cuda/cuda_reserved.h"

namespace thimble {
namespace {

cuda::DeviceInfo find_device(const std::string& id) {
  if (id.empty()) throw std::runtime_error("the CUDA device has no PCI address");
  int ordinal = -1;
  require(cudaDeviceGetByPCIBusId(&ordinal, id.c_str()), "CUDA device");
  require(cudaSetDevice(ordinal), "CUDA device");
  cuda::DeviceInfo info;
  require(cuda::query_device(ordinal, &info), "CUDA device");
  return info;
}

class CudaEngine : public Engine {
public:
  explicit CudaEngine(const HostDevice& device) : id_(device.id) {}

  std::string kernels() const override { return "CUDA"; }
  std::string store_place(const Settings&) const override { return "pinned RAM"; }

  std::string refusal(const Settings& settings) const override {
    using Store = Settings::Store;
    if (settings.top == 0) return {};
    if (settings.store != Store::automatic && settings.store != Store::pinned) {
      return "a CUDA device reads the exact store over the bus, from pinned RAM: use store=pinned, or device=CPU for a "
             "store in plain RAM or a file";
    }
    if (settings.top > cuda::kMaxTop) {
      return "a CUDA device chooses at most " + std::to_string(cuda::kMaxTop) +
             " cells: use a smaller top=, or device=CPU";
    }
    return {};
  }

  std::string refusal(const LayerPlan&) const override { return {}; }

  bool attends(const LayerPlan& plan) const override {
    const Format &k = plan.side(Kind::key), &v = plan.side(Kind::value);
    const bool has_kernels = cuda::attend_by(device(), k, v, plan.top > 0) != cuda::AttendBy::nothing;
    return has_kernels && plan.latent == 0 && plan.group >= 1 && plan.group <= cuda::kMaxGroup &&
           plan.shape.cells_per_stream % kBlockCells == 0;
  }

  std::string why_slow(const LayerPlan& plan) const override {
    if (plan.as_f16) return {};
    if (plan.as_rows) {
      return "cells are decoded for each batch, and llama.cpp's own attention runs on them (docs/guide/gpu.md)";
    }
    if (plan.side(Kind::key).f16) return {};
    return cuda::attend_by(device(), plan.side(Kind::key), plan.side(Kind::value), plan.top > 0) ==
                   cuda::AttendBy::tiles
               ? "on this GPU cells are decoded to tiles at their rates (docs/guide/gpu.md)"
               : "";
  }

  bool leaves_f16(const Settings& settings) const override { return settings.passthrough(); }

  size_t side_bytes(const LayerPlan& plan, Kind kind) const override {
    const CacheShape& shape = plan.shape;
    const int rows = cuda::DeviceWindow::rows_of_stream(plan.window, shape.cells_per_stream, shape.n_streams);
    return cuda::DeviceLayer::side_bytes(kind, shape, plan.side(kind), rows, plan.has_codes[int(kind)]);
  }

  std::unique_ptr<ReservedMemory> reserve(size_t size) override {
    require(cudaSetDevice(device().ordinal), "CUDA device");
    return reserve_cuda_memory(device().ordinal, size);
  }
  std::unique_ptr<KvCache> make_cache(const Settings&) override { return std::make_unique<CudaCaches>(device()); }
  std::unique_ptr<Queue> make_queue() override { return std::make_unique<CudaQueue>(device()); }

private:
  // To ask the driver for a device starts it, which a program that only lists devices need not wait for.
  const cuda::DeviceInfo& device() const {
    if (!found_) device_ = find_device(id_);
    found_ = true;
    return device_;
  }

  std::string id_;
  mutable bool found_ = false;
  mutable cuda::DeviceInfo device_;
};

}  // namespace

std::unique_ptr<Engine> make_cuda_engine(const HostDevice& device) {
  return std::make_unique<CudaEngine>(device);
}

}  // namespace thimble
