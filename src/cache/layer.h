// The cache of one layer: coded blocks of every stream and KV head for K and for V, and the window's exact rows; or,
// with an exact store, the exact rows of all cells. A cell is coded when it leaves the window, not before: short
// contexts cost no coding. The caller owns the memory of the blocks and says where they lie.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cache/exact_rows.h"
#include "cache/pool.h"
#include "cache/window.h"
#include "codec/head_codec.h"
#include "store/exact_store.h"

namespace thimble {

struct CacheShape {
  int n_kv_heads = 0;
  int64_t cells_per_stream = 0;
  int n_streams = 1;

  int64_t n_cells() const { return cells_per_stream * n_streams; }
  int64_t blocks_per_stream() const { return (cells_per_stream + kBlockCells - 1) / kBlockCells; }
};

/// Where the blocks of one side lie, in bytes: block b of stream s and KV head h at
///   h * head_stride + page * block_stride
/// with page = s * blocks_per_stream + b or, in a paged cache, table[s * blocks_per_stream + b].
struct BlockPlaces {
  size_t head_stride = 0;
  size_t block_stride = 0;
  const int32_t* table = nullptr;  // [n_streams][blocks_per_stream], or null; must outlive the side

  int64_t page(int64_t block) const { return table ? table[block] : block; }
};

/// The keys or the values of one layer.
///
/// Memory, where the side is not a view of blocks that lie elsewhere: block[n_kv_heads][n_streams][blocks_per_stream]
/// of format.block_bytes() each, then exact[n_slots][n_kv_heads * head_dim] f16, the window's rows as the model wrote
/// them (not transformed). With an exact store n_slots is 0: the store holds all rows, the batch's in flight as well.
class CacheSide {
public:
  /// Bytes of memory for a side whose window has `n_slots` rows there.
  static size_t memory_bytes(const CacheShape& shape, const Format& format, int n_slots, bool coded = true);

  /// `codecs` has one codec a KV head, all of one format. `memory` must outlive the side; it is not cleared. With an
  /// exact store `coded` may be false, for values that are only read where they are retrieved (tail=drop): the side
  /// then has no blocks.
  CacheSide(const CacheShape& shape, std::shared_ptr<const std::vector<HeadCodec>> codecs, int n_slots, uint8_t* memory,
            std::unique_ptr<ExactStore> store = nullptr, bool coded = true);
  /// A view of blocks of the caller's, without exact rows: `blocks` is page 0 of KV head 0 and must outlive the side.
  CacheSide(const CacheShape& shape, std::shared_ptr<const std::vector<HeadCodec>> codecs, uint8_t* blocks,
            const BlockPlaces& places);

  const CacheShape& shape() const { return shape_; }
  const Format& format() const { return codecs_->front().format; }
  Kind kind() const { return codecs_->front().kind; }
  const HeadCodec& codec(int head) const { return (*codecs_)[head]; }
  bool coded() const { return coded_; }
  int row_size() const { return shape_.n_kv_heads * format().head_dim; }

  uint8_t* block(int head, int64_t cell) const {
    const int64_t stream = cell / shape_.cells_per_stream, in_stream = cell % shape_.cells_per_stream;
    return page(head, places_.page(stream * shape_.blocks_per_stream() + in_stream / kBlockCells));
  }
  uint8_t* page(int head, int64_t page) const {
    return blocks_ + size_t(head) * places_.head_stride + size_t(page) * places_.block_stride;
  }
  const BlockPlaces& places() const { return places_; }
  int in_block(int64_t cell) const { return int(cell % shape_.cells_per_stream % kBlockCells); }

  /// Encodes a row as the model wrote it, [n_kv_heads * head_dim] f16, into the blocks; does nothing where the side has
  /// no codes. The input is always f16, whatever the model computed in, so that a saved and loaded row gets the same
  /// codes.
  void encode_row(const uint16_t* row, int64_t cell) const;
  /// Encodes one head's part of such a row; `row` is the whole row.
  void encode_head(int head, const uint16_t* row, int64_t cell) const;
  /// Encodes one head's numbers, `x` [head_dim], not transformed.
  void encode_head(int head, const float* x, int64_t cell) const;
  /// Decodes a cell to `row` [n_kv_heads * head_dim], in the model's own domain.
  void decode_row(int64_t cell, float* row) const;
  /// Decodes one head of a cell to `x` [head_dim].
  void decode_head(int head, int64_t cell, float* x) const;

  /// The exact rows.
  ExactRows& rows() { return *rows_; }
  const uint16_t* row_data(const Window::Row& row) const { return rows_->row(row); }
  /// The exact store, which has the rows of all cells that it has room for, or null.
  const ExactStore* store() const { return rows_->store(); }
  /// With an exact store: the row of a cell, or null where it was never written or found no room.
  const uint16_t* stored_row(int64_t cell) const { return rows_->at(cell, -1); }

