// The argument structures of the host API and the kernels. All pointers are device pointers unless a comment says
// pinned; nothing here owns memory. Sizes are in elements, strides in what their comment says.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/layout.h"

namespace thimble::cuda {

/// Query rows of one KV head that one thread block attends for. More rows make more row groups.
inline constexpr int kRowGroup = 4;
inline constexpr int kMaxTokens = 8;  // of a stream in one call of attend
inline constexpr int kMaxGroup = 64;  // query heads of a KV head

inline constexpr int kMaxTop = 4096;  // the most cells that retrieval chooses for a stream and KV head

inline constexpr int row_groups(int n_tokens, int group) {
  return (n_tokens * group + kRowGroup - 1) / kRowGroup;
}

/// The codecs of one layer's keys or values; host/tables.h makes them from HeadCodecs.
struct CodecTables {
  int head_dim = 0;
  int width = 0;  // numbers a subspace: 2, 4 or 8. Else in another order of codes, see CodeOrder
  int n_kv_heads = 0;
  uint16_t n_width2 = 0, n_width4 = 0;  // as in CodeOrder
  // In the plain order, where there is no matrix: numbers that the Hadamard rotation takes together; 1: no rotation.
  int hadamard_block = 0;
  /// int8 codewords in the kernels' table order: [n_kv_heads][128][head_dim / 4], or those of tile_cells.h.
  const uint32_t* packed;
  const float* scale;              // [n_kv_heads][n_subspaces]
  const float* words;              // [n_kv_heads][head_dim][128], scale applied
  const float* half_norms;         // [n_kv_heads][n_subspaces][128]
  const float* mean = nullptr;     // [n_kv_heads][head_dim]; the next three are null where the transform is Hadamard
  const float* forward = nullptr;  // [n_kv_heads][head_dim][head_dim]: A
  const float* undo = nullptr;     // the same for the other side of the product: keys B^T, values B = A^-1
  const float* error = nullptr;    // [n_kv_heads][head_dim], HeadCodec::error; null where some head's is not known
  const int32_t* carriers =
      nullptr;  // [n_kv_heads][2]: the components of smallest numbers (bias_kernel.h); null as `error`

