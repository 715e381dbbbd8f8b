// The engines of this build.
#include "engine/cpu/cpu_engine.h"
#include "engine/engine.h"
#ifdef THIMBLE_CUDA
#include "engine/cuda/cuda_engine.h"
#endif

namespace thimble {
namespace {

struct Entry {
  const char* backend;
  std::unique_ptr<Engine> (*make)(const HostDevice&);
};

constexpr Entry kEngines[] = {
    {"CPU", make_cpu_engine},
#ifdef THIMBLE_CUDA
    {"CUDA", make_cuda_engine},
#endif
};

}  // namespace

std::unique_ptr<Engine> make_engine(const HostDevice& device) {
  for (const Entry& entry : kEngines) {
    if (device.backend == entry.backend) return entry.make(device);
  }
  return nullptr;
}

std::string engine_names() {
  std::string names;
  for (const Entry& entry : kEngines) names += std::string(names.empty() ? "" : ", ") + entry.backend;
  return names;
}

}  // namespace thimble
