// The cache of a buffer in the memory of a CUDA device.
#pragma once

#include <map>
#include <memory>

#include "cuda/host/cache.h"
#include "cuda/state/state.h"
#include "plugin/device_cache.h"

namespace thimble {

class CudaCache : public DeviceCache {
public:
  CudaCache(ggml_backend_dev_t inner, const Settings& settings);

  size_t bind(int index, const CacheShape& shape, const std::vector<HeadCodec>& keys,
              const std::vector<HeadCodec>& values, uint8_t* const memory[2], bool retrieves,
              bool values_coded) override;
  std::string problem(const ggml_tensor* node, NodeKind kind) const override;
  void clear() override;
  void copy_stream(int layer, Kind kind, int from, int to) override;
  const char* kernels() const override { return "CUDA"; }
  void read_cells(int layer, Kind kind, int64_t first, int64_t n, uint64_t hash, uint8_t* rows) override;
  std::vector<size_t> write_cells(int layer, Kind kind, std::span<const int64_t> cells, uint64_t hash,
                                  const uint8_t* rows) override;

  /// CellState's, of a layer.
  float* read_keys(int layer, std::span<const int64_t> cells);
  void write_keys(int layer, std::span<const int64_t> cells);

  cuda::DeviceWindow& window() { return window_; }
  size_t n_layers() const { return layers_.size(); }
  cuda::DeviceLayer& layer(int index) { return *layers_.at(index); }

  /// Takes a batch's tokens into the window, and codes the cells that leave it, of all layers.
  void begin_batch(const int64_t* cells, int n_tokens, const cuda::BatchMask& mask, cudaStream_t stream);

private:
  cuda::CellState state();
  cuda::HostWindow host_window() const;

  cuda::DeviceInfo device_;
  WindowSize window_size_;
  cuda::DeviceWindow window_;
  std::map<int, std::unique_ptr<cuda::DeviceLayer>> layers_;
  // The layers as code_leaving wants them. Captured graphs may go on reading older tables than the last.
  std::vector<cuda::DeviceMemory> leaving_;
  size_t n_leaving_ = 0;
  std::unique_ptr<cuda::StateKernels> state_kernels_;  // once a state is saved or loaded
};

/// What a ggml device of the CUDA backend is to the CUDA runtime. Throws std::runtime_error where it is none.
cuda::DeviceInfo cuda_device(ggml_backend_dev_t inner);

/// Throws std::runtime_error with `what` and the reason where a status is not ok.
void require(const cuda::Status& status, const char* what);

}  // namespace thimble