  THIMBLE_HOST_DEVICE CodeOrder order() const { return {head_dim, width, n_width2, n_width4}; }
  int n_subspaces() const { return order().n_subspaces(); }
  size_t block_bytes() const { return size_t(order().is_f16() ? 2 * head_dim : n_subspaces() + 2) * 64; }
};

/// Coded keys or values: block `b` of KV head `h` of stream `s` lies at data + s * stream_stride + h * head_stride +
/// b * block_stride. Strides are bytes, multiples of 16, as is the data's address. Memory that was never written must
/// be zero.
struct CacheView {
  uint8_t* data = nullptr;
  size_t stream_stride = 0, head_stride = 0, block_stride = 0;
};

/// Exact keys and values of some cells: f16, as the model wrote them.
struct ExactRows {
  const uint16_t* keys = nullptr;    // [n_streams][n_kv_heads][capacity][head_dim]
  const uint16_t* values = nullptr;  // the same
  const int32_t* cells = nullptr;    // [n_streams][capacity], or [n_streams][n_kv_heads][capacity] if `per_head`;
                                     // -1: unused row
  int capacity = 0;
  bool per_head = false;
};

/// The window's rows, where cells that are being written have theirs; the same memory as an ExactRows with `per_head`
/// off.
struct WindowRows {
  uint16_t* keys = nullptr;  // [n_streams][n_kv_heads][capacity][head_dim]
  uint16_t* values = nullptr;
  const int32_t* slots = nullptr;  // [n_tokens]: row of each token, -1: none. Null: no window
  int capacity = 0;
};

/// New tokens' keys and values, where the model wrote them. Attention reads them there and writes them to the window.
struct NewRows {
  const float *keys = nullptr, *values = nullptr;  // as in EncodeArgs; null: none
  size_t key_token_stride = 0, key_head_stride = 0, value_token_stride = 0, value_head_stride = 0;
  const int32_t* tokens = nullptr;                            // [n_streams][capacity], see LayerWindow
  uint16_t *window_keys = nullptr, *window_values = nullptr;  // the rows of AttendArgs::exact[0]
};

inline constexpr int kMaxWindowRows = 1024;  // of a stream
inline constexpr int kJudgeShift = 24;       // LayerWindow::tokens

/// What a window knows of a stream besides its rows; all zeros at first.
struct WindowBooks {
  uint32_t n_batches, n_written, n_sequences;  // so far; sequences are numbered anew, upwards, in every batch
  uint32_t n_before;                           // written before the last batch
  uint32_t seen_from;                          // the first number that the last batch gave to a sequence
  // Bit 0: whether cells wait for the next batch to leave, as the last one had several tokens of a sequence. Bit i + 1:
  // whether all tokens of number i of these sequences are among its last.
  uint32_t waits;
  // Sequences that the last batch left with too many cells: how many, their numbers, and the bits of those whose cells
  // leave at the beginning of the next batch whatever that shows. Number i is judged by kept query i.
  uint32_t n_judged, judged[kMaxTokens], finishes;
  uint32_t n_rows;  // rows from this one on are unused
};

/// The window of one layer (encode/window_kernel.h). Before the first batch, cells, tokens and judges hold -1, all else
/// 0.
struct LayerWindow {
  int last = 0, pool = 0, spare = 0;  // WindowSize
  int n_kv_heads = 0, group = 0, head_dim = 0;
  WindowBooks* books = nullptr;  // [n_streams]
  int32_t* cells = nullptr;      // [n_streams][capacity], for ExactRows; -1: unused
  /// [n_streams][capacity], of each row: when it was written, counted in tokens, and the last sequence that saw it.
  uint32_t *order = nullptr, *sequence = nullptr;
  /// [n_streams][capacity]: the token whose row is to be written there, or -1. Where it is number j of `judges`, so
  /// that attention is to keep its queries, (j + 1) << kJudgeShift is added.
  int32_t* tokens = nullptr;
  int32_t* judges =
      nullptr;  // [n_streams][n_judges]: tokens, counted in their stream, whose queries are to be kept; -1
  /// Cells that leave the window and are to be encoded from their rows, n_leaving[number of the batch % 2] of them.
  int64_t* leaving_cells = nullptr;  // [n_streams * capacity]
  int32_t* leaving_slots = nullptr;  // their rows in the stream's window
  int* n_leaving = nullptr;          // [2]
  uint32_t* hidden = nullptr;        // for AttendArgs; words of a stream: hidden_stream_stride
  /// Of a batch that is decoded, [n_streams * kMaxTokens]; a prompt's are in WindowArgs.
  int32_t* token_slots = nullptr;  // for WindowRows::slots
  uint32_t* marks = nullptr;       // scratch of the kernel
  const uint16_t* keys = nullptr;  // as in ExactRows
  float* queries = nullptr;        // [n_streams][n_judges][n_heads][head_dim], kept; null: older cells matter more
};

inline constexpr int kJudgeTile = 128;  // cells that a thread block of judge_cells scores
inline constexpr int kMaxJudgeJobs = 64;

/// Cells of one sequence that a prompt leaves with too many: `n` entries from `first` on, in order of writing, of which
/// the first `n_others` are to be scored by comparison with the next `n_recent`. Entry i is row i of the window, or
/// token i - capacity of the batch. The entries [judges, judges + n_judges) are tokens whose queries decide.
struct JudgeJob {
  int first, n, n_others, n_recent, judges, n_judges;
};
/// The jobs of a stream; scores are numbers that compare as the scores do.
struct JudgeList {
  JudgeJob* jobs = nullptr;    // [n_streams][kMaxJudgeJobs]
  int* n_jobs = nullptr;       // [n_streams]
  int32_t* entries = nullptr;  // [n_streams][max_entries]
  uint32_t* scores = nullptr;  // the same
  int max_entries = 0;         // a multiple of kJudgeTile

