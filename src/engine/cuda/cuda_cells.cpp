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

std::vector<cuda::EncodeArgs> CudaCache::all_layers() const {
  std::vector<cuda::EncodeArgs> all;
  for (const auto& [index, each] : layers_) all.push_back(each->device.encode_args(window_));
  return all;
}

// The window, with the last batch behind it.
cuda::HostWindow CudaCache::host_window() {
  cuda::HostWindow window;
  require(window_.read(&window), "the window");
  if (state().finish(all_layers(), window)) require(window_.write(window), "the window");
  return window;
}

void CudaCache::read_cells(int index, Kind kind, int64_t first, int64_t n, uint8_t* rows) {
  cuda::CellState cells = state();
  const cuda::HostWindow window = host_window();
  const cuda::EncodeArgs args = layer(index).device.encode_args(window_);
  cells.save(args, kind, window, first, n, hash_, rows);
  if (kind == Kind::value || index != layers_.begin()->first) return saved_orders_.end();
  if (!args.store.keys) saved_orders_.save(window, first, n, rows, layer(index).device.row_bytes());
}

// llama.cpp loads all keys, layer by layer, before the values.
std::span<const uint32_t> CudaCache::orders_of(int index, std::span<const int64_t> cells, const uint8_t* rows) {
  if (index == layers_.begin()->first) {
    const cuda::DeviceLayer& device = layer(index).device;
    const size_t bytes = device.row_bytes();
    std::vector<bool> exact;
    for (size_t i = 0; i < cells.size(); i++) {
      exact.push_back(row_kind(rows + i * bytes, hash_, /*codes=*/true) == RowKind::exact);
    }
    arrived_.assign(cells.begin(), cells.end());
    arrived_orders_ = device.has_store() ? std::vector<uint32_t>() : saved_orders_.find(exact, rows, bytes);
  }
  return std::ranges::equal(cells, arrived_) ? arrived_orders_ : std::span<const uint32_t>();
}

RefusedRows CudaCache::write_cells(int index, Kind kind, std::span<const int64_t> cells, const uint8_t* rows) {
  const size_t at = size_t(std::distance(layers_.begin(), layers_.find(index)));
  cuda::CellState to = state();
  cuda::HostWindow window = host_window();
  RefusedRows refused;
  saved_orders_.end();
  const auto orders = kind == Kind::key ? orders_of(index, cells, rows) : std::span<const uint32_t>();
  refused.entries = to.load(all_layers(), at, kind, window, cells, hash_, rows, orders);
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
