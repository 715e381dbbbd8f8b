// In the place of src/engine/registry.cpp: ggml's CPU stands for a CUDA device.
#include "engine/cuda/cuda_engine.h"
#include "engine/engine.h"

namespace thimble {

std::unique_ptr<Engine> make_engine(const HostDevice& device) {
  return device.backend == "CPU" ? make_cuda_engine({device.backend, "emulated"}) : nullptr;
}

std::string engine_names() {
  return "emulated CUDA";
}

}  // namespace thimble
