// Where a cache's codecs come from: a profile of the model, or none and the uncalibrated codec.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "codec/head_codec.h"
#include "engine/settings.h"
#include "profile/profile.h"

namespace thimble {

class CodecSource {
public:
  /// Reads the profile that the settings name. Throws std::runtime_error with a sentence where it cannot.
  explicit CodecSource(const Settings& settings);

  /// Head size of a layer's keys or values, where a profile tells it.
  std::optional<int> head_dim(int layer, Kind kind) const;
  /// Throws where the profile does not hold this layer, or holds other head sizes.
  Format format(int layer, Kind kind, int head_dim) const;
  std::shared_ptr<const std::vector<HeadCodec>> codecs(int layer, Kind kind, int head_dim, int n_kv_heads) const;
  /// Whether a layer attends to its dominant cells exactly (Settings::top, policy).
  bool retrieves(int layer) const;
  /// Names everything that saved codes depend on.
  uint64_t hash() const { return hash_; }

private:
  double bits(Kind kind) const { return kind == Kind::key ? settings_.key_bits : settings_.value_bits; }
  bool from_profile(Kind kind) const { return profile_ && bits(kind) != 16; }

  Settings settings_;
  std::shared_ptr<const Profile> profile_;
  uint64_t hash_;
};

}  // namespace thimble
