// THIMBLE0 and so on: ggml devices of type GPU that wrap an inner device each and code the KV cache. Being a "GPU", one
// gets the layers and their caches by llama.cpp's own defaults.
#pragma once

#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "ggml-backend-impl.h"

namespace thimble {

class KvBuffer;

class Device {
public:
  /// Wraps `inner`. Throws std::runtime_error where this build has no engine for it.
  Device(ggml_backend_reg_t registry, ggml_backend_dev_t inner, std::string name);
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  ggml_backend_dev_t handle() { return &handle_; }
  ggml_backend_dev_t inner() const { return inner_; }
  ggml_backend_buffer_type_t buffer_type() { return &buffer_type_; }
  Engine& engine() { return *engine_; }
  const std::string& name() const { return name_; }
  const std::string& description() const { return description_; }

  /// What becomes of caches under the settings that THIMBLE_KV holds now. Throws as CachePlanner's constructor.
  std::shared_ptr<const CachePlanner> planner();

  // The buffers with cache tensors, coded or not, as long as they live.
  void add(KvBuffer& buffer);
  void remove(KvBuffer& buffer);
  /// Whether a cache tensor is of a sliding window: llama.cpp keeps the layers that have one in a cache of their own,
  /// made after that of the other layers and of no more cells than the window needs.
  bool is_window(int layer, int64_t cells_per_stream);
  /// Logs what becomes of the caches that it was not said of, once all their coded layers are bound.
  void report_caches();
  /// The layers that have a cache here.
  std::set<int> layers();

private:
  ggml_backend_dev_t inner_;
  std::unique_ptr<Engine> engine_;
  std::string name_, description_;
  ggml_backend_buffer_type buffer_type_;
  ggml_backend_device handle_;
  // A cache's buffer asks once for each tensor: the last planner is kept.
  std::mutex mutex_;
  std::string planned_;  // what it was made from
  std::shared_ptr<const CachePlanner> planner_;
  std::vector<KvBuffer*> buffers_;
};

/// The device behind one of our ggml devices.
Device& device_of(ggml_backend_dev_t device);
/// The inner backend of one of our backends.
ggml_backend_t inner_backend(ggml_backend_t backend);

/// The devices of the plugin, made once: one around each device that THIMBLE_KV's `device` names, or around each of the
/// first backend that an engine serves and that is no CPU, or around the CPU. Throws std::runtime_error where there is
/// no such device.
void make_devices(ggml_backend_reg_t registry);
size_t device_count();
Device& device_at(size_t index);

}  // namespace thimble
