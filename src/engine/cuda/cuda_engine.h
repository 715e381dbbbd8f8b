// The engine of CUDA devices: caches in their memory, tasks on a stream.
#pragma once

#include "engine/engine.h"

namespace thimble {

std::unique_ptr<Engine> make_cuda_engine(const HostDevice& device);

}  // namespace thimble
