#include "engine/cpu/cpu_engine.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>

#include "engine/cpu/cpu_cache.h"
#include "kernels/kernels.h"

namespace thimble {
namespace {

// The pages that lie whole in this memory.
std::span<uint8_t> whole_pages(void* data, size_t size) {
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + size) / page * page;
  if (first >= last) return {};
  return {static_cast<uint8_t*>(data) + (first - begin), size_t(last - first)};
}

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
  bool attends(const LayerPlan&) const override { return true; }
  bool leaves_f16(const Settings&) const override { return false; }

  size_t side_bytes(const LayerPlan& plan, Kind kind) const override {
    return CacheSide::memory_bytes(plan.shape, plan.side(kind), CpuCache::n_slots(plan), plan.has_codes[int(kind)]);
  }

  size_t more_bytes(const LayerPlan& plan, Kind kind) const override {
    const size_t row = size_t(plan.shape.n_kv_heads) * plan.side(kind).head_dim * sizeof(uint16_t);
    return plan.top > 0 ? 0 : size_t(std::max(0, CpuCache::max_slots(plan) - CpuCache::n_slots(plan))) * row;
  }

  bool release(void* data, size_t size) const override {
    const std::span<uint8_t> pages = whole_pages(data, size);
    // It fails for memory that is locked, which then stays.
    if (pages.empty() || madvise(pages.data(), pages.size(), MADV_DONTNEED) != 0) return false;
    uint8_t* const begin = static_cast<uint8_t*>(data);
    std::memset(begin, 0, size_t(pages.data() - begin));
    std::memset(pages.data() + pages.size(), 0, size_t(begin + size - (pages.data() + pages.size())));
    return true;
  }

  void take_large_pages(void* data, size_t size) const override {
    const std::span<uint8_t> pages = whole_pages(data, size);
    if (!pages.empty()) madvise(pages.data(), pages.size(), MADV_HUGEPAGE);  // not all systems have any
  }

  std::unique_ptr<KvCache> make_cache(const Settings& settings) override {
    return std::make_unique<CpuCache>(settings);
  }
};

}  // namespace

std::unique_ptr<Engine> make_cpu_engine(const HostDevice&) {
  return std::make_unique<CpuEngine>();
}

}  // namespace thimble
