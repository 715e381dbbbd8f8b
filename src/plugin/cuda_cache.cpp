#include "plugin/cuda_cache.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <utility>

#include "cuda/attend/attend.h"
#include "cuda/encode/encode.h"
#include "cuda/layout.h"
#include "plugin/kv_buffer.h"

namespace thimble {

static_assert(DeviceCache::kInFlightRows == cuda::kMaxTokens && DeviceCache::kMaxRows == cuda::kMaxWindowRows);

void require(const cuda::Status& status, const char* what) {
  if (!status.ok()) throw std::runtime_error(std::string(what) + ": " + status.message);
}

cuda::DeviceInfo cuda_device(ggml_backend_dev_t inner) {
  ggml_backend_dev_props props;
  ggml_backend_dev_get_props(inner, &props);
  int ordinal = -1;
  if (!props.device_id) throw std::runtime_error("the CUDA device has no PCI address");
  require(cuda::Status::from(cudaDeviceGetByPCIBusId(&ordinal, props.device_id)), "CUDA device");
  require(cuda::Status::from(cudaSetDevice(ordinal)), "CUDA device");
  cuda::DeviceInfo info;
  require(cuda::query_device(ordinal, &info), "CUDA device");
  return info;
}

CudaCache::CudaCache(ggml_backend_dev_t inner, const Settings& settings)
    : device_(cuda_device(inner)), window_size_(settings.window) {
  using Store = Settings::Store;
  if (settings.top == 0) return;
  if (settings.store != Store::automatic && settings.store != Store::pinned) {
    throw std::runtime_error(
        "a CUDA device reads the exact store over the bus, from pinned RAM: use store=pinned, or device=CPU for a "
        "store in plain RAM or a file");
  }
  if (settings.top > cuda::kMaxTop) {
    throw std::runtime_error("a CUDA device chooses at most " + std::to_string(cuda::kMaxTop) +
                             " cells: use a smaller top=, or device=CPU");
  }
}

size_t CudaCache::bind(int index, const CacheShape& shape, const std::vector<HeadCodec>& keys,
                       const std::vector<HeadCodec>& values, uint8_t* const memory[2], bool retrieves,
                       bool values_coded) {
  const std::string where = "layer " + std::to_string(index) + " on a CUDA device: ";
  const Format &k = keys.front().format, &v = values.front().format;
  if (!cuda::cuda_supports(k) || !cuda::cuda_supports(v) || k.head_dim != v.head_dim ||
      (v.width(0) != k.width(0) && v.width(0) != 2 * k.width(0))) {
    throw std::runtime_error(where +
                             "there are kernels for heads of 64, 128 and 256 numbers, keys and values alike, at "
                             "bits=4, 2, 1, 4/2 and 2/1, of one width in each vector (thimble calibrate --even); use "
                             "one of these, bits=16 or device=CPU");
  }
  if (!cuda::attend_fits(device_, k.head_dim, k.width(0), v.width(0), retrieves)) {
    const bool fewer_bits = cuda::attend_fits(device_, k.head_dim, 4, 4, retrieves);
    throw std::runtime_error(where + "at this rate heads of " + std::to_string(k.head_dim) +
                             " numbers take more shared memory than this GPU has: use " +
                             (fewer_bits ? "bits=2, " : "") + "bits=16 or device=CPU");
  }
  if (shape.cells_per_stream % kBlockCells != 0) {
    throw std::runtime_error(where + "the context must be a multiple of 64 cells");
  }
  require(cuda::Status::from(cudaSetDevice(device_.ordinal)), "CUDA device");
  if (layers_.empty()) {
    require(window_.init(shape, window_size_), "memory of the window");
  } else if (shape.cells_per_stream != window_.cells_per_stream() || shape.n_streams != window_.n_streams()) {
    throw std::runtime_error(where + "layers of one cache must have the same cells");
  }
  auto layer = std::make_unique<cuda::DeviceLayer>();
  require(layer->init(shape, keys, values, window_.capacity(), memory, values_coded), where.c_str());
  if (const cuda::Status status = retrieves ? layer->add_store() : cuda::Status(); !status.ok()) {
    throw std::runtime_error(where + "no pinned RAM for its exact store (" + status.message +
                             "), which takes as much as an f16 cache: use a smaller context, a machine or a limit "
                             "(ulimit -l) with more of it, or leave top= out");
  }
  const size_t store_bytes = layer->store_bytes();
  layers_[index] = std::move(layer);
  return store_bytes;
}

std::string CudaCache::problem(const ggml_tensor* node, NodeKind kind) const {
  if (kind == NodeKind::write && (node->src[0]->type != GGML_TYPE_F32 || node->src[1]->type != GGML_TYPE_I64)) {
    return "new keys and values must be f32 and their cells 64-bit numbers on a CUDA device";
  }
  if (kind != NodeKind::attend) return {};
  const ManagedLayer* layer = KvBuffer::layer_of(node->src[1]);
  const auto it = layer ? layers_.find(layer->index) : layers_.end();
  const bool has_means = it != layers_.end() && it->second->codec(Kind::key).mean;
  if (has_means && (attention_parameters(node).softcap != 0 || node->src[4])) {
    // Both need q.mean, which the kernels leave out: softmax alone does not see it.
    return "this model has attention sinks or a softcap, which take a codec without means on a CUDA device: leave the "
           "profile out, or use device=CPU";
  }
  if (node->src[1]->ne[1] % kBlockCells != 0) return "its cells are no multiple of 64";
  return {};
}

void CudaCache::begin_batch(const int64_t* cells, int n_tokens, const cuda::BatchMask& mask, cudaStream_t stream) {
  std::set<int> head_dims;
  cuda::LeaveArgs leave;
  std::vector<cuda::EncodeArgs> layers;
  for (const auto& [index, layer] : layers_) {
    if (layer->has_store()) continue;  // its tokens are coded as they come
    layers.push_back(layer->encode_args(window_));
    leave.n_kv_heads = std::max(leave.n_kv_heads, layer->shape().n_kv_heads);
    head_dims.insert(layer->head_dim());
  }
  const size_t bytes = layers.size() * sizeof(layers[0]);
  if (std::exchange(n_leaving_, layers.size()) != layers.size()) {
    require(leaving_.emplace_back().reserve(bytes), "memory for the layers");
    require(cuda::Status::from(cudaMemcpy(leaving_.back().as<void>(), layers.data(), bytes, cudaMemcpyHostToDevice)),
            "the layers");
  }
  require(cuda::update_window(device_, window_.begin_batch(cells, n_tokens, mask), stream), "the window");
  if (layers.empty()) return;
  leave.layers = leaving_.back().as<cuda::EncodeArgs>();
  leave.n_layers = int(layers.size());
  leave.n_tokens = n_tokens;
  window_.fill(leave);
  for (int head_dim : head_dims) require(cuda::code_leaving(device_, leave, head_dim, stream), "encoding");
}

void CudaCache::clear() {
  require(window_.clear(), "the window");
  for (auto& [index, layer] : layers_) require(layer->clear(), "the exact store");
}

cuda::CellState CudaCache::state() {
  require(cuda::Status::from(cudaSetDevice(device_.ordinal)), "CUDA device");
  if (!state_kernels_) state_kernels_ = cuda::state_kernels(device_);
  return cuda::CellState(*state_kernels_);
}

cuda::HostWindow CudaCache::host_window() const {
  cuda::HostWindow window;
  require(window_.read(&window), "the window");
  return window;
}

void CudaCache::read_cells(int layer, Kind kind, int64_t first, int64_t n, uint64_t hash, uint8_t* rows) {
  cuda::CellState cells = state();
  cells.save(layers_.at(layer)->encode_args(window_), kind, host_window(), first, n, hash, rows);
}

std::vector<size_t> CudaCache::write_cells(int layer, Kind kind, std::span<const int64_t> cells, uint64_t hash,
                                           const uint8_t* rows) {
  std::vector<cuda::EncodeArgs> layers;
  size_t index = 0;
  for (const auto& [number, each] : layers_) {
    if (number == layer) index = layers.size();
    layers.push_back(each->encode_args(window_));
  }
  cuda::CellState to = state();
  cuda::HostWindow window = host_window();
  auto refused = to.load(layers, index, kind, window, cells, hash, rows);
  if (kind == Kind::key) require(window_.write(window), "the window");
  return refused;
}

float* CudaCache::read_keys(int layer, std::span<const int64_t> cells) {
  cuda::CellState state = this->state();
  return state.read_keys(layers_.at(layer)->encode_args(window_), host_window(), cells);
}

void CudaCache::write_keys(int layer, std::span<const int64_t> cells) {
  cuda::CellState state = this->state();
  state.write_keys(layers_.at(layer)->encode_args(window_), host_window(), cells);
}

void CudaCache::copy_stream(int layer, Kind kind, int from, int to) {
  const auto it = layers_.find(layer);
  if (it == layers_.end()) return;
  require(cuda::Status::from(cudaDeviceSynchronize()), "copying a sequence");
  require(it->second->copy_stream(kind, from, to), "copying a sequence");
  require(window_.copy_stream(from, to), "copying a sequence");
  require(cuda::Status::from(cudaDeviceSynchronize()), "copying a sequence");
}

}  // namespace thimble
