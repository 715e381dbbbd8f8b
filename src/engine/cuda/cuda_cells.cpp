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

// A layer's window, with the last batch behind it in all layers.
cuda::HostWindow CudaCache::host_window(const Layer& of) {
  cuda::HostWindow window;
  require(of.device.window().read(&window), "the window");
  const auto waits = [](const cuda::WindowBooks& books) { return books.finishes != 0; };
  if (n_tables_ == 0 || std::none_of(window.books.begin(), window.books.end(), waits)) return window;
  cuda::WindowArgs args = scratch_.finish();
  args.layers = window_tables_.back().as<cuda::LayerWindow>();
  args.n_layers = int(n_tables_);
  require(cuda::update_window(device_, args, nullptr), "the window");
  code_leaving(leaving(0, n_tables_, cuda::kMaxTokens * args.n_streams), nullptr);
  require(of.device.window().read(&window), "the window");
  return window;
}

void CudaCache::read_cells(int index, Kind kind, int64_t first, int64_t n, uint8_t* rows) {
  const Layer& of = layer(index);
  cuda::CellState cells = state();
  const cuda::HostWindow window = host_window(of);
  const cuda::EncodeArgs args = of.device.encode_args();
  cells.save(args, kind, window, first, n, of.hashes, rows);
  if (kind == Kind::value || index != saved_layer_) saved_orders_.end();
  if (kind == Kind::value || args.store.keys) return;
  saved_layer_ = index;
  saved_orders_.save(window, first, n, rows, of.device.row_bytes(kind));
}

RefusedRows CudaCache::write_cells(int index, Kind kind, std::span<const int64_t> cells, const uint8_t* rows) {
  Layer& of = layer(index);
  cuda::CellState to = state();
  cuda::HostWindow window = host_window(of);
  const cuda::EncodeArgs args = of.device.encode_args();
  saved_orders_.end();
  std::vector<uint32_t> orders;
  if (kind == Kind::key && !args.store.keys) {
    const size_t bytes = of.device.row_bytes(kind);
    const RowLayout layout = {of.device.head_dim(kind) * sizeof(uint16_t), 0, of.hashes};
    std::vector<bool> exact;
    for (size_t i = 0; i < cells.size(); i++) {
      const RowKind what = row_kind(rows + i * bytes, layout);
      exact.push_back(what == RowKind::exact || what == RowKind::mixed);
    }
    orders = saved_orders_.find(exact, rows, bytes);
  }
  RefusedRows refused;
  refused.entries = to.load(args, kind, window, cells, of.hashes, rows, orders);
  if (!refused.entries.empty()) refused.why = kOtherSettings;
  if (kind == Kind::key) require(of.device.window().write(window), "the window");
  return refused;
}

KeyRows CudaCache::read_keys(int index, std::span<const int64_t> cells, std::span<const int32_t> shifts) {
  cuda::CellState state = this->state();
  require(shifts_.reserve(shifts.size_bytes()), "positions");
  require(cudaMemcpy(shifts_.as<int32_t>(), shifts.data(), shifts.size_bytes(), cudaMemcpyHostToDevice), "positions");
  const Layer& of = layer(index);
  return {state.read_keys(of.device.encode_args(), host_window(of), cells), shifts_.as<int32_t>()};
}

void CudaCache::write_keys(int index, std::span<const int64_t> cells) {
  cuda::CellState state = this->state();
  const Layer& of = layer(index);
  state.write_keys(of.device.encode_args(), host_window(of), cells);
}

void CudaCache::copy_stream(int index, Kind kind, int from, int to) {
  require(cudaDeviceSynchronize(), "copying a sequence");
  require(layer(index).device.copy_stream(kind, from, to), "copying a sequence");
  require(cudaDeviceSynchronize(), "copying a sequence");
}

void CudaCache::clear() {
  for (auto& [index, layer] : layers_) require(layer->device.clear(), "the window");
}

}  // namespace thimble
