#include "plan.h"

#include "engine/cpu/cpu_engine.h"

namespace thimble {

PlanTotals plan_model(const Settings& settings, const ModelShape& shape, int64_t n_cells) {
  const std::unique_ptr<Engine> engine = make_cpu_engine({"CPU", ""});
  const CachePlanner planner(*engine, settings);
  PlanTotals totals;
  for (size_t i = 0; i < shape.layers.size(); i++) {
    const LayerShape& layer = shape.layers[i];
    if (layer.n_kv_heads == 0) continue;
    LayerGeometry geometry;
    geometry.layer = int(i);
    geometry.n_kv_heads = layer.n_kv_heads;
    geometry.cells_per_stream = n_cells;
    for (Kind kind : {Kind::key, Kind::value}) {
      geometry.head_dim[int(kind)] = layer.dim(kind);
      geometry.width[int(kind)] = int64_t(layer.dim(kind)) * layer.n_kv_heads;
    }
    totals.add(planner.plan(geometry));
  }
  return totals;
}

}  // namespace thimble
