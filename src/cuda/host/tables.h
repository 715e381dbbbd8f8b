// A layer's codecs as the kernels read them: HeadCodecs of all KV heads, gathered into the arrays of CodecTables.
#pragma once

#include <vector>

#include "codec/head_codec.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// The arrays in host memory; `view` points into them. DeviceTables (device.h) owns a copy in device memory.
struct HostTables {
  int head_dim = 0, width = 0, n_kv_heads = 0;
  std::vector<uint32_t> packed;
  std::vector<float> scale, words, half_norms, mean, forward, undo;

  CodecTables view() const;
};

/// Throws std::invalid_argument where the heads disagree in kind, format or kind of transform, where the kernels have
/// no code for the format, or where a transform is neither Hadamard nor dense.
HostTables pack_tables(const std::vector<HeadCodec>& heads);

}  // namespace thimble::cuda
