// Chooses and makes the devices of the plugin.
#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <vector>

#include "plugin/buffer_type.h"
#include "plugin/device.h"
#include "plugin/device_table.h"
#include "plugin/ggml_api.h"
#include "plugin/kv_buffer.h"
#include "plugin/model_profile.h"
#include "plugin/report.h"

namespace thimble {
namespace {

HostDevice host_device(ggml_backend_dev_t inner) {
  const ggml_backend_dev_props props = props_of(inner);
  const bool is_cpu = ggml_backend_dev_type(inner) == GGML_BACKEND_DEVICE_TYPE_CPU;
  return {is_cpu ? "CPU" : ggml_backend_reg_name(ggml_backend_dev_backend_reg(inner)),
          props.device_id ? props.device_id : ""};
}

std::string environment() {
  const char* text = std::getenv("THIMBLE_KV");
  return text ? text : "";
}

// The device that THIMBLE_KV names, by its own name or its backend's ("CUDA"). Without one: the first that is no CPU
// and has an engine, or the CPU.
ggml_backend_dev_t choose_inner(const std::string& name) {
  ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  ggml_backend_dev_t inner = name.empty() ? nullptr : ggml_backend_dev_by_name(name.c_str());
  for (size_t i = 0; !inner && i < ggml_backend_dev_count(); i++) {
    ggml_backend_dev_t device = ggml_backend_dev_get(i);
    const bool named = name == ggml_backend_reg_name(ggml_backend_dev_backend_reg(device));
    if (name.empty() ? device != cpu && make_engine(host_device(device)) : named) inner = device;
  }
  if (!inner && name.empty()) inner = cpu;
  if (!inner) {
    throw std::runtime_error("there is no ggml device '" + (name.empty() ? "CPU" : name) +
                             "' to run on; see llama-server --list-devices");
  }
  return inner;
}

std::vector<std::unique_ptr<Device>>& devices() {
  static std::vector<std::unique_ptr<Device>> all;
  return all;
}

}  // namespace

Device::Device(ggml_backend_reg_t registry, ggml_backend_dev_t inner, std::string name)
    : inner_(inner),
      engine_(make_engine(host_device(inner))),
      name_(std::move(name)),
      buffer_type_(make_buffer_type(*this)) {
  handle_.iface = kDeviceInterface;
  handle_.reg = registry;
  handle_.context = this;
  if (!engine_) {
    throw std::runtime_error("device=" + std::string(ggml_backend_dev_name(inner)) +
                             ": this build of the plugin cannot wrap that device; it has engines for " +
                             engine_names() + " (CUDA: build with -DTHIMBLE_CUDA=ON)");
  }
  description_ =
      std::string("coded KV cache on ") + ggml_backend_dev_description(inner) + " (" + engine_->kernels() + " kernels)";
}

std::shared_ptr<const CachePlanner> Device::planner() {
  const std::string text = environment();
  Settings settings = Settings::parse(text);
  if (settings.profile == "auto") settings.profile = profile_beside_model(model_of(arguments_of_this_process()));
  std::string made_from = text;
  std::error_code none;
  const auto written = std::filesystem::last_write_time(settings.profile, none);
  if (!none) made_from += "@" + std::to_string(written.time_since_epoch().count());
  const std::lock_guard lock(mutex_);
  if (!planner_ || made_from != planned_) {
    planner_ = std::make_shared<const CachePlanner>(*engine_, settings);
    planned_ = made_from;
  }
  return planner_;
}

void Device::add(KvBuffer& buffer) {
  const std::lock_guard lock(mutex_);
  buffers_.push_back(&buffer);
}

void Device::remove(KvBuffer& buffer) {
  const std::lock_guard lock(mutex_);
  std::erase(buffers_, &buffer);
}

// It is, if there is another cache that has more cells, does not have this layer, and leaves out some layer before its
// own last one.
bool Device::is_window(int layer, int64_t cells_per_stream) {
  const std::lock_guard lock(mutex_);
  return std::any_of(buffers_.begin(), buffers_.end(), [&](const KvBuffer* buffer) {
    const auto& caches = buffer->caches();
    return !caches.count(layer) && caches.begin()->second.cells_per_stream > cells_per_stream &&
           int(caches.size()) <= caches.rbegin()->first;
  });
}

void Device::report_caches() {
  const std::lock_guard lock(mutex_);
  PlanTotals totals;
  const CachePlanner* planner = nullptr;
  for (const KvBuffer* buffer : buffers_) {
    if (!buffer->all_bound()) return;
    if (buffer->is_reported()) continue;
    buffer->add_to(totals);
    planner = &buffer->planner();
  }
  if (!planner) return;
  for (KvBuffer* buffer : buffers_) buffer->set_reported();
  // As a warning, since llama.cpp's programs do not show a library's messages of level info.
  GGML_LOG_WARN("thimble: %s\n", report(totals, planner->settings(), *engine_).c_str());
}

void make_devices(ggml_backend_reg_t registry) {
  if (!devices().empty()) return;
  ggml_backend_dev_t inner = choose_inner(Settings::parse(environment()).device);
  devices().push_back(std::make_unique<Device>(registry, inner, "THIMBLE0"));
  GGML_LOG_INFO("thimble: THIMBLE0 is %s\n", devices().back()->description().c_str());
}

size_t device_count() {
  return devices().size();
}
Device& device_at(size_t index) {
  return *devices()[index];
}

}  // namespace thimble
