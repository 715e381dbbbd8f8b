// In the place of src/engine/registry.cpp: ggml's CPU stands for a CUDA device, and so does the one of
// tests/plugin/recording_backend.cpp, which can be recorded. With THIMBLE_TEST_CPU_ENGINE the CPU is one.
#include <cstdlib>

#include "engine/cpu/cpu_engine.h"
#include "engine/cuda/cuda_engine.h"
#include "engine/engine.h"

namespace thimble {

std::unique_ptr<Engine> make_engine(const HostDevice& device) {
  if (device.backend == "CPU" && std::getenv("THIMBLE_TEST_CPU_ENGINE")) return make_cpu_engine(device);
  return device.backend == "CPU" || device.backend == "RECORDING" ? make_cuda_engine({device.backend, "emulated"})
                                                                  : nullptr;
}

std::string engine_names() {
  return "emulated CUDA";
}

}  // namespace thimble
