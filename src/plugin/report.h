// The line that the plugin logs when a context is made.
#pragma once

#include <string>

#include "engine/engine.h"

namespace thimble {

/// Says of all caches of a context what is coded and what stays f16, in how much memory, with which settings and
/// kernels.
std::string report(const PlanTotals& totals, const Settings& settings, const Engine& engine);

}  // namespace thimble
