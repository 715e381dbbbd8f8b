// What an attention node's queries see, read off its mask.
#pragma once

#include <string>

#include "plugin/kv_buffer.h"

namespace thimble {

/// What the queries of an attention node see. Row r of a batch is token r % n_tokens of stream r / n_tokens, as
/// llama.cpp splits a batch into streams.
class Sight {
public:
  /// `mask_data`: what the node's mask holds, in host memory; null where it has none.
  Sight(const ggml_tensor* node, const void* mask_data)
      : n_tokens_(node->src[0]->ne[1]),
        n_cells_(node->src[1]->ne[1]),
        first_(node->src[1]->view_offs / root_of(node->src[1])->nb[1]),
        per_stream_(root_of(node->src[1])->ne[1]) {
    const ggml_tensor* mask = node->src[3];
    if (!mask) return;
    mask_ = static_cast<const char*>(mask_data);
    token_stride_ = mask->nb[1];
    stream_stride_ = mask->ne[3] > 1 ? mask->nb[3] : 0;
  }

  bool sees(int64_t row, int64_t cell) const {
    const int64_t stream = row < n_tokens_ ? 0 : row / n_tokens_, token = row - stream * n_tokens_;
    const int64_t in_stream = cell - first_ - stream * per_stream_;
    if (in_stream < 0 || in_stream >= n_cells_) return false;
    if (!mask_) return true;
    const char* at = mask_ + token * token_stride_ + stream * stream_stride_;
    return reinterpret_cast<const uint16_t*>(at)[in_stream] != 0xfc00;  // -inf
  }

private:
  int64_t n_tokens_, n_cells_, first_, per_stream_;
  const char* mask_ = nullptr;
  size_t token_stride_ = 0, stream_stride_ = 0;
};

/// Whether any query sees a cell that holds a row which was refused; and the sentence on that.
bool sees_refused_cell(const ggml_tensor* node, const void* mask_data, const ManagedLayer& layer);
std::string refused_cell_seen(const ManagedLayer& layer);

}  // namespace thimble