  /// Where layers have lists one behind the other: that of the i-th one behind this one.
  THIMBLE_HOST_DEVICE JudgeList of_layer(int i, int n_streams) const {
    JudgeList list = *this;
    const size_t streams = size_t(i) * n_streams;
    list.jobs += streams * kMaxJudgeJobs;
    list.n_jobs += streams;
    list.entries += streams * max_entries;
    list.scores += streams * max_entries;
    return list;
  }
};

/// A batch, for the windows of all layers or of one.
struct WindowArgs {
  /// What is to be done: all; or, for a prompt, what comes before judge_cells and what comes behind; or the end of the
  /// batch before, without a batch.
  enum Part { whole, begin, end, finish } part = whole;
  const LayerWindow* layers = nullptr;  // [n_layers]
  int n_layers = 1;
  int n_streams = 1, n_tokens = 0;
  const int64_t* cells = nullptr;  // [n_tokens], as in EncodeArgs
  int cells_per_stream = 0;
  /// Which cells the tokens see: those whose mask, f16, is not -infinity. Row i % mask_tokens of matrix i / mask_tokens
  /// is token i's, for the first mask_cells cells of its stream. Strides in elements. Null: all cells.
  const uint16_t* mask = nullptr;
  size_t mask_token_stride = 0, mask_stream_stride = 0;
  int mask_tokens = 1, mask_cells = 0;
  int n_batch_streams = 1;      // streams that have tokens, equally many
  int slots = 0, capacity = 0;  // rows of a stream, without and with those of tokens in flight, kMaxTokens more
  int n_judges = 0;
  size_t hidden_stream_stride = 0;
  // Of a prompt, [n_tokens]: instead of the layer's.
  int32_t* token_slots = nullptr;
  uint32_t* marks = nullptr;
  int32_t* kept_cells = nullptr;  // [n_streams][capacity]: what LayerWindow::cells are while the prompt is attended to
  uint8_t* flags = nullptr;       // [n_streams][capacity], from `begin` to `end`
  JudgeList judge;                // no jobs: older cells matter more
  /// Whether each layer has arrays of its own of those of a prompt, one behind the other.
  bool by_layer = false;

  /// Of the arrays of a prompt, from a layer's to the next one's.
  THIMBLE_HOST_DEVICE size_t layer_tokens() const { return by_layer ? size_t(n_tokens) : 0; }
  THIMBLE_HOST_DEVICE size_t layer_rows() const { return by_layer ? size_t(n_streams) * capacity : 0; }
  /// `judge` of the i-th layer.
  THIMBLE_HOST_DEVICE JudgeList judge_of(int i) const {
    return by_layer && judge.jobs ? judge.of_layer(i, n_streams) : judge;
  }
};

/// Tokens of a prompt that are coded behind it, of several layers at once. Until then their rows are kept as the model
/// wrote them, f16: head h of token i of layer l at rows + (2 * l + value) * side_stride + (h * n_tokens + i) *
/// head_dim.
struct StagedRows {
  uint16_t* rows = nullptr;
  size_t side_stride = 0;
  int n_tokens = 0;
  const int64_t* cells = nullptr;  // [n_tokens], as in EncodeArgs
  const int32_t* slots = nullptr;  // [n_layers][n_tokens]: row in the window, -1: none
  uint32_t layers[2] = {0, 0};     // by Kind, bit l: whether layer l has rows

