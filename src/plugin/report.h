// The line that the plugin logs when a context is made.
#pragma once

#include <set>
#include <string>

#include "engine/engine.h"

namespace thimble {

/// A sentence about layers that are not on this device, of which `layers` have their caches; "" where there are none.
std::string layers_elsewhere(const std::set<int>& layers);

/// Says of all caches of a context what is coded and what stays f16, in how much memory, with which settings and
/// kernels. `is_far`: the program that made them is at the other end of RPC.
std::string report(const PlanTotals& totals, const Settings& settings, const Engine& engine, bool is_far);

}  // namespace thimble
