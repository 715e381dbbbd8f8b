// A KV cache in device memory: what a DeviceLayer and the window that all layers share hold, as arguments of kernels.
// The counterpart of cache/layer.h, without ggml; the blocks lie where the caller says.
#pragma once

#include <memory>
#include <vector>

#include "cache/layer.h"
#include "cuda/host/device.h"
#include "cuda/host/memory.h"
#include "cuda/state/host_window.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// What the tokens of a batch see, as in WindowArgs.
struct BatchMask {
  const uint16_t* data = nullptr;
  size_t token_stride = 0, stream_stride = 0;
  int n_tokens = 1, n_streams = 1, n_cells = 0;
};

/// Which cells the window holds, the same for all layers: the rule of cache/window.h without a judge.
class DeviceWindow {
public:
  Status init(const CacheShape& shape, WindowSize size);
  Status clear();
  Status copy_stream(int from, int to);

  /// All of it, for cells that are loaded; and what it became. After all that the device does with it.
  Status read(HostWindow* window) const;
  Status write(const HostWindow& window);

  /// Rows of a stream: those of the window, and of the tokens which are just being decoded.
  static int rows_of_stream(WindowSize size, int64_t cells_per_stream, int n_streams);
  int capacity() const { return capacity_; }
  int64_t cells_per_stream() const { return shape_.cells_per_stream; }
  int n_streams() const { return shape_.n_streams; }

  /// Counts the next batch, whose arguments of update_window these are. `cells` is device memory.
  WindowArgs begin_batch(const int64_t* cells, int n_tokens, const BatchMask& mask);
  uint64_t batch() const { return batch_; }
  /// Enqueues a copy of the window's cells as they are before a batch: while a layer's rows of it are not written yet,
  /// these are what its rows hold.
  Status keep_cells(cudaStream_t stream);

  const int32_t* slots() const { return slots_.as<int32_t>(); }
  /// What leaves with a batch, for code_leaving.
  void fill(LeaveArgs& args) const;
  const int32_t* tokens(int stream) const { return tokens_.as<int32_t>() + size_t(stream) * capacity(); }
  const int32_t* cells(int stream) const { return cells_.as<int32_t>() + size_t(stream) * capacity(); }
  const int32_t* kept_cells() const { return kept_cells_.as<int32_t>(); }
  const uint32_t* hidden(int stream) const { return hidden_.as<uint32_t>() + stream * hidden_stride(); }
  size_t hidden_stride() const { return size_t(shape_.blocks_per_stream()) * kBlockCells / 32; }

private:
  CacheShape shape_;
  WindowSize size_{0, 0, 0};
  int capacity_ = 0;
  uint64_t batch_ = 0;  // batches taken in
  DeviceMemory books_, order_, sequence_, marks_, cells_, kept_cells_, slots_, tokens_, hidden_;
  DeviceMemory leaving_cells_, leaving_slots_, n_leaving_;
};

/// One layer's codes, codecs and window rows; with an exact store, the rows of all cells as well.
class DeviceLayer {
public:
  /// `memory`, by Kind: device memory of CacheSide::memory_bytes(shape, format, capacity * n_streams, coded), which
  /// outlives the layer. Values of which only the window's and retrieved ones are read need not be coded.
  Status init(const CacheShape& shape, const std::vector<HeadCodec>& keys, const std::vector<HeadCodec>& values,
              int capacity, uint8_t* const memory[2], bool values_coded);

  const CacheShape& shape() const { return shape_; }
  int head_dim() const { return codec(Kind::key).head_dim; }
  /// Of a cell's keys or values as the model wrote them.
  size_t row_bytes() const { return size_t(shape_.n_kv_heads) * head_dim() * sizeof(uint16_t); }
  const CodecTables& codec(Kind kind) const { return tables_[int(kind)].view(); }
  /// From `stream` on. Without data where there are no codes.
  CacheView view(Kind kind, int stream = 0) const;
  ExactRows window_rows(const DeviceWindow& window, int stream) const;
  WindowRows window_slots(const DeviceWindow& window) const;
  /// All of it, for kernels that code, without tokens.
  EncodeArgs encode_args(const DeviceWindow& window) const;

  /// Makes the exact store, in pinned memory. Once only.
  Status add_store();
  bool has_store() const { return store_[0].size() > 0; }
  size_t store_bytes() const { return store_[0].size() + store_[1].size(); }
  /// Rows of all cells, from `stream` on.
  DenseRows store_rows(int stream = 0) const;

  /// Blocks, window rows, stored rows.
  Status copy_stream(Kind kind, int from, int to);
  /// Of what the layer owns: the store. Blocks and window rows are the caller's.
  Status clear();

  uint64_t batch[2] = {0, 0};  // by Kind: the window's batch that was written last

private:
  bool coded(Kind kind) const { return kind == Kind::key || values_coded_; }
  size_t stream_bytes(Kind kind) const {
    return coded(kind) ? size_t(shape_.blocks_per_stream()) * codec(kind).block_bytes() : 0;
  }
  uint16_t* rows(Kind kind, int stream) const;
  size_t stored_stream() const { return size_t(shape_.n_kv_heads) * shape_.cells_per_stream * head_dim(); }  // numbers

  CacheShape shape_;
  int capacity_ = 0;
  bool values_coded_ = true;
  DeviceTables tables_[2];
  uint8_t* memory_[2] = {nullptr, nullptr};
  PinnedMemory store_[2];
};

}  // namespace thimble::cuda
