// The line that says what becomes of a cache.
#pragma once

#include <string>

#include "engine/engine.h"

namespace thimble {

/// Of all caches of a context: what is coded and what stays f16, in how much memory, and by which settings and kernels.
std::string report(const PlanTotals& totals, const Settings& settings, const Engine& engine);

}  // namespace thimble
