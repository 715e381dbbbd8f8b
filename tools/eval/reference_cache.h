// Runs the codec's specification inside a model: in the layers that the plugin would code, every cell that is not exact
// is replaced by what its codes decode to. It does not use the plugin, its kernels or its memory layout, so it can
// check their figures. It has no pool: the first cells stay exact instead of those that matter most, and cells are
// coded one by one.
#pragma once

#include <map>
#include <utility>
#include <vector>

#include "codec/head_codec.h"
#include "eval/emulated_cache.h"
#include "profile/profile.h"

namespace thimble {

class ReferenceCache : public EmulatedCache {
public:
  /// The profile must outlive the cache. `layers`: whether each layer is coded.
  ReferenceCache(const Profile& profile, double key_bits, double value_bits, int first, int last,
                 std::vector<bool> layers)
      : profile_(profile), bits_{key_bits, value_bits}, first_(first), last_(last), layers_(std::move(layers)) {}

  void clear() override { coded_.clear(); }

private:
  using Side = std::pair<int, Kind>;
  void stored(const ggml_tensor* cache, int layer, Kind kind, int first_written, int n_written) override;
  void attended(ggml_tensor*, int) override {}
  bool attends(int) const override { return false; }
  const std::vector<HeadCodec>& codecs(Side side, int row_size);

  const Profile& profile_;
  double bits_[2];
  int first_, last_;
  std::vector<bool> layers_;
  std::map<Side, int> coded_;  // cells below this number are coded
  std::map<Side, std::vector<HeadCodec>> codecs_;
};

}  // namespace thimble
