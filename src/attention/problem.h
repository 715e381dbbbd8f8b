// What attention of a batch over a layer's cache is asked for, whoever computes it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace thimble {

/// A cell that is attended to exactly: its rows of all KV heads, f16, as the model wrote them.
struct ExactCell {
  int cell;  // of the stream
  const uint16_t* key;
  const uint16_t* value;
};

/// What ggml's FLASH_ATTN_EXT says, in its own strides. All strides count elements.
struct AttentionProblem {
  int n_heads = 0;    // query heads; a multiple of the layer's KV heads
  int n_tokens = 0;   // of each stream
  int n_streams = 1;  // attended to: first_stream and those that follow it
  int first_stream = 0;
  int64_t n_cells = 0;  // attended to in each stream, from its first cell on
  int value_dim = 0;

  const float* q = nullptr;
  size_t q_token = 0, q_head = 0, q_stream = 0;
  float* out = nullptr;  // value_dim numbers of a head are adjacent
  size_t out_token = 0, out_head = 0, out_stream = 0;
  const uint16_t* mask = nullptr;  // f16 [stream][token][cell], null: all visible
  size_t mask_token = 0, mask_stream = 0;

  float scale = 1;
  float max_bias = 0;  // ALiBi: slopes as in Press et al. 2021 (arXiv 2108.12409); 0: none
  float softcap = 0;
  const float* sinks = nullptr;  // [n_heads]: a learned logit that takes a share of each softmax, or null

  /// Exact rows that a caller without a window keeps itself, in order of cells, where there is one stream; the layer's
  /// window is empty then. They stand in for these cells' codes.
  std::span<const ExactCell> exact = {};
};

/// Slope of a head under ALiBi, as ggml has it.
float alibi_slope(float max_bias, int n_heads, int head);

}  // namespace thimble