  static constexpr int kMaxLayers = 32;
  THIMBLE_HOST_DEVICE bool has(int layer, bool is_key) const {
    return layer < kMaxLayers && (layers[is_key ? 0 : 1] >> layer & 1);
  }
  THIMBLE_HOST_DEVICE uint16_t* of(int layer, bool is_key) const {
    return rows + (2 * layer + (is_key ? 0 : 1)) * side_stride;
  }
};

/// What a prompt's queries say until the cells in question are scored behind its graph, kept by prepare_prompt: the
/// mean of those that decide about a job, [n_layers][streams of the batch][n_jobs][n_heads][head_dim].
struct JudgeMeans {
  float* data = nullptr;
  size_t layer_stride = 0;
  int n_jobs = 0;       // of a stream, at most
  uint32_t layers = 0;  // bit l: whether layer l has any
};

/// Scores the entries of a prompt's jobs (cache/pool.h) and keeps the queries of LayerWindow::judges: in one layer,
/// where keys and queries are those of the model; or, with `means`, in several, by these and by the rows in `staged`.
struct JudgeArgs {
  const LayerWindow* layers = nullptr;  // [n_layers]
  int n_layers = 1;
  JudgeList list;  // of the first layer
  int n_streams = 1;
  int n_kv_heads = 1, group = 1, head_dim = 128;  // of several layers, the most
  int capacity = 0, n_judges = 0;
  const float* keys = nullptr;  // the batch's, as in EncodeArgs
  size_t key_token_stride = 0, key_head_stride = 0;
  const float* queries = nullptr;  // as in AttendArgs, of the batch's streams
  size_t query_stream_stride = 0, query_token_stride = 0, query_head_stride = 0;
  int first_stream = 0, n_batch_streams = 1;
  int stream_tokens = 1;  // of each of these streams
  StagedRows staged = {};
  JudgeMeans means = {};  // no data: none
};

/// Rows by cell, f16: [n_streams][n_kv_heads][n_cells][head_dim].
struct DenseRows {
  uint16_t *keys = nullptr, *values = nullptr;
  int first_stream = 0, n_streams = 0;  // the streams that have rows here
  int n_cells = 0;                      // of each stream, from cell 0 on
  // Of transformed rows, by number: x A instead of (x - mean) A, see transformed_means (host/tables.h). Null: none.
  const float *key_shift = nullptr, *value_shift = nullptr;  // [n_kv_heads][head_dim]
};

/// One layer's keys and values to encode.
struct EncodeArgs {
  int n_kv_heads = 1, head_dim = 128;

  // Tokens to encode, of all streams. Token i goes to cell cells[i] % cells_per_stream of stream cells[i] /
  // cells_per_stream; where cells[i] is -1 there is no token. Strides in elements. Null keys or values are not encoded.
  int n_tokens = 0;
  const float *keys = nullptr, *values = nullptr;  // head h of token i at i * token_stride + h * head_stride
  size_t key_token_stride = 0, key_head_stride = 0, value_token_stride = 0, value_head_stride = 0;
  const int64_t* cells = nullptr;  // [n_tokens]
  int cells_per_stream = 0;
  CacheView key_cache, value_cache;
  CodecTables key_codec, value_codec;
  WindowRows window;  // where new tokens' rows are also written to, as the model wrote them
  DenseRows dense;    // where they are also written to for dense attention, transformed; null: nowhere
  DenseRows store;  // where they are also written to as the model wrote them; may be pinned host memory; null: nowhere

  // Whether the input is n_tokens rows of the window instead of new tokens. The rows `window.slots`, which leave it,
  // are encoded; or, where `window_cells` [n_streams * capacity] is given, these cells' rows are written to `dense` and
  // not encoded.
  bool from_window = false;
  const int32_t* window_cells = nullptr;
  // With `from_window`: that `window` has a row for each token, [n_kv_heads][capacity][head_dim], and tokens with slots
  // are not encoded.
  bool by_token = false;

