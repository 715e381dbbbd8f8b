// A KV cache in the memory of a device with kernels of its own. KvBuffer leaves to it what touches codes.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cache/layer.h"
#include "ggml-backend-impl.h"
#include "plugin/nodes.h"
#include "plugin/settings.h"

namespace thimble {

class DeviceCache {
public:
  /// Exact rows that a stream has beside the window's, for the tokens that are being decoded.
  static constexpr int kInFlightRows = 8;
  static constexpr int kMaxRows = 1024;  // exact rows of a stream

  virtual ~DeviceCache() = default;

  /// Binds layer `index` to its shape. `memory`, by Kind, is device memory of CacheSide::memory_bytes for all rows of
  /// the window, those of tokens in flight included, without blocks for values that are not coded. Returns the bytes of
  /// an exact store, which it makes where the layer `retrieves`. Throws std::runtime_error with what the user should
  /// change.
  virtual size_t bind(int index, const CacheShape& shape, const std::vector<HeadCodec>& keys,
                      const std::vector<HeadCodec>& values, uint8_t* const memory[2], bool retrieves,
                      bool values_coded) = 0;
  /// Why a node that `classify` found to touch the cache cannot be run here, or nothing.
  virtual std::string problem(const ggml_tensor* node, NodeKind kind) const = 0;
  virtual void clear() = 0;
  virtual void copy_stream(int layer, Kind kind, int from, int to) = 0;
  virtual const char* kernels() const = 0;

  /// The rows of `n` cells from `first` on, as save_cell writes them. Waits for all that the device does.
  virtual void read_cells(int layer, Kind kind, int64_t first, int64_t n, uint64_t hash, uint8_t* rows) = 0;
  /// Loads rows as load_cell does; returns the entries of `cells` whose rows are refused.
  virtual std::vector<size_t> write_cells(int layer, Kind kind, std::span<const int64_t> cells, uint64_t hash,
                                          const uint8_t* rows) = 0;
};

/// The cache of a buffer on this inner device, or null for the CPU's, which KvBuffer keeps itself. Throws
/// std::runtime_error where the device cannot serve the settings.
std::unique_ptr<DeviceCache> make_device_cache(ggml_backend_dev_t inner, const Settings& settings);

/// Whether THIMBLE0 can wrap this device in this build.
bool can_wrap(ggml_backend_dev_t inner);
bool is_cpu(ggml_backend_dev_t inner);

}  // namespace thimble
