// What the kernels of states work on: chosen cells of one layer's keys or values. Pointers are device pointers, `store`
// may be pinned host memory; nothing here owns memory.
#pragma once

#include "cuda/types.h"

namespace thimble::cuda {

struct CellArgs {
  bool is_key = true;
  int n_kv_heads = 1, head_dim = 128;
  int cells_per_stream = 0;
  CacheView cache;  // no data: not coded
  CodecTables codec;

  int n = 0;
  const int64_t* cells = nullptr;  // [n], numbered through all streams; read_rows leaves out what is negative
  // The window's row of each cell, -1 where it has none. Null: the window is not looked at.
  const int32_t* slots = nullptr;  // [n]
  uint16_t* window = nullptr;      // [n_streams][n_kv_heads][capacity][head_dim]
  int capacity = 0;
  uint16_t* store = nullptr;  // [n_streams][n_kv_heads][cells_per_stream][head_dim]; null: none

  // The other side: one of these, by kernel.
  uint8_t* vectors = nullptr;  // [n][n_kv_heads][codec.n_subspaces() + 2]: codes and scales, canonical
  uint16_t* halves = nullptr;  // [n][n_kv_heads][head_dim], f16, as the model wrote them
  float* floats = nullptr;     // the same as f32
  size_t row_stride = 0;       // of read_rows' halves and floats, in numbers; 0: n_kv_heads * head_dim
};

/// One side of a layer, without entries.
inline CellArgs side_of(const EncodeArgs& layer, Kind kind) {
  const bool is_key = kind == Kind::key;
  CellArgs side;
  side.is_key = is_key;
  side.n_kv_heads = layer.n_kv_heads;
  side.cells_per_stream = layer.cells_per_stream;
  side.cache = is_key ? layer.key_cache : layer.value_cache;
  side.codec = is_key ? layer.key_codec : layer.value_codec;
  side.head_dim = side.codec.head_dim;
  side.window = is_key ? layer.window.keys : layer.window.values;
  side.capacity = layer.window.capacity;
  side.store = is_key ? layer.store.keys : layer.store.values;
  return side;
}

}  // namespace thimble::cuda
