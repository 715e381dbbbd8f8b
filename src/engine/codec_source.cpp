#include "engine/codec_source.h"

#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string_view>

namespace thimble {
namespace {

uint64_t fnv1a(uint64_t hash, const char* data, size_t size) {
  for (size_t i = 0; i < size; i++) hash = (hash ^ uint8_t(data[i])) * 0x100000001b3;
  return hash;
}

// How codecs without a profile are made, for states: another name where the same rates come to other codes.
constexpr std::string_view kUncalibrated = "keys stretched by norms, by head";

}  // namespace

CodecSource::CodecSource(const Settings& settings) : settings_(settings), hash_(settings.hash()) {
  if (settings.profile.empty()) {
    hash_ = fnv1a(hash_, kUncalibrated.data(), kUncalibrated.size());
    return;
  }
  std::ifstream file(settings.profile, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (bytes.empty()) {
    throw std::runtime_error("profile " + settings.profile +
                             " cannot be read: check the path, or make one with thimble calibrate");
  }
  try {
    profile_ =
        std::make_shared<const Profile>(read_profile(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()));
  } catch (const std::runtime_error& error) {
    throw std::runtime_error("profile " + settings.profile + ": " + error.what());
  }
  hash_ = fnv1a(hash_, bytes.data(), bytes.size());
}

uint64_t CodecSource::hash(int head, const std::vector<float>& stretch) const {
  const uint64_t hash = profile_ ? fnv1a(hash_, reinterpret_cast<const char*>(&head), sizeof(head)) : hash_;
  return fnv1a(hash, reinterpret_cast<const char*>(stretch.data()), stretch.size() * sizeof(float));
}

std::optional<int> CodecSource::n_kv_heads(int layer) const {
  if (!profile_ || layer < 0 || size_t(layer) >= profile_->shape.layers.size()) return std::nullopt;
  const int n = profile_->shape.layers[layer].n_kv_heads;
  return n > 0 ? std::optional(n) : std::nullopt;
}

std::optional<int> CodecSource::head_dim(int layer, Kind kind) const {
  if (!profile_ || layer < 0 || size_t(layer) >= profile_->shape.layers.size()) return std::nullopt;
  const int dim = profile_->shape.layers[layer].dim(kind);
  return dim > 0 ? std::optional(dim) : std::nullopt;
}

Format CodecSource::format(int layer, Kind kind, int head_dim) const {
  if (!from_profile(kind)) return make_format(head_dim, bits(kind));
  if (this->head_dim(layer, kind) != head_dim) {
    throw std::runtime_error("profile " + settings_.profile + " was made for another model: its layer " +
                             std::to_string(layer) +
                             " has other heads; make one with thimble calibrate -m <this model>");
  }
  return profile_->format(layer, kind, bits(kind));
}

std::shared_ptr<const std::vector<HeadCodec>> CodecSource::codecs(
    int layer, Kind kind, int head_dim, const HeadRange& heads,
    const std::vector<std::vector<float>>& stretches) const {
  auto all = std::make_shared<std::vector<HeadCodec>>();
  const Format format = this->format(layer, kind, head_dim);
  if (from_profile(kind) && n_kv_heads(layer) != heads.of) {
    throw std::runtime_error("profile " + settings_.profile +
                             " was made for a model with another number of KV heads, or --split-mode tensor gave some "
                             "of these heads to a device that is none of the plugin's in this process");
  }
  for (int head = 0; head < heads.count; head++) {
    all->push_back(from_profile(kind) ? profile_->codec(layer, heads.first + head, kind, bits(kind))
                                      : make_uncalibrated_codec(
                                            kind, format, stretches.empty() ? std::vector<float>() : stretches[head]));
  }
  return all;
}

bool CodecSource::retrieves(int layer) const {
  if (settings_.top == 0 || settings_.policy == Settings::Policy::none) return false;
  if (settings_.policy == Settings::Policy::all || !profile_) return true;
  return layer < 0 || size_t(layer) >= profile_->density.size() || !profile_->quantization_friendly(layer);
}

}  // namespace thimble
