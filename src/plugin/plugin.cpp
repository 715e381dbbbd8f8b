// The entry point that ggml looks up in a backend library, and the registry behind it.
#include <cstdio>
#include <cstring>
#include <string>

#include "ggml-backend-impl.h"
#include "plugin/device.h"

namespace {

using namespace thimble;

const char* registry_name(ggml_backend_reg_t) {
  return "THIMBLE";
}
size_t registry_count(ggml_backend_reg_t) {
  return device_count();
}
ggml_backend_dev_t registry_device(ggml_backend_reg_t, size_t index) {
  return device_at(index).handle();
}

// Functions that llama.cpp asks a backend's registry for by name. They take our backend or device; the inner registry's
// functions take the inner one.
template <typename Function>
Function inner_function(ggml_backend_dev_t inner, const char* name) {
  return reinterpret_cast<Function>(ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(inner), name));
}

void set_n_threads(ggml_backend_t backend, int n_threads) {
  const ggml_backend_t inner = inner_backend(backend);
  const auto f =
      inner_function<ggml_backend_set_n_threads_t>(ggml_backend_get_device(inner), "ggml_backend_set_n_threads");
  if (f) f(inner, n_threads);
}

void set_abort_callback(ggml_backend_t backend, ggml_abort_callback callback, void* data) {
  const ggml_backend_t inner = inner_backend(backend);
  const auto f = inner_function<ggml_backend_set_abort_callback_t>(ggml_backend_get_device(inner),
                                                                   "ggml_backend_set_abort_callback");
  if (f) f(inner, callback, data);
}

ggml_backend_buffer_type_t* get_extra_bufts(ggml_backend_dev_t device) {
  const ggml_backend_dev_t inner = device_of(device).inner();
  const auto f = inner_function<ggml_backend_dev_get_extra_bufts_t>(inner, "ggml_backend_dev_get_extra_bufts");
  return f ? f(inner) : nullptr;
}

ggml_backend_feature* get_features(ggml_backend_reg_t) {
  const auto f = inner_function<ggml_backend_get_features_t>(device_at(0).inner(), "ggml_backend_get_features");
  return f ? f(ggml_backend_dev_backend_reg(device_at(0).inner())) : nullptr;
}

void* registry_function(ggml_backend_reg_t, const char* name) {
  const std::string wanted = name;
  if (wanted == "ggml_backend_set_n_threads") return reinterpret_cast<void*>(set_n_threads);
  if (wanted == "ggml_backend_set_abort_callback") return reinterpret_cast<void*>(set_abort_callback);
  if (wanted == "ggml_backend_dev_get_extra_bufts") return reinterpret_cast<void*>(get_extra_bufts);
  if (wanted == "ggml_backend_get_features") return reinterpret_cast<void*>(get_features);
  return nullptr;
}

ggml_backend_reg registry = {
    GGML_BACKEND_API_VERSION, {registry_name, registry_count, registry_device, registry_function}, nullptr};

// Why the plugin does not load. Not through ggml's log, which llama.cpp's programs write in a thread of its own: they
// end, for want of the device, before it is written.
void refuse(const std::string& why) {
  std::fprintf(stderr, "thimble: %s\n", why.c_str());
}

}  // namespace

extern "C" {
GGML_BACKEND_API ggml_backend_reg_t ggml_backend_init(void);
}

ggml_backend_reg_t ggml_backend_init(void) {
  // ggml's API version does not change when its structs do, so only the very version that this was built against will
  // do.
  if (std::strcmp(ggml_version(), THIMBLE_GGML_VERSION) != 0) {
    refuse(std::string("built for ggml ") + THIMBLE_GGML_VERSION + " but loaded into ggml " + ggml_version() +
           "; rebuild it with -DTHIMBLE_LLAMA_CPP=<that llama.cpp>");
    return nullptr;
  }
  try {
    make_devices(&registry);
  } catch (const std::exception& error) {
    refuse(error.what());
    return nullptr;
  }
  return &registry;
}
