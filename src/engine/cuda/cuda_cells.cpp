// Cells of a CudaCache to and from saved states, and what moves or clears them.
#include <algorithm>
#include <stdexcept>

#include "cache/state_row.h"
#include "engine/cuda/cuda_cache.h"

namespace thimble {

cuda::CellState CudaCache::state() {
  require(cudaSetDevice(device_.ordinal), "CUDA device");
  if (!state_kernels_) state_kernels_ = cuda::state_kernels(device_);
  return cuda::CellState(*state_kernels_);
}

cuda::HostWindow CudaCache::host_window() const {
  cuda::HostWindow window;
  require(window_.read(&window), "the window");
  return window;
}

void CudaCache::read_cells(int index, Kind kind, int64_t first, int64_t n, uint8_t* rows) {
  cuda::CellState cells = state();
  cells.save(layer(index).device.encode_args(window_), kind, host_window(), first, n, hash_, rows);
}

RefusedRows CudaCache::write_cells(int index, Kind kind, std::span<const int64_t> cells, const uint8_t* rows) {
  std::vector<cuda::EncodeArgs> layers;
  size_t at = 0;
  for (const auto& [number, each] : layers_) {
    if (number == index) at = layers.size();
    layers.push_back(each->device.encode_args(window_));
  }
  cuda::CellState to = state();
  cuda::HostWindow window = host_window();
  RefusedRows refused;
  refused.entries = to.load(layers, at, kind, window, cells, hash_, rows);
  if (!refused.entries.empty()) refused.why = kOtherSettings;
  if (kind == Kind::key) require(window_.write(window), "the window");
  return refused;
}

KeyRows CudaCache::read_keys(int index, std::span<const int64_t> cells, std::span<const int32_t> shifts) {
  cuda::CellState state = this->state();
  require(shifts_.reserve(shifts.size_bytes()), "positions");
  require(cudaMemcpy(shifts_.as<int32_t>(), shifts.data(), shifts.size_bytes(), cudaMemcpyHostToDevice), "positions");
  return {state.read_keys(layer(index).device.encode_args(window_), host_window(), cells), shifts_.as<int32_t>()};
}

void CudaCache::write_keys(int index, std::span<const int64_t> cells) {
  cuda::CellState state = this->state();
  state.write_keys(layer(index).device.encode_args(window_), host_window(), cells);
}

void CudaCache::copy_stream(int index, Kind kind, int from, int to) {
  require(cudaDeviceSynchronize(), "copying a sequence");
  require(layer(index).device.copy_stream(kind, from, to), "copying a sequence");
  require(window_.copy_stream(from, to), "copying a sequence");
  require(cudaDeviceSynchronize(), "copying a sequence");
}

void CudaCache::clear() {
  if (layers_.empty()) return;
  require(window_.clear(), "the window");
  for (auto& [index, layer] : layers_) require(layer->device.clear(), "the exact store");
}

}  // namespace thimble