  int tokens_per_block = 1;  // filled in by the launchers
};

/// The tokens of `args` for attention to read and to write to the window's rows; `tokens` as in NewRows.
inline NewRows new_rows(const EncodeArgs& args, const int32_t* tokens) {
  return {args.keys,
          args.values,
          args.key_token_stride,
          args.key_head_stride,
          args.value_token_stride,
          args.value_head_stride,
          tokens,
          args.window.keys,
          args.window.values};
}

/// The cells that leave the windows of layers.
struct LeaveArgs {
  const EncodeArgs* layers = nullptr;    // device memory, [n_layers]; those without a head size are left out
  const LayerWindow* windows = nullptr;  // theirs
  int n_layers = 0, n_kv_heads = 1;      // the most that a layer has
  int n_tokens = 0;                      // of the batch: says about how many thread blocks to launch
  StagedRows staged;                     // of a prompt: those without a row in the window are coded as well
  int tokens_per_block = 1;              // filled in by the launcher
};

/// Whether a side's cells can be decoded to rows as the model wrote them (DecodeArgs::restored).
inline bool can_restore(const CodecTables& codec) {
  return !codec.forward && codec.width > 0;
}

/// Cells to decode to f16 rows, for dense attention over many queries. The rows stay in the transformed domain, so
/// queries are transformed as well, and outputs back; or, where `restored`, a Hadamard rotation is undone.
struct DecodeArgs {
  int n_streams = 1, n_kv_heads = 1;
  int n_cells = 0;  // from cell 0 on, a multiple of 64
  CacheView cache;
  CodecTables codec;
  bool is_key = true;
  uint16_t* rows = nullptr;      // [n_streams][n_kv_heads][n_cells][head_dim]
  const float* shift = nullptr;  // added to them, [n_kv_heads][head_dim]; null: none
  bool restored = false;         // only where can_restore, and without a shift
};

/// Both sides of a layer.
struct DecodeBothArgs {
  DecodeArgs sides[2];  // by Kind
};

/// Rows of queries to transform, or of attention's outputs to transform back, for attention over decoded rows. Token
/// t's head h of stream s lies at in + s * stream_stride + t * token_stride + h * head_stride.
struct TransformArgs {
  int n_streams = 1, n_tokens = 0, n_kv_heads = 1, group = 1, head_dim = 128;
  const float* in = nullptr;
  size_t stream_stride = 0, token_stride = 0, head_stride = 0;
  CodecTables codec;      // of the keys for queries, of the values for outputs
  bool add_mean = false;  // to outputs, whose weights sum up to 1, of rows without a shift
  float* out = nullptr;   // [n_streams][n_tokens][n_heads][head_dim]; may be `in`, where that has this order
};

/// What dense attention of a prompt over decoded cells needs besides these: exact rows among them, and transformed
/// queries.
struct PromptArgs {
  EncodeArgs
      batch;  // its tokens, the window's rows and `window_cells`, and `dense`, where both are written to, transformed
  int first_window_row = 0, n_window_rows = 0;                // counted through all streams
  uint16_t *staged_keys = nullptr, *staged_values = nullptr;  // where the tokens' rows are kept, see StagedRows
  TransformArgs queries;
  bool is_restored[2] = {false, false};  // by Kind: whether rows are written as the model wrote them, not transformed
  JudgeArgs judge;                       // of this layer, with its `means`, which are written; no data: none
  /// Whether the grid before, which must have started only when all grids before that had ended, reads and writes
  /// nothing of this one's but `batch.dense`. Both then run at once, until this one comes to writing that.
  bool early = false;
};

/// What coded cells' scores lack, to be put into dense rows of keys and into transformed queries
/// (encode/bias_kernel.h).
struct BiasArgs {
  CodecTables codec;  // of the keys
  DenseRows rows;     // their rows, of a layer with rows_kv_heads KV heads
  int rows_kv_heads = 1, group = 1;
  float scale = 1;  // of the scores
  // Cells whose rows are exact: the window's, [n_window_streams][capacity], as in ExactRows, and the batch's,
  // [n_tokens], as in EncodeArgs.
  const int32_t* window_cells = nullptr;
  int n_window_streams = 0, capacity = 0;
  const int64_t* cells = nullptr;
  int n_tokens = 0, cells_per_stream = 1;
  float* queries = nullptr;  // [n_queries][n_kv_heads * group][head_dim]
  int n_queries = 0;
};

/// Retrieval: the `top` cells with the greatest scores for one step's queries are chosen, and their exact keys and
/// values are fetched from the store.
struct RetrieveArgs {
  int n_streams = 1, n_kv_heads = 1, head_dim = 128;
  int n_cells = 0;     // as in AttendArgs
  int row_groups = 1;  // each has scores of its own
  int top = 0;         // cells to choose for each stream and KV head
  // The store: pinned host memory or device memory, as ExactRows are, [n_streams][n_kv_heads][store_cells][head_dim].
  const uint16_t *store_keys = nullptr, *store_values = nullptr;
  int store_cells = 0;

