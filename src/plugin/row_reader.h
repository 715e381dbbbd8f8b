// Nodes that read a coded cache by other ops than flash attention: with flash attention off, keys and values are
// factors of matrix products, and some models' graphs pick rows of a cache. The rows that such a node reads are decoded
// to f16 beside it, and the inner device runs the node on those.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "engine/kv_cache.h"
#include "ggml.h"
#include "plugin/kv_buffer.h"

struct ggml_cgraph;

namespace thimble {

/// The rows that a view of a coded cache covers.
struct RowsOfView {
  ReadTask task;             // all but the memory for the rows and what is known of the batch
  size_t bytes = 0;          // of that memory
  size_t offset = 0;         // where the view begins in that memory
  size_t nb[GGML_MAX_DIMS];  // the view's strides in that memory
};

/// Nothing where the view is not laid out by the rows of a cache, or by those of a transposed one.
std::optional<RowsOfView> rows_of_view(const ggml_tensor* view);

/// A node that reads coded caches, as the inner device is to run it.
class ReadingNode {
public:
  /// Throws std::runtime_error with a sentence where a view cannot be read.
  explicit ReadingNode(const ggml_tensor* node);
  ReadingNode(const ReadingNode&) = delete;
  ReadingNode& operator=(const ReadingNode&) = delete;

  struct Source {
    int index;  // among the node's sources
    KvBuffer* buffer;
    ManagedLayer* layer;
    RowsOfView rows;
    size_t place;         // of the rows, in the memory of all sources
    bool is_read = true;  // false where an earlier source has the same rows, as values that are keys do (MLA)
  };
  std::vector<Source>& sources() { return sources_; }
  const std::vector<Source>& sources() const { return sources_; }
  ggml_tensor* tensor() { return &tensor_; }
  /// Bytes of memory for the rows of all sources.
  size_t bytes() const { return bytes_; }
  /// Says where that memory is.
  void place(uint8_t* memory);

private:
  ggml_tensor tensor_;
  ggml_tensor views_[GGML_MAX_SRC];
  std::vector<Source> sources_;
  size_t bytes_ = 0;
};

/// What a graph says of the batch that it runs, where nodes read the caches.
class BatchOfGraph {
public:
  /// Copies the masks, so it is to be made before the graph runs, while its inputs are there.
  explicit BatchOfGraph(const ggml_cgraph* graph);

  /// What the batch's tokens see of the cells that a task reads. Where no mask over these is found: all.
  BatchSight sight(const ManagedLayer& layer, const ReadTask& task) const;

private:
  struct Mask {
    const ggml_tensor* input;
    const ManagedLayer* layer;  // over which it was found, or null
    const KvBuffer* buffer;
  };
  void note_mask(const ggml_tensor* mask, const ggml_tensor* keys);

  std::vector<Mask> masks_;
  std::map<const ggml_tensor*, std::vector<uint16_t>> as_f16_;  // by Mask::input
  std::map<const ManagedLayer*, int64_t> n_tokens_;             // of all streams
};

/// The queries that a node multiplies with the keys that it reads, [stream][head][token][number], or null. They are in
/// memory when the node runs.
const ggml_tensor* queries_of(const ggml_tensor* node, const ReadTask& task, const BatchSight& sight);
/// A copy of queries in `memory`.
BatchQueries copy_queries(const ggml_tensor* queries, std::vector<float>& memory);

}  // namespace thimble
