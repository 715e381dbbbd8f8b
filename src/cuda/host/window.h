// The windows of a cache's layers in device memory, as arguments of kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "cache/layer.h"
#include "cuda/host/memory.h"
#include "cuda/state/host_window.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// What the tokens of a batch see, as in WindowArgs.
struct BatchMask {
  const uint16_t* data = nullptr;
  size_t token_stride = 0, stream_stride = 0;
  int n_tokens = 1, n_streams = 1, first_stream = 0, n_cells = 0;
};

/// Which cells of a layer are exact: the rule of cache/window.h. The arrays lie where the caller says.
class DeviceWindow {
public:
  /// Rows of a stream: those of the window, and of the tokens which are just being decoded.
  static int rows_of_stream(WindowSize size, int64_t cells_per_stream, int n_streams);
  /// Sequences of a stream that one batch can leave with too many cells: in a stream of its own there is one.
  static int judges_of_stream(int n_streams) { return n_streams == 1 ? kMaxTokens : 1; }
  /// Of memory, aligned to 256 bytes.
  static size_t bytes(const CacheShape& shape, int capacity);

  /// `keys`: the window's rows.
  Status init(const CacheShape& shape, WindowSize size, int capacity, uint8_t* memory, const uint16_t* keys,
              int head_dim);
  Status clear();
  Status copy_stream(int from, int to);

  /// From now on, queries of this many heads are kept, and cells judged by them. Whether `view` changed.
  Status keep_queries(int n_heads, bool* changed);
  bool is_judged() const { return view_.queries != nullptr; }

  /// All of it, for cells that are loaded; and what it became. After all that the device does with it.
  Status read(HostWindow* window) const;
  Status write(const HostWindow& window);

  const LayerWindow& view() const { return view_; }
  int n_judges() const { return judges_of_stream(shape_.n_streams); }
  const int32_t* cells(int stream) const { return view_.cells + size_t(stream) * capacity_; }
  const int32_t* tokens(int stream) const { return view_.tokens + size_t(stream) * capacity_; }
  const int32_t* judges(int stream) const { return view_.judges + size_t(stream) * n_judges(); }
  float* queries(int stream) const { return view_.queries + stream * stream_queries(); }
  const uint32_t* hidden(int stream) const { return view_.hidden + stream * hidden_stride(); }
  size_t hidden_stride() const { return size_t(shape_.blocks_per_stream()) * kBlockCells / 32; }

private:
  size_t rows() const { return size_t(shape_.n_streams) * capacity_; }
  size_t stream_queries() const { return size_t(n_judges()) * view_.n_kv_heads * view_.group * view_.head_dim; }
  static size_t place(const CacheShape& shape, int capacity, uint8_t* memory, LayerWindow* window);

  CacheShape shape_;
  int capacity_ = 0;
  LayerWindow view_;
  DeviceMemory queries_;
};

/// What the windows of a cache share: what a batch needs besides.
class WindowScratch {
public:
  Status init(const CacheShape& shape, int capacity);

  /// Of a batch, for the windows of all layers. `cells` is device memory.
  WindowArgs batch(const int64_t* cells, int n_tokens, const BatchMask& mask) const;
  /// Without one, for what the last batch left (WindowArgs::finish).
  WindowArgs finish() const;
  /// Adds what a prompt needs, whose layers come one after another.
  void add_prompt(WindowArgs* args) const;
  /// The same where each of args->n_layers layers has arrays of its own (WindowArgs::by_layer), in `memory` of
  /// prompt_bytes.
  void add_prompt(WindowArgs* args, char* memory) const;
  size_t prompt_bytes(const WindowArgs& args) const;
  /// Of the layers from number `first` on, whose arrays are `args`'.
  static WindowArgs from_layer(WindowArgs args, size_t first, size_t n);
  /// What judge_cells needs of a prompt with so many tokens a stream: memory of judge_bytes.
  size_t judge_bytes(int stream_tokens) const;
  JudgeList judge_list(int stream_tokens, char* memory) const;

  int capacity() const { return capacity_; }
  const CacheShape& shape() const { return shape_; }
  /// Of the prompt that came last.
  const int32_t* token_slots() const { return slots_.as<int32_t>(); }
  const int32_t* kept_cells() const { return kept_cells_.as<int32_t>(); }

private:
  CacheShape shape_;
  int capacity_ = 0;
  int judge_entries(int stream_tokens) const;
  size_t place_prompt(WindowArgs* args, char* memory) const;

  DeviceMemory marks_, slots_, kept_cells_, flags_, jobs_, n_jobs_;
};

}  // namespace thimble::cuda
