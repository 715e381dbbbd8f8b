// The versions of ggml that Thimble knows.
#pragma once

#include <compare>
#include <cstdio>
#include <optional>

namespace thimble {

struct GgmlVersion {
  int major = 0, minor = 0, patch = 0;
  auto operator<=>(const GgmlVersion&) const = default;
};

/// Parses "0.25.3"; anything may follow the three numbers.
inline std::optional<GgmlVersion> parse_version(const char* text) {
  GgmlVersion v;
  if (!text || std::sscanf(text, "%d.%d.%d", &v.major, &v.minor, &v.patch) != 3) return std::nullopt;
  return v;
}

/// Older versions than kOldestGgml are refused. Newer ones than kNewestTriedGgml are used where the self-check passes.
constexpr GgmlVersion kOldestGgml{0, 15, 0}, kNewestTriedGgml{0, 27, 0};
/// Backend API versions, each with a build of the plugin. ggml 0.25.3 exists with either.
constexpr int kApiVersions[] = {2, 3};

}  // namespace thimble
