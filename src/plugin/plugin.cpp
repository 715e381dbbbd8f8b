// The library that libggml-thimble.so opens (loader/build.h), and the registry that it gives to ggml.
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/settings.h"
#include "loader/build.h"
#include "plugin/device.h"
#include "plugin/ggml_api.h"
#include "plugin/self_check.h"

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

// Functions that llama.cpp asks a backend's registry for by name. They get a backend or device of ours and call the
// inner registry's functions with the inner one.
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

// Sums that devices make together, where tensors are divided among them (--split-mode tensor).
struct Communication {
  void* inner;
  ggml_backend_comm_free_t free;
  ggml_backend_comm_allreduce_tensor_t sum;
};

void* start_communication(ggml_backend_t* backends, size_t n_backends) {
  std::vector<ggml_backend_t> inner;
  for (size_t i = 0; i < n_backends; i++) {
    inner.push_back(inner_backend(backends[i]));
    if (!inner.back()) return nullptr;  // a device of another kind: ggml sums by itself
  }
  ggml_backend_dev_t device = ggml_backend_get_device(inner.front());
  const auto init = inner_function<ggml_backend_comm_init_t>(device, "ggml_backend_comm_init");
  const auto end = inner_function<ggml_backend_comm_free_t>(device, "ggml_backend_comm_free");
  const auto sum = inner_function<ggml_backend_comm_allreduce_tensor_t>(device, "ggml_backend_comm_allreduce_tensor");
  void* communication = init && end && sum ? init(inner.data(), inner.size()) : nullptr;
  return communication ? new Communication{communication, end, sum} : nullptr;
}
void end_communication(void* communication) {
  const auto* ours = static_cast<Communication*>(communication);
  ours->free(ours->inner);
  delete ours;
}
bool sum_tensors(void* communication, ggml_tensor** tensors) {
  const auto* ours = static_cast<Communication*>(communication);
  return ours->sum(ours->inner, tensors);
}

// Returns what is wrong with a text for THIMBLE_KV, or null. The sentence lives until the next call. It is for programs
// that do not show the plugin's log when they make a context (a Python module): they can ask before.
const char* settings_error(const char* text) {
  static thread_local std::string sentence;
  try {
    Settings::parse(text);
    return nullptr;
  } catch (const std::exception& error) {
    sentence = error.what();
    return sentence.c_str();
  }
}

void* registry_function(ggml_backend_reg_t, const char* name) {
  const std::string wanted = name;
  if (wanted == "ggml_backend_set_n_threads") return reinterpret_cast<void*>(set_n_threads);
  if (wanted == "ggml_backend_set_abort_callback") return reinterpret_cast<void*>(set_abort_callback);
  if (wanted == "ggml_backend_dev_get_extra_bufts") return reinterpret_cast<void*>(get_extra_bufts);
  if (wanted == "ggml_backend_get_features") return reinterpret_cast<void*>(get_features);
  if (wanted == "ggml_backend_comm_init") return reinterpret_cast<void*>(start_communication);
  if (wanted == "ggml_backend_comm_free") return reinterpret_cast<void*>(end_communication);
  if (wanted == "ggml_backend_comm_allreduce_tensor") return reinterpret_cast<void*>(sum_tensors);
  if (wanted == "thimble_settings_error") return reinterpret_cast<void*>(settings_error);
  return nullptr;
}

ggml_backend_reg registry = [] {
  ggml_backend_reg r{};
  r.api_version = GGML_BACKEND_API_VERSION;
  r.iface.get_name = registry_name;
  r.iface.get_device_count = registry_count;
  r.iface.get_device = registry_device;
  r.iface.get_proc_address = registry_function;
  return r;
}();

void* open(const char** why) {
  static std::string sentence;
  try {
    const std::string differs = self_check();
    if (!differs.empty()) {
      throw std::runtime_error(std::string("ggml ") + ggml_version() + " differs from " + THIMBLE_HEADERS_VERSION +
                               ", with whose headers this plugin was compiled, in " + differs +
                               ": get a newer Thimble, or run a llama.cpp that docs/results/hosts.md lists");
    }
    make_devices(&registry);
    return &registry;
  } catch (const std::exception& error) {
    sentence = error.what();
    *why = sentence.c_str();
    return nullptr;
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const Build* thimble_build() {
  static const Build build = [] {
    Build b{};
    b.release = THIMBLE_RELEASE;
    b.api_version = GGML_BACKEND_API_VERSION;
    b.ggml_version = THIMBLE_HEADERS_VERSION;
    b.register_here = reinterpret_cast<const void*>(&ggml_backend_register);
    b.open = open;
    return b;
  }();
  return &build;
}
