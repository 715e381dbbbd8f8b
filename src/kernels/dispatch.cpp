#include <cstdlib>
#include <stdexcept>

#include "kernels/blocked.h"

namespace thimble {
namespace {

// __builtin_cpu_supports also asks whether the operating system saves the registers.
#ifdef THIMBLE_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}
#endif
#ifdef THIMBLE_AVX2
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // every processor with avx2 has f16c
}
#endif

}  // namespace

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> available{&scalar_kernels()};
#ifdef THIMBLE_NEON
  available.push_back(&neon_kernels());
#endif
#ifdef THIMBLE_AVX2
  if (has_avx2()) available.push_back(&avx2_kernels());
#endif
#ifdef THIMBLE_AVX512
  if (has_avx512()) available.push_back(&avx512_kernels());
#endif
  return available;
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
