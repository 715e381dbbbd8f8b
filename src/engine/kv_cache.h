// The KV cache of one buffer, with all its layers, as an engine keeps it. It knows which cells are coded, which are
// exact and where both lie; it does not know graphs.
//
// Cells are numbered through all streams of a layer: cell c of stream s is s * cells_per_stream + c. A row is what the
// model wrote of one cell: n_kv_heads * head_dim numbers.
//
// A function that cannot do what is asked throws std::runtime_error with a sentence that says what to change; the cache
// is then as it was.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/problem.h"
#include "cache/pool.h"
#include "engine/lane.h"
#include "engine/layer_plan.h"

namespace thimble {

/// Which cells the tokens of a batch see. Row r of the batch is token r % n_tokens of stream first_stream + r /
/// n_tokens; of its stream's first n_cells cells it sees those whose mask is not -infinity.
struct BatchSight {
  const uint16_t* mask = nullptr;  // f16 [stream][token][cell], strides in elements; null: all
  size_t mask_token = 0, mask_stream = 0;
  int64_t n_tokens = 1;
  int n_streams = 1, first_stream = 0;
  int64_t n_cells = 0;

  bool sees(int64_t row, int64_t cell, int64_t cells_per_stream) const {
    const int64_t stream = row < n_tokens ? 0 : row / n_tokens, token = row - stream * n_tokens;
    const int64_t in_stream = cell - (first_stream + stream) * cells_per_stream;
    if (in_stream < 0 || in_stream >= n_cells) return false;
    return !mask || mask[stream * mask_stream + token * mask_token + in_stream] != 0xfc00;  // -infinity
  }
};

/// New keys or values of a layer. Pointers are to memory that the engine computes in (device memory on CUDA).
struct WriteTask {
  int layer = 0;
  Kind kind = Kind::key;
  int64_t n_rows = 0;
  const void* rows = nullptr;  // f32, or f16; the numbers of a row are adjacent
  bool is_f16 = false;
  size_t row_bytes = 0;                 // from one row to the next
  const void* cells = nullptr;          // [n_rows]: the cell that each row goes to
  bool is_i64 = true;                   // type of the numbers of cells: int64_t, or int32_t
  size_t cell_bytes = sizeof(int64_t);  // from one number of a cell to the next
  // Of a transposed cache, [stream][number of a row][cell], `cells` are the places where the rows' first numbers go to:
  // a stream has so many places, and so many cells. Else 0.
  int64_t stream_places = 0, stream_cells = 0;
  BatchSight sight;  // of the first attention over this cache in the graph

  /// The cell of a row, where the host can read it.
  int64_t cell(int64_t row) const;
};

/// Attention of a batch over a layer.
struct AttendTask {
  int layer = 0;
  AttentionProblem problem;
  int key_dim = 0;
  bool has_sinks = false;  // known before problem.sinks, which is null while `refusal` is asked
  bool ends_batch = true;  // this is the last attention over the layer in the graph

  BatchSight sight() const;
};

/// Rows of a layer that the host program reads by itself, for attention that it computes in its own way. All rows of a
/// stream's first n_cells cells, as f16: those kept exactly as they are, the others decoded.
struct ReadTask {
  int layer = 0;
  Kind kind = Kind::key;
  int first_stream = 0, n_streams = 1;
  int64_t n_cells = 0;
  bool transposed = false;
  uint16_t* rows = nullptr;  // [stream][cell][number of a row]; transposed: [stream][number of a row][cell]
  size_t row_stride = 0;     // numbers from one row to the next, where `rows` has others between them; else 0
  BatchSight sight;          // of the batch
  BatchQueries queries;      // of the batch; without them, older cells matter more (Window::commit)
  bool ends_batch = true;    // this is the last use of the layer in the graph
};

/// Attention that the host program is to compute, because it does so faster, over f16 rows in memory of the engine's.
struct DenseAttention {
  const float* q = nullptr;        // [n_streams][n_tokens][n_heads][dim]; null: the task's own queries
  const uint16_t* keys = nullptr;  // [n_streams][n_kv_heads][n_cells][dim]
  const uint16_t* values = nullptr;
  int dim = 0;
  int n_kv_heads = 0;
  bool is_whole = false;  // outputs are then the attention's, and end_dense has nothing to do
};

/// Keys as f32, [cells][n_kv_heads][head_dim], and each cell's shift in positions, [cells], in memory that the engine
/// computes in.
struct KeyRows {
  float* keys = nullptr;
  const int32_t* shifts = nullptr;
};

/// Rows of a saved state that a cache refuses: their indices among the rows that were to be written, and the reason.
struct RefusedRows {
  std::vector<size_t> entries;
  std::string why;
};

/// What a recording has of one layer's writes.
struct RecordedWrites {
  int layer = 0;
  bool has[2] = {false, false};  // by Kind
  bool takes_batch = false;      // the recording takes the batch into the windows of all layers, as its first writes
  size_t n_layers = 0;           // that the cache had
};

/// Why an engine refuses to read rows that cannot.
inline constexpr const char* kReadsNoRows =
    "this device computes flash attention alone over a coded cache: start with --flash-attn on, or run a model that "
    "cannot have it without the THIMBLE device (--device none, or thimble --kv f16)";

class KvCache {
public:
  virtual ~KvCache() = default;

