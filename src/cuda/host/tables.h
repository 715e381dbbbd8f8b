// A layer's codecs as the kernels read them: HeadCodecs of all KV heads, gathered into the arrays of CodecTables.
#pragma once

#include <vector>

#include "codec/head_codec.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// The arrays in host memory; `view` points into them. DeviceTables (device.h) owns a copy in device memory.
struct HostTables {
  int n_kv_heads = 0;
  CodeOrder order;
  int hadamard_block = 1;
  std::vector<uint32_t> packed;
  std::vector<int32_t> carriers;
  std::vector<float> scale, words, half_norms, mean, forward, undo, error;

  CodecTables view() const;
};

/// `tiles`: for the kernels that decode tiles, else for those with tables. Throws std::invalid_argument where the heads
/// disagree in kind, format or kind of transform, where there are no such kernels for the format, or where a transform
/// is neither Hadamard nor dense.
HostTables pack_tables(const std::vector<HeadCodec>& heads, bool tiles = false);

/// For layers that are read as rows (rows/rows.h): any format and transform.
HostTables pack_row_tables(const std::vector<HeadCodec>& heads);

/// What transformed vectors lack, (x - mean) A: mean A, [n_kv_heads][head_dim]. Empty where transforms have no mean.
std::vector<float> transformed_means(const std::vector<HeadCodec>& heads);

}  // namespace thimble::cuda