  /// Copies a stream's blocks and, with an exact store, its rows to another stream. CacheLayer copies the slots.
  void copy_stream(int from, int to);

private:
  CacheShape shape_;
  std::shared_ptr<const std::vector<HeadCodec>> codecs_;
  uint8_t* blocks_;
  BlockPlaces places_;
  bool coded_;
  std::unique_ptr<ExactRows> rows_;
};

/// K and V of one layer, with the window they share.
///
/// Where keys and values are one row of which the values are the first numbers (MLA), the layer's rows are *latent*:
/// its values' side has these, its keys' side has the other numbers, and queries are multiplied with both. A layer may
/// also have keys alone, and a values' side without numbers (head_dim 0, not coded).
class CacheLayer {
public:
  CacheLayer(CacheSide keys, CacheSide values, Window window, bool is_latent = false)
      : keys_(std::move(keys)), values_(std::move(values)), window_(std::move(window)), is_latent_(is_latent) {}

  bool is_latent() const { return is_latent_; }
  /// Numbers of a head's key as queries see it.
  int key_dim() const { return (is_latent_ ? values_.format().head_dim : 0) + keys_.format().head_dim; }

  CacheSide& side(Kind kind) { return kind == Kind::key ? keys_ : values_; }
  const CacheSide& side(Kind kind) const { return kind == Kind::key ? keys_ : values_; }
  const CacheSide& keys() const { return keys_; }
  const CacheSide& values() const { return values_; }
  Window& window() { return window_; }
  const Window& window() const { return window_; }

  /// The exact row of a cell, or null where only its codes are left.
  uint16_t* exact_row(Kind kind, int64_t cell) { return side(kind).rows().at(cell, window_.find(cell)); }
  const uint16_t* exact_row(Kind kind, int64_t cell) const {
    return const_cast<CacheLayer*>(this)->exact_row(kind, cell);
  }

  /// Starts writing one side of a batch's cells. Keys and values of a batch come in either order: the side that comes
  /// first begins the batch, the other, with the same cells, joins it. Throws std::runtime_error where the exact store
  /// cannot be written to; the layer is then as it was.
  void begin_write(Kind kind, std::span<const int64_t> cells);
  /// Writes row `row` of the batch, [n_kv_heads * head_dim] f16. Several threads may write rows at once.
  void write_row(Kind kind, int row, const uint16_t* data);
  /// Whether attention reads a cell's codes now, or will when the cell has left the window (Window::settle).
  bool needs_codes(int64_t cell) const { return window_.find(cell) < 0 || window_.waits(cell); }
  /// To be called before a batch is attended to, once both its sides are written (Window::settle). `visible` as in
  /// Window::commit.
  void settle(const Window::Visible& visible);
  /// Ends the batch, in three steps for a team of threads:
  ///   begin_commit   one thread: the window decides which cells leave and which rows get slots
  ///   code_leaving   all threads: each encodes its share of the cells that leave
  ///   end_commit     one thread: the batch's rows are copied to their slots
  /// The batch is attended to before begin_commit or, so that each token sees what it would have seen alone
  /// (Window::stages), behind code_leaving: codes lie beside the rows, which do not move before end_commit. `visible`
  /// as in Window::commit; `queries`, those of the batch's rows, decide which cells matter most (without them, older
  /// cells do).
  void begin_commit(const Window::Visible& visible, const BatchQueries& queries = {});
  bool codes_leaving() const { return !changes_.leaving.empty(); }
  void code_leaving(int thread, int n_threads);
  void end_commit();
  void commit(const Window::Visible& visible, const BatchQueries& queries = {}) {
    begin_commit(visible, queries);
    code_leaving(0, 1);
    end_commit();
  }

  /// Takes in the row of a loaded state's cell, for which ExactRows::keep was called before. The row goes to a slot of
  /// the window; where the window has none for it, it is encoded. All keys of a state come before its values, so a key
  /// that comes after a value begins another sequence.
  void take_row(Kind kind, int64_t cell, const uint16_t* row);

  void copy_stream(Kind kind, int from, int to);
  void clear();

private:
  void code_abandoned();
  Window::Judge judge(const BatchQueries& queries) const;

  CacheSide keys_, values_;
  Window window_;
  bool is_latent_;
  bool has_keys_ = false, has_values_ = false;  // of the batch in flight
  Window::Changes changes_;                     // between begin_commit and end_commit
  Kind arrived_ = Kind::key;                    // of the row that take_row got last
};

}  // namespace thimble
