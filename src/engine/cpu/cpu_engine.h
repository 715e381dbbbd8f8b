// The engine of the CPU: it keeps caches in RAM and runs tasks on teams of threads.
#pragma once

#include "engine/engine.h"

namespace thimble {

std::unique_ptr<Engine> make_cpu_engine(const HostDevice& device);

}  // namespace thimble