  // Arrays in scratch memory (place_retrieval), which one kernel writes and the next reads. A score is the greatest
  // over a group of 4 query rows, in units of log2 e; -infinity: masked or hidden.
  float* scores = nullptr;         // [n_streams][n_kv_heads][row_groups][n_cells]
  float* block_maxima = nullptr;   // [n_streams][n_kv_heads][row_groups][n_cells / 64]: greatest score of each block
  uint32_t* all_hidden = nullptr;  // [n_streams][n_kv_heads][n_cells / 32]: hidden cells, and chosen ones
  int32_t* cells = nullptr;        // [n_streams][n_kv_heads][top]: the chosen cells, in order; -1: none
  uint16_t *keys = nullptr, *values = nullptr;  // [n_streams][n_kv_heads][top][head_dim]: their rows
};

/// A block table: streams are query tokens, and the cells of each are those of a sequence, whose blocks and exact rows
/// lie anywhere in the caches and in exact[0]. What AttendArgs has a stride between streams for, besides queries and
/// mask, is then by sequence.
struct Pages {
  const int32_t* sequences = nullptr;  // [n_streams]: whose cells a stream attends to. Null: there is no table
  const int32_t* table = nullptr;      // [n_sequences][table_stride]: where each block lies, in CacheView::block_stride
  const int32_t* n_blocks = nullptr;   // [n_sequences]; blocks behind are neither looked up nor read
  int table_stride = 0;
  // Head h of exact row i of a sequence lies at rows[i] * stride + h * head_dim; unused rows are 0.
  const int32_t* rows = nullptr;                    // [n_sequences][exact[0].capacity]
  size_t key_row_stride = 0, value_row_stride = 0;  // multiples of 8
};

/// One attention operation over one layer.
///
/// The query rows of a KV head are row = token * group + head within the group, padded to `row_groups` groups of 4.
struct AttendArgs {
  int n_streams = 1, n_tokens = 1, n_kv_heads = 1, group = 1, head_dim = 128;
  int n_cells = 0;  // attended to, from cell 0 on, exact rows' included; a multiple of 64
  int row_groups = 1;

  CacheView keys, values;
  CodecTables key_codec, value_codec;

  // As the model wrote them. Strides in elements, multiples of 4.
  const float* queries = nullptr;
  size_t query_stream_stride = 0, query_token_stride = 0, query_head_stride = 0;
  float scale = 1;  // of the scores

  /// f16, added to the scores: [n_streams][n_tokens][cells]. Strides in elements, multiples of 8. Null: none.
  const uint16_t* mask = nullptr;
  size_t mask_token_stride = 0, mask_stream_stride = 0;
  float softcap = 0;              // 0: none
  const float* slopes = nullptr;  // [n_heads], ALiBi: factor on the mask. Null: 1
  const float* sinks = nullptr;   // [n_heads], a logit that takes weight and gives no value. Null: none

