#include <algorithm>

#include "api/args.h"
#include "api/handles.h"

using namespace thimble::api;

namespace {

/// Makes a profile of what `read` returns; a std::runtime_error of `read` becomes THIMBLE_BAD_PROFILE.
template <typename Read>
thimble_status open(thimble_profile** profile, Read read) {
  return guarded([&] {
    require(profile != nullptr, "the place for the profile is null");
    *profile = nullptr;
    try {
      *profile = new thimble_profile{read()};
    } catch (const Failure&) {
      throw;
    } catch (const std::runtime_error& e) {
      throw Failure(THIMBLE_BAD_PROFILE, e.what());
    }
  });
}

const thimble::Profile& not_null(const thimble_profile* profile) {
  require(profile != nullptr, "the profile is null: open one with thimble_profile_open");
  return profile->profile;
}

}  // namespace

thimble_status thimble_profile_open(const char* path, thimble_profile** profile) {
  return open(profile, [&] {
    require(path != nullptr, "the profile's path is null");
    return thimble::read_profile(std::string(path));
  });
}

thimble_status thimble_profile_open_memory(const void* data, size_t size, thimble_profile** profile) {
  return open(profile, [&] {
    require(data != nullptr, "the profile's bytes are null");
    return thimble::read_profile(static_cast<const uint8_t*>(data), size);
  });
}

void thimble_profile_close(thimble_profile* profile) {
  delete profile;
}

thimble_status thimble_profile_get_info(const thimble_profile* profile, thimble_profile_info* info) {
  return guarded([&] {
    const thimble::Profile& p = not_null(profile);
    thimble_profile_info filled{};
    filled.n_layers = int32_t(p.shape.layers.size());
    filled.n_rates = int32_t(p.bits.size());
    static_assert(THIMBLE_MAX_RATES >= thimble::kMaxRates);
    std::copy(p.bits.begin(), p.bits.end(), filled.rates);
    filled.architecture = p.shape.architecture.c_str();
    filled.source = p.source.c_str();
    give_info(filled, info, "thimble_profile_info");
  });
}

thimble_status thimble_profile_get_layer(const thimble_profile* profile, int32_t layer, thimble_layer_info* info) {
  return guarded([&] {
    const auto& layers = not_null(profile).shape.layers;
    require(layer >= 0 && size_t(layer) < layers.size(), [&] {
      return "the profile has layers 0 to " + std::to_string(layers.size() - 1) + ", not " + std::to_string(layer);
    });
    const thimble::LayerShape& shape = layers[layer];
    give_info({0, shape.n_kv_heads, shape.n_heads, shape.key_dim, shape.value_dim}, info, "thimble_layer_info");
  });
}