  /// Adds a layer. `memory`, by Kind, has Engine::side_bytes(plan, kind) bytes and must outlive the cache.
  virtual void add_layer(const LayerPlan& plan, const LayerCodecs& codecs, uint8_t* const memory[2]) = 0;

  /// A sentence that says why a task of this form cannot be run, or "". Pointers of the task may still be null.
  virtual std::string refusal(const WriteTask&) const { return {}; }
  virtual std::string refusal(const AttendTask&) const { return {}; }
  virtual std::string refusal(const ReadTask&) const { return kReadsNoRows; }

  /// Writes one side of a batch. Keys and values come in either order, and before the attention over them.
  virtual void write(const Lane& lane, const WriteTask& task) = 0;
  /// Returns true where it has done the attention. Where it returns false, the caller computes *dense and then, unless
  /// that is the whole of it, calls end_dense.
  virtual bool attend(const Lane& lane, const AttendTask& task, DenseAttention* dense) = 0;
  virtual void end_dense(const Lane&, const AttendTask&) {}
  /// Decodes rows to memory of the caller's.
  virtual void read(const Lane&, const ReadTask&) { throw std::runtime_error(kReadsNoRows); }
  /// Takes rows into the cache that were written to a layer and not attended to yet, before the host program overwrites
  /// them.
  virtual void flush(const Lane&, int /*layer*/) {}
  /// Ends what the tasks of a graph began, behind its nodes, where tasks run on a Queue. What it enqueues the inner
  /// backend does not wait for.
  virtual void end_graph(const Lane&) {}
  /// Drops rows that were written and not taken into the cache, because their graph has failed.
  virtual void abandon() {}
  /// A sentence for the user about something that happened since the last call, or "".
  virtual std::string take_warning() { return {}; }

  // Tasks of any of the layers can be recorded on a Queue and done again. What the cache counts on the host must then
  // go on as if the tasks were given anew.
  /// Whether tasks, other than reading, can be recorded.
  virtual bool can_record() const { return false; }
  /// From now on tasks are recorded and not done.
  virtual void begin_recording() {}
  /// Ends this, and returns what take_recorded wants to know. Tasks that will not be done are forgotten.
  virtual std::vector<RecordedWrites> end_recording(bool /*will_be_done*/) { return {}; }
  /// To be called before tasks are done once more, in the place of giving them. False where these recorded ones are not
  /// what they would be now; nothing has changed then.
  virtual bool take_recorded(const std::vector<RecordedWrites>&) { return false; }

  /// Writes the saved rows of `n` cells from `first` on to `rows`, as save_cell (cache/state_row.h) does.
  virtual void read_cells(int layer, Kind kind, int64_t first, int64_t n, uint8_t* rows) = 0;
  /// Loads saved rows as load_cell does; no cell comes twice. Keys of a cell come before its values.
  virtual RefusedRows write_cells(int layer, Kind kind, std::span<const int64_t> cells, const uint8_t* rows) = 0;

  /// The most cells that read_keys takes.
  virtual int64_t keys_at_once() const { return 256; }
  /// A context shift of some cells: read_keys decodes their keys, the caller rotates them in place, and write_keys
  /// writes them back. Exact rows stay exact, others are coded again. Nothing else is called in between.
  virtual KeyRows read_keys(int layer, std::span<const int64_t> cells, std::span<const int32_t> shifts) = 0;
  virtual void write_keys(int layer, std::span<const int64_t> cells) = 0;

  /// Copies one stream's cells to the same cells of another. Keys are copied before values.
  virtual void copy_stream(int layer, Kind kind, int from, int to) = 0;
  virtual void clear() = 0;
};

}  // namespace thimble
