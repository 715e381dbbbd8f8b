// Where a cache's codecs come from: the model's profile, or without one the uncalibrated codec.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "codec/head_codec.h"
#include "engine/settings.h"
#include "profile/profile.h"

namespace thimble {

/// KV heads of a layer: all of them, or those that one of several devices has.
struct HeadRange {
  int first = 0, count = 0;
  int of = 0;  // KV heads of the layer
};

class CodecSource {
public:
  /// Reads the profile that the settings name. Throws std::runtime_error with a sentence where it cannot.
  explicit CodecSource(const Settings& settings);

  /// Head size of a layer's keys or values, where there is a profile that has the layer.
  std::optional<int> head_dim(int layer, Kind kind) const;
  /// Throws std::runtime_error where the profile does not have this layer or rate, or has another head size.
  Format format(int layer, Kind kind, int head_dim) const;
  /// KV heads of a layer, where there is a profile that has the layer.
  std::optional<int> n_kv_heads(int layer) const;
  /// One codec for each of these KV heads. `stretches`: for each of them that of make_uncalibrated_codec, or empty; a
  /// profile's codecs have none. Throws as `format` does, and where the profile has another number of KV heads.
  std::shared_ptr<const std::vector<HeadCodec>> codecs(int layer, Kind kind, int head_dim, const HeadRange& heads,
                                                       const std::vector<std::vector<float>>& stretches = {}) const;
  /// Whether a layer retrieves (Settings::top, Settings::policy).
  bool retrieves(int layer) const;
  /// Whether keys are coded without a profile, and so stretched where the weights of the model's norms are known.
  bool stretches_keys() const { return !profile_ && settings_.key_bits != 16; }
  /// A hash of everything that a KV head's codes depend on: the rates, the profile's bytes and which head of it is
  /// meant, and what its keys were stretched by.
  uint64_t hash(int head, const std::vector<float>& stretch) const;

private:
  double bits(Kind kind) const { return kind == Kind::key ? settings_.key_bits : settings_.value_bits; }
  bool from_profile(Kind kind) const { return profile_ && bits(kind) != 16; }

  Settings settings_;
  std::shared_ptr<const Profile> profile_;
  uint64_t hash_;
};

}  // namespace thimble
