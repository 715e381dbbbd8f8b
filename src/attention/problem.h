// The arguments of attention of a batch over a layer's cache, for the CPU and for any other engine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace thimble {

/// A cell that is attended to exactly: its rows, [n_kv_heads][head_dim] f16, as the model wrote them.
struct ExactCell {
  int cell;  // of the stream
  const uint16_t* key;
  const uint16_t* value;
};

/// The arguments of ggml's FLASH_ATTN_EXT, with its strides. All strides count elements.
struct AttentionProblem {
  int n_heads = 0;    // query heads; a multiple of the layer's KV heads
  int n_tokens = 0;   // of each stream
  int n_streams = 1;  // streams first_stream to first_stream + n_streams - 1
  int first_stream = 0;
  int64_t n_cells = 0;  // attended to in each stream, from its first cell on
  int value_dim = 0;

  const float* q = nullptr;  // [stream][token][head][head_dim], as the model computed them
  size_t q_token = 0, q_head = 0, q_stream = 0;
  float* out = nullptr;  // [stream][token][head][value_dim]
  size_t out_token = 0, out_head = 0, out_stream = 0;
  const uint16_t* mask = nullptr;  // f16 [stream][token][cell], null: all visible
  size_t mask_token = 0, mask_stream = 0;

  float scale = 1;
  float max_bias = 0;            // ALiBi: slopes as in Press et al. 2021 (arXiv 2108.12409); 0: none
  float softcap = 0;             // score becomes softcap * tanh(score / softcap); 0: none
  const float* sinks = nullptr;  // [n_heads]: a learned logit that joins the sum of each softmax, or null

  /// Exact rows that a caller without a window keeps itself, in order of cells, where there is one stream; the layer's
  /// window is empty then. They stand in for these cells' codes.
  std::span<const ExactCell> exact = {};
};

/// ALiBi's slope of a head (arXiv 2108.12409), as ggml computes it; 1 where max_bias is 0.
float alibi_slope(float max_bias, int n_heads, int head);

}  // namespace thimble
