// An engine keeps KV caches in one kind of memory and computes there: src/engine/cpu, src/engine/cuda. Another one is
// another folder and a line in registry.cpp.
#pragma once

#include <memory>
#include <string>

#include "engine/kv_cache.h"
#include "engine/layer_plan.h"

namespace thimble {

/// The device that the engine works beside, as the program around it names it.
struct HostDevice {
  std::string backend;  // "CPU", "CUDA"
  std::string id;       // the PCI address, where there is one
};

class Engine {
public:
  virtual ~Engine() = default;

  /// What computes: "AVX2", "CUDA".
  virtual std::string kernels() const = 0;
  /// Where an exact store lies.
  virtual std::string store_place(const Settings& settings) const = 0;

  /// Why these settings cannot be served, or nothing: before a cache is made.
  virtual std::string refusal(const Settings& settings) const = 0;
  /// The same of a layer whose heads are known.
  virtual std::string refusal(const LayerPlan& plan) const = 0;
  /// Whether a cache under these settings is better left to the program around.
  virtual bool leaves_f16(const Settings& settings) const = 0;
  /// Bytes of memory of one side of a layer.
  virtual size_t side_bytes(const LayerPlan& plan, Kind kind) const = 0;

  /// Bytes that one side may take besides, as sequences come to share a stream.
  virtual size_t more_bytes(const LayerPlan&, Kind) const { return 0; }

  /// `hash` names everything that saved codes depend on.
  virtual std::unique_ptr<KvCache> make_cache(const Settings& settings, uint64_t hash) = 0;
  /// A queue for the tasks of one backend; null where they run on threads of the host.
  virtual std::unique_ptr<Queue> make_queue() { return nullptr; }
};

/// The engine for a device, or null where this build has none. Throws std::runtime_error where the device fails.
std::unique_ptr<Engine> make_engine(const HostDevice& device);
/// The backends that this build has engines for: "CPU, CUDA".
std::string engine_names();

}  // namespace thimble
