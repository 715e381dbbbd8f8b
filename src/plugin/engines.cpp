// Which inner devices this build knows, and what serves each.
#include <cstring>
#include <stdexcept>

#include "plugin/cpu_graph.h"
#include "plugin/device_cache.h"
#ifdef THIMBLE_CUDA
#include "plugin/cuda_cache.h"
#include "plugin/cuda_graph.h"
#endif

namespace thimble {
namespace {

bool is_cuda(ggml_backend_dev_t device) {
#ifdef THIMBLE_CUDA
  return std::strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(device)), "CUDA") == 0;
#else
  (void)device;
  return false;
#endif
}

}  // namespace

bool is_cpu(ggml_backend_dev_t inner) {
  return ggml_backend_dev_type(inner) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

bool can_wrap(ggml_backend_dev_t inner) {
  return is_cpu(inner) || is_cuda(inner);
}

std::unique_ptr<DeviceCache> make_device_cache([[maybe_unused]] ggml_backend_dev_t inner, const Settings& settings) {
#ifdef THIMBLE_CUDA
  if (is_cuda(inner)) return std::make_unique<CudaCache>(inner, settings);
#endif
  if (settings.store == Settings::Store::pinned) {
    throw std::runtime_error("store=pinned is for CUDA devices: use store=ram or store=file here");
  }
  return nullptr;
}

std::unique_ptr<Graph> make_graph(ggml_backend_t inner) {
#ifdef THIMBLE_CUDA
  if (is_cuda(ggml_backend_get_device(inner))) return std::make_unique<CudaGraph>(inner);
#endif
  return std::make_unique<CpuGraph>(inner);
}

}  // namespace thimble
