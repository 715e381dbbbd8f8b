// A coded cache in the simplest way there is, for checking: the f16 cache of a plain llama.cpp context, in which every
// cell that leaves the exact window is replaced by what its codes stand for. Slow and no smaller than f16, but it is
// the codec's specification run inside a model, without the plugin, its kernels or its memory layout, so their figures
// can be held to it. One sequence, written in order.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "codec/head_codec.h"
#include "profile/profile.h"

struct ggml_tensor;

namespace thimble {

class ReferenceCache {
public:
  /// `profile` may be null: uncalibrated. It must outlive the cache.
  ReferenceCache(const Profile* profile, double key_bits, double value_bits, int first, int last)
      : profile_(profile), bits_{key_bits, value_bits}, first_(first), last_(last) {}

  /// For `cb_eval`, with the ReferenceCache as its user data. The cache must lie in memory that the CPU can reach.
  static bool callback(ggml_tensor* node, bool ask, void* cache);

  /// Tells that the cache was cleared.
  void clear() { coded_.clear(); }
  /// Throws what went wrong inside the callback.
  void check() const;

private:
  using Side = std::pair<int, Kind>;
  void code_leaving(const ggml_tensor* node, Side side);
  const std::vector<HeadCodec>& codecs(Side side, int row_size);

  const Profile* profile_;
  double bits_[2];
  int first_, last_;
  std::map<Side, int64_t> coded_;  // cells below are coded
  std::map<Side, std::vector<HeadCodec>> codecs_;
  std::string error_;
};

}  // namespace thimble
