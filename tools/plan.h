// What a coded cache of a model comes to, as the plugin plans it on the CPU.
#pragma once

#include "engine/layer_plan.h"
#include "profile/profile.h"

namespace thimble {

/// All layers with `n_cells` cells of one stream. Throws std::runtime_error as CachePlanner does.
PlanTotals plan_model(const Settings& settings, const ModelShape& shape, int64_t n_cells);

}  // namespace thimble
