// llama.cpp's names of cache tensors: "cache_k_l7" holds layer 7's keys, "cache_v_l7" its values.
#pragma once

#include <charconv>
#include <optional>
#include <string_view>
#include <system_error>

#include "codec/format.h"

namespace thimble {

struct CacheName {
  Kind kind;
  int layer;
};

/// Empty for any other name, those included that only begin like a cache's.
inline std::optional<CacheName> parse_cache_name(std::string_view name) {
  constexpr std::string_view kKeys = "cache_k_l", kValues = "cache_v_l";
  if (!name.starts_with(kKeys) && !name.starts_with(kValues)) return std::nullopt;
  const Kind kind = name.starts_with(kKeys) ? Kind::key : Kind::value;
  name.remove_prefix(kKeys.size());
  int layer = -1;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), layer);
  if (error != std::errc() || end != name.data() + name.size() || layer < 0) return std::nullopt;
  return CacheName{kind, layer};
}

/// Whether the name is that of a recurrent layer's state: "cache_r_l3", "cache_s_l3".
inline bool is_recurrent_state(std::string_view name) {
  return name.starts_with("cache_r_l") || name.starts_with("cache_s_l");
}

}  // namespace thimble