  /// Hidden cells: bit c % 32 of word c / 32 is set for a cell c that is not attended to from its codes, as it is among
  /// the exact rows. Strides in words; head stride 0: the same for all heads. Null: none.
  const uint32_t* hidden = nullptr;
  size_t hidden_stream_stride = 0, hidden_head_stride = 0;
  ExactRows exact[2];  // the window, and what retrieval fetched
  NewRows fresh;       // rows of the window that are being written
  // Exact rows of cells from this one on are left out: the window may still hold cells that were removed, for which
  // there is no mask.
  int end_cell = INT32_MAX;

  /// f32 [n_streams][n_tokens][n_heads][head_dim].
  float* output = nullptr;

  // Filled by deal_out.
  int n_splits = 1;
  int batch_shift = 0;   // a thread block takes 2^batch_shift items at once; above 0 only where n_splits is 1
  int exact_blocks = 0;  // blocks of coded cells that the first split has less than others, for its exact rows
  int split_blocks = 0, n_larger_splits = 0;       // blocks of coded cells of a split; the first ones have one more
  uint32_t group_inverse = 0, splits_inverse = 0;  // for divisions, which take dozens of instructions otherwise

  // Filled by `attend` from its workspace.
  float* partials = nullptr;  // [n_streams][n_splits, then exact rows][n_kv_heads * row_groups][4 * head_dim + 8]
  int* arrived = nullptr;     // [n_streams][n_kv_heads * row_groups], zero between calls

  // Where queries are kept for the window's judge, as `fresh.tokens` says.
  float* kept_queries = nullptr;  // [n_streams][n_judges][n_heads][head_dim]
  int n_judges = 0;

  Pages pages;
};

/// Splits each stream's cells into `n_splits` items, of which a thread block takes 2^batch_shift at once, and fills in
/// the fields of `args` that follow from this.
inline void deal_out(AttendArgs& args, int n_splits, int exact_blocks, int batch_shift = 0) {
  args.batch_shift = batch_shift;
  args.row_groups = row_groups(args.n_tokens, args.group);
  args.n_splits = n_splits;
  args.exact_blocks = exact_blocks;
  args.split_blocks = (args.n_cells / 64 + exact_blocks) / n_splits;
  args.n_larger_splits = (args.n_cells / 64 + exact_blocks) % n_splits;
  // x / n is x * (2^k / n + 1) / 2^k where x / 2^k < 1 / n: query rows are less than 2^9, of groups of at most 2^6;
  // items less than 2^22, of at most 2^8 splits.
  args.group_inverse = (1u << 16) / uint32_t(args.group) + 1;
  args.splits_inverse = n_splits == 1 ? 0 : uint32_t((1ull << 32) / uint32_t(n_splits) + 1);
}

/// Number of batches of items for one KV head and row group.
inline int n_batches(const AttendArgs& args) {
  return (args.n_streams * args.n_splits + (1 << args.batch_shift) - 1) >> args.batch_shift;
}

/// Scores of all cells are computed into the arrays, which are as in RetrieveArgs. Values, exact rows, sinks and output
/// of `attend` are not used.
struct ScoreArgs {
  AttendArgs attend;
  float *scores = nullptr, *block_maxima = nullptr;
  uint32_t* all_hidden = nullptr;  // becomes a copy of attend.hidden for each KV head
};

/// Returns the arguments of attention after retrieval: `args` with the chosen cells as exact rows. With `drop_tail`,
/// other cells are not attended to from their codes.
inline AttendArgs with_retrieved(AttendArgs args, const RetrieveArgs& retrieve, bool drop_tail) {
  args.exact[1] = {retrieve.keys, retrieve.values, retrieve.cells, retrieve.top, true};
  args.hidden = drop_tail ? nullptr : retrieve.all_hidden;
  args.hidden_head_stride = size_t(args.n_cells / 32);
  args.hidden_stream_stride = args.hidden_head_stride * args.n_kv_heads;
  if (drop_tail) args.n_cells = 0;
  return args;
}

}  // namespace thimble::cuda
