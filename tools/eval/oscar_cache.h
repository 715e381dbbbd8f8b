// Emulates OSCAR (arXiv 2605.17757, and its authors' code, github.com/FutureMLS-Lab/OSCAR), for comparison. Keys and
// values are rotated by matrices that `thimble calibrate --transform oscar` fits (fit_oscar in calibrate/transforms.h).
// Of a rotated vector, numbers beyond the 96th percentile of its absolute values (values: the 92nd) are clipped, then
// groups of 128 numbers, or the whole vector where it is smaller, are rounded to four equally spaced levels from the
// least to the greatest. The first 64 and the last 256 cells stay exact. These are the published settings.
//
// As in the authors' newer code there is a rotation for each KV head. A group has a scale and a zero, which count as
// f16 and are kept as f32, which favours OSCAR.
#pragma once

#include <map>
#include <utility>
#include <vector>

#include "codec/transform.h"
#include "eval/emulated_cache.h"
#include "profile/profile.h"

namespace thimble {

namespace oscar {

inline constexpr int kFirst = 64, kLast = 256;  // cells that stay exact
inline constexpr int kGroup = 128;              // numbers with a scale of their own

/// Bits that a number takes, with scales.
double bits(int head_dim);

/// Codes and decodes a rotated vector [head_dim] in place.
void code_vector(float* y, int head_dim, Kind kind);

}  // namespace oscar

class OscarCache : public EmulatedCache {
public:
  /// The profile, made with --transform oscar, must outlive the cache. `layers`: whether each layer is coded.
  OscarCache(const Profile& profile, std::vector<bool> layers) : profile_(profile), layers_(std::move(layers)) {}

  void clear() override { n_coded_.clear(); }

private:
  using Side = std::pair<int, Kind>;
  void stored(const ggml_tensor* cache, int layer, Kind kind, int first_written, int n_written) override;
  void attended(ggml_tensor*, int) override {}
  bool attends(int) const override { return false; }
  const std::vector<Transform>& rotations(Side side);

  const Profile& profile_;
  std::vector<bool> layers_;
  std::map<Side, int> n_coded_;                       // cells below this number are coded
  std::map<Side, std::vector<Transform>> rotations_;  // [n_kv_heads]
};

}  // namespace thimble
