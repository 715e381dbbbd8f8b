// Chooses and makes the devices of the plugin.
#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "plugin/buffer_type.h"
#include "plugin/calibration.h"
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

// The devices that THIMBLE_KV names, by their own names or their backend's ("CUDA"). Without a name: those of the first
// backend that is no CPU and has an engine, or the CPU.
std::vector<ggml_backend_dev_t> choose_inner(const std::string& names) {
  std::vector<ggml_backend_dev_t> chosen;
  const auto add_all_of = [&](ggml_backend_reg_t backend) {
    for (size_t i = 0; i < ggml_backend_reg_dev_count(backend); i++) {
      chosen.push_back(ggml_backend_reg_dev_get(backend, i));
    }
  };
  ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  for (size_t i = 0; names.empty() && chosen.empty() && i < ggml_backend_dev_count(); i++) {
    ggml_backend_dev_t device = ggml_backend_dev_get(i);
    if (device != cpu && make_engine(host_device(device))) add_all_of(ggml_backend_dev_backend_reg(device));
  }
  if (names.empty() && chosen.empty() && cpu) chosen.push_back(cpu);
  std::istringstream each(names);
  for (std::string name; std::getline(each, name, '+');) {
    const size_t before = chosen.size();
    if (ggml_backend_dev_t device = ggml_backend_dev_by_name(name.c_str())) {
      chosen.push_back(device);
    } else if (ggml_backend_reg_t backend = ggml_backend_reg_by_name(name.c_str())) {
      add_all_of(backend);
    }
    if (chosen.size() == before) {
      throw std::runtime_error("there is no ggml device '" + name + "' to run on; see llama-server --list-devices");
    }
  }
  if (chosen.empty()) throw std::runtime_error("there is no ggml device to run on; see llama-server --list-devices");
  return chosen;
}

std::vector<std::unique_ptr<Device>>& devices() {
  static std::vector<std::unique_ptr<Device>> all;
  return all;
}

// The program's GPUs that no engine of this build works beside. Caches on those of RPC are coded at its other end.
std::string gpus_without_engine() {
  std::string names;
  for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
    ggml_backend_dev_t device = ggml_backend_dev_get(i);
    const enum ggml_backend_dev_type type = ggml_backend_dev_type(device);
    const HostDevice host = host_device(device);
    if (type != GGML_BACKEND_DEVICE_TYPE_GPU && type != GGML_BACKEND_DEVICE_TYPE_IGPU) continue;
    if (host.backend == "RPC" || make_engine(host)) continue;
    names += std::string(names.empty() ? "" : ", ") + ggml_backend_dev_name(device);
  }
  return names;
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
    if (const std::string why = settings.calibrates() ? calibration_problem(settings) : ""; !why.empty()) {
      throw std::runtime_error(why);
    }
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
  for (KvBuffer* other : buffers_) {
    if (other->window_cache == &buffer) other->window_cache = nullptr;
  }
}

bool Device::is_window(const ggml_tensor* tensor, int layer) {
  const std::lock_guard lock(mutex_);
  // llama.cpp asks for a tensor's size before it has a buffer. Where the newest has room left, it will have that one.
  const KvBuffer* own = buffers_.empty() || buffers_.back()->is_full() ? nullptr : buffers_.back();
  if (tensor->buffer) own = KvBuffer::of(tensor);
  for (const KvBuffer* buffer : buffers_) {
    if (tensor->buffer && buffer->inner() == tensor->buffer) own = buffer;  // a cache that is left f16
  }
  if (own && own->caches().count(layer)) return own->caches().at(layer).is_window;
  for (KvBuffer* other : buffers_) {
    const auto& caches = other->caches();
    const bool is_free = !other->is_window() && (!other->window_cache || other->window_cache == own);
    const bool leaves_out_layers = int(caches.size()) <= caches.rbegin()->first;
    if (other == own || !is_free || !leaves_out_layers || caches.count(layer) ||
        caches.begin()->second.cells_per_stream < tensor->ne[1]) {
      continue;
    }
    if (own) other->window_cache = own;
    return true;
  }
  return false;
}

void Device::end_of_caches() {
  const std::lock_guard lock(mutex_);
  for (KvBuffer* buffer : buffers_) {
    if (!buffer->window_cache) buffer->window_cache = buffer;
  }
}

bool Device::in_use() {
  const std::lock_guard lock(mutex_);
  return std::any_of(buffers_.begin(), buffers_.end(), [](const KvBuffer* buffer) { return buffer->in_use(); });
}

bool Device::calibrates() {
  const std::lock_guard lock(mutex_);
  return std::any_of(buffers_.begin(), buffers_.end(), [](const KvBuffer* buffer) { return buffer->calibrates(); });
}

std::vector<KvBuffer*> Device::calibrated(const std::set<ggml_backend_buffer_t>& inner) {
  const std::lock_guard lock(mutex_);
  std::vector<KvBuffer*> found;
  for (KvBuffer* buffer : buffers_) {
    if (buffer->calibrates() && inner.count(buffer->inner())) found.push_back(buffer);
  }
  return found;
}

bool Device::others_have_caches() {
  return std::any_of(devices().begin(), devices().end(),
                     [&](const auto& other) { return other.get() != this && !other->layers().empty(); });
}

void Device::report_caches() {
  PlanTotals totals;
  for (const auto& other : devices()) {  // before this device is locked: another may report, too
    if (other.get() != this) totals.layers.merge(other->layers());
  }
  const std::lock_guard lock(mutex_);
  const CachePlanner* planner = nullptr;
  bool is_far = false;
  for (KvBuffer* buffer : buffers_) {
    if (!buffer->all_bound()) return;
    if (buffer->is_reported()) continue;
    buffer->add_to(totals);
    planner = &buffer->planner();
    is_far = is_far || !buffer->far().empty();
  }
  if (!planner) return;
  for (KvBuffer* buffer : buffers_) buffer->set_reported();
  // As a warning, since llama.cpp's programs do not show a library's messages of level info.
  GGML_LOG_WARN("thimble: %s%s\n", devices().size() > 1 ? (name_ + ": ").c_str() : "",
                report(totals, planner->settings(), *engine_, is_far).c_str());
}

std::set<int> Device::layers() {
  const std::lock_guard lock(mutex_);
  std::set<int> layers;
  for (const KvBuffer* buffer : buffers_) {
    for (const auto& [layer, cache] : buffer->caches()) layers.insert(layer);
  }
  return layers;
}

void make_devices(ggml_backend_reg_t registry) {
  if (!devices().empty()) return;
  const std::string asked_for = Settings::parse(environment()).device;
  std::vector<std::unique_ptr<Device>> made;
  for (ggml_backend_dev_t inner : choose_inner(asked_for)) {
    made.push_back(std::make_unique<Device>(registry, inner, "THIMBLE" + std::to_string(made.size())));
    GGML_LOG_INFO("thimble: %s is %s\n", made.back()->name().c_str(), made.back()->description().c_str());
  }
  const bool is_cpu = ggml_backend_dev_type(made.front()->inner()) == GGML_BACKEND_DEVICE_TYPE_CPU;
  const std::string left_out = asked_for.empty() && is_cpu ? gpus_without_engine() : "";
  if (!left_out.empty()) {
    GGML_LOG_WARN(
        "thimble: THIMBLE0 runs models on the CPU and leaves out %s: this build of the plugin has engines for %s\n",
        left_out.c_str(), engine_names().c_str());
  }
  devices() = std::move(made);
}

size_t device_count() {
  return devices().size();
}
Device& device_at(size_t index) {
  return *devices()[index];
}

}  // namespace thimble
