// What the kernels of rows work on. Pointers are device pointers; nothing here owns memory. CellArgs
// (state/cell_args.h) describes the side of the layer.
#pragma once

#include "cuda/state/cell_args.h"
#include "cuda/types.h"

namespace thimble::cuda {

inline constexpr int kMaxRowDim = 512;  // of a head

/// Rows to encode, of any format in the plain order. `side.n` entries of side.cells, where a negative cell is none.
struct EncodeRowsArgs {
  CellArgs side;
  /// New rows, f32: head h of entry i at rows + i * row_stride + h * head_stride. They are rounded to f16, written to
  /// the window's rows `side.slots` and to the store, and coded where they got no row in the window. Null: the entries
  /// are rows `side.slots` of the window, which leave it.
  const float* rows = nullptr;
  size_t row_stride = 0, head_stride = 0;
  /// Where the device alone knows how many entries there are (LayerWindow::n_leaving): that window; side.n is ignored.
  const WindowBooks* books = nullptr;
  const int* n_leaving = nullptr;
};

/// A batch whose rows are not in the window yet.
struct FlightRows {
  int n = 0;
  const int64_t* cells = nullptr;  // [n], as in EncodeArgs
  const float* rows = nullptr;     // [n][n_kv_heads * head_dim]
};

/// Rows of all cells of some streams, as the model wrote them or as close to these as is known.
struct ReadRowsArgs {
  CellArgs side;  // without entries
  int first_stream = 0, n_streams = 1;
  int n_cells = 0;                        // of each stream, from its first cell on
  const int32_t* window_cells = nullptr;  // [all streams][side.capacity], as in ExactRows; null: no window
  FlightRows flight;
  /// Scratch, [n_streams][n_cells], filled by mark_rows: 0: coded; r + 1: row r of the window; -1 - i: row i in flight.
  int32_t* exact = nullptr;
  bool transposed = false;
  uint16_t* out = nullptr;  // [stream][cell][number of a row]; transposed: [stream][number of a row][cell]
  size_t out_stride = 0;    // numbers from one row of `out` to the next, where others lie between them; else 0
};

/// Queries of a batch to keep where the window's judge will ask for them (LayerWindow::judges).
struct KeepQueriesArgs {
  int n_streams = 1, n_tokens = 1, n_heads = 1, head_dim = 0;
  const float* queries = nullptr;  // strides in elements
  size_t stream_stride = 0, token_stride = 0, head_stride = 0;
  const int32_t* judges = nullptr;  // [n_streams][n_judges]: tokens of the stream, -1: none
  int n_judges = 0;
  float* kept = nullptr;  // [n_streams][n_judges][n_heads][head_dim]
};

}  // namespace thimble::cuda
