// A layer of a KV cache in device memory, as arguments of kernels. The counterpart of cache/layer.h, without ggml; the
// blocks lie where the caller says.
#pragma once

#include <memory>
#include <vector>

#include "cache/layer.h"
#include "cuda/attend/formats.h"
#include "cuda/host/device.h"
#include "cuda/host/memory.h"
#include "cuda/host/tables.h"
#include "cuda/host/window.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// One layer's codes, codecs and window; with an exact store, the rows of all cells as well.
class DeviceLayer {
public:
  /// Of memory: blocks, the window's rows and, behind the keys', the window's books.
  static size_t side_bytes(Kind kind, const CacheShape& shape, const Format& format, int capacity, bool coded);

  /// `memory`, by Kind: device memory of side_bytes, which outlives the layer. Values of which only the window's and
  /// retrieved ones are read need not be coded, nor those of a layer that has keys alone. `capacity`: rows of a
  /// stream's window. `by`: how cells are attended to, which the order of codes depends on; `nothing`: they are read as
  /// rows.
  Status init(const CacheShape& shape, const std::vector<HeadCodec>& keys, const std::vector<HeadCodec>& values,
              WindowSize window, int capacity, uint8_t* const memory[2], bool values_coded, AttendBy by);

  const CacheShape& shape() const { return shape_; }
  /// Of values, 0 where the layer has keys alone.
  int head_dim(Kind kind = Kind::key) const { return codec(kind).head_dim; }
  bool is_read_as_rows() const { return codec(Kind::key).width < 0; }
  /// Of a cell's keys or values as the model wrote them.
  size_t row_bytes(Kind kind) const { return size_t(shape_.n_kv_heads) * head_dim(kind) * sizeof(uint16_t); }
  const CodecTables& codec(Kind kind) const { return tables_[int(kind)].view(); }
  /// transformed_means (tables.h) of keys or values. Null where there are none.
  const float* shift(Kind kind) const { return shift_[int(kind)].as<float>(); }
  /// From `stream` on. Without data where there are no codes.
  CacheView view(Kind kind, int stream = 0) const;
  ExactRows window_rows(int stream) const;
  /// All of it, for kernels that code, without tokens.
  EncodeArgs encode_args() const;
  DeviceWindow& window() { return window_; }
  const DeviceWindow& window() const { return window_; }

  /// Makes the exact store, in pinned memory. Once only.
  Status add_store();
  bool has_store() const { return store_[0].size() > 0; }
  size_t store_bytes() const { return store_[0].size() + store_[1].size(); }
  /// Rows of all cells, from `stream` on.
  DenseRows store_rows(int stream = 0) const;

  /// Blocks, window rows, stored rows; with the keys, the window's books.
  Status copy_stream(Kind kind, int from, int to);
  /// The window and the store. Blocks and window rows are the caller's.
  Status clear();

private:
  bool coded(Kind kind) const { return kind == Kind::key || values_coded_; }
  size_t stream_bytes(Kind kind) const {
    return coded(kind) ? size_t(shape_.blocks_per_stream()) * codec(kind).block_bytes() : 0;
  }
  uint16_t* rows(Kind kind, int stream) const;
  size_t stored_stream(Kind kind) const {  // numbers
    return size_t(shape_.n_kv_heads) * shape_.cells_per_stream * head_dim(kind);
  }

  CacheShape shape_;
  int capacity_ = 0;
  bool values_coded_ = true;
  Status add_shift(Kind kind, const std::vector<HeadCodec>& codecs);

  DeviceTables tables_[2];
  DeviceMemory shift_[2];
  DeviceWindow window_;
  uint8_t* memory_[2] = {nullptr, nullptr};
  PinnedMemory store_[2];
};

}  // namespace thimble::cuda
