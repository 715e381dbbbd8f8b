#include <cstdlib>
#include <stdexcept>

#include "attention/kernels.h"

namespace thimble {

std::vector<const Kernels*> available_kernels() {
  return {&scalar_kernels()};
}

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const auto available = available_kernels();
    const char* wanted = std::getenv("THIMBLE_ISA");
    if (!wanted || !*wanted) return *available.back();
    std::string names;
    for (const Kernels* k : available) {
      if (k->name == std::string(wanted)) return *k;
      names += std::string(names.empty() ? "" : ", ") + k->name;
    }
    throw std::runtime_error("THIMBLE_ISA=" + std::string(wanted) + " cannot run here; this machine has: " + names);
  }();
  return chosen;
}

}  // namespace thimble
