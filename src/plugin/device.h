// THIMBLE0 and so on: ggml devices that each wrap an inner device and code the KV cache. Their type is GPU, so that
// llama.cpp puts the layers and their caches there by its own defaults.
#pragma once

#include <atomic>
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

  /// The planner for the settings that THIMBLE_KV holds now. Throws as CachePlanner's constructor does.
  std::shared_ptr<const CachePlanner> planner();

  /// A new number for a buffer.
  uint64_t count_buffer() { return n_buffers_++; }
  // Register a buffer with cache tensors, coded or not, for as long as it lives.
  void add(KvBuffer& buffer);
  void remove(KvBuffer& buffer);
  /// Whether a cache tensor is of a layer with a sliding window. llama.cpp keeps these layers in a cache of their own,
  /// which it makes right after that of the other layers, with as many cells as the window and a batch need, and no
  /// more than the other has.
  bool is_window(const ggml_tensor* tensor, int layer);
  /// To be called when llama.cpp makes the state of recurrent layers, which comes behind all caches of a model: a cache
  /// that leaves out layers then has no other cache for them.
  void end_of_caches();
  /// Whether a graph has run on a cache here.
  bool in_use();
  /// Whether there are caches here whose keys and values a calibration reads (calibration.h).
  bool calibrates();
  /// Of the buffers that wrap one of these, those with such caches, the oldest first.
  std::vector<KvBuffer*> calibrated(const std::set<ggml_backend_buffer_t>& inner);
  /// Whether there are caches on another device of the plugin.
  bool others_have_caches();
  /// Logs one line about the caches that were not reported yet, once all their coded layers are bound.
  void report_caches();
  /// The layers that have a cache here.
  std::set<int> layers();

private:
  ggml_backend_dev_t inner_;
  std::unique_ptr<Engine> engine_;
  std::string name_, description_;
  ggml_backend_buffer_type buffer_type_;
  ggml_backend_device handle_;
  std::atomic<uint64_t> n_buffers_ = 0;
  // The last planner is kept, since a buffer asks for it once for each tensor.
  std::mutex mutex_;
  std::string planned_;  // THIMBLE_KV and the profile's time of writing that planner_ was made from
  std::shared_ptr<const CachePlanner> planner_;
  std::vector<KvBuffer*> buffers_;
};

/// The device behind one of our ggml devices.
Device& device_of(ggml_backend_dev_t device);
/// The inner backend of one of our backends; null for any other.
ggml_backend_t inner_backend(ggml_backend_t backend);

/// Makes the devices of the plugin, once: one around each device that THIMBLE_KV's `device` names; without one, around
/// each device of the first backend that has an engine and is no CPU, else around the CPU. Throws std::runtime_error
/// where there is no such device.
void make_devices(ggml_backend_reg_t registry);
size_t device_count();
Device& device_at(size_t index);

}  // namespace thimble
