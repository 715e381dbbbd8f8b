#include "engine/cpu/cpu_engine.h"

#include <algorithm>

#include "engine/cpu/cpu_cache.h"
#include "kernels/kernels.h"

namespace thimble {
namespace {

class CpuEngine : public Engine {
public:
  std::string kernels() const override { return thimble::kernels().name; }

  std::string store_place(const Settings& settings) const override {
    return settings.store == Settings::Store::file ? settings.path : "RAM";
  }

  std::string refusal(const Settings& settings) const override {
    if (settings.store == Settings::Store::pinned) {
      return "store=pinned is for CUDA devices: use store=ram or store=file here";
    }
    return {};
  }
  std::string refusal(const LayerPlan&) const override { return {}; }
  bool leaves_f16(const Settings&) const override { return false; }

  size_t side_bytes(const LayerPlan& plan, Kind kind) const override {
    return CacheSide::memory_bytes(plan.shape, plan.side(kind), CpuCache::n_slots(plan), plan.has_codes[int(kind)]);
  }

  size_t more_bytes(const LayerPlan& plan, Kind kind) const override {
    const size_t row = size_t(plan.shape.n_kv_heads) * plan.side(kind).head_dim * sizeof(uint16_t);
    return plan.top > 0 ? 0 : size_t(std::max(0, CpuCache::max_slots(plan) - CpuCache::n_slots(plan))) * row;
  }

  std::unique_ptr<KvCache> make_cache(const Settings& settings, uint64_t hash) override {
    return std::make_unique<CpuCache>(settings, hash);
  }
};

}  // namespace

std::unique_ptr<Engine> make_cpu_engine(const HostDevice&) {
  return std::make_unique<CpuEngine>();
}

}  // namespace thimble
