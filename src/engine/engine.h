// An engine keeps KV caches in one kind of memory and computes there: src/engine/cpu, src/engine/cuda. A new engine is
// a new folder and a line in registry.cpp.
#pragma once

#include <memory>
#include <string>

#include "engine/kv_cache.h"
#include "engine/layer_plan.h"
#include "engine/reserved_memory.h"

namespace thimble {

/// The device that the engine works beside, as the host program (ggml, for the plugin) names it.
struct HostDevice {
  std::string backend;  // "CPU", "CUDA"
  std::string id;       // the PCI address, where there is one
};

class Engine {
public:
  virtual ~Engine() = default;

  /// The name of the kernels that compute, for messages: "avx2", "CUDA".
  virtual std::string kernels() const = 0;
  /// Where an exact store lies, for messages: "RAM", a directory.
  virtual std::string store_place(const Settings& settings) const = 0;

  /// Asked before a cache is made: a sentence that says why these settings cannot be served, or "".
  virtual std::string refusal(const Settings& settings) const = 0;
  /// The same for a layer whose heads are known.
  virtual std::string refusal(const LayerPlan& plan) const = 0;
  /// Whether the engine computes attention over a layer whose heads are known. Else the host program does, on rows that
  /// the engine decodes (KvCache::read). Latent rows (LayerPlan::latent) take more than attention to keys and values.
  virtual bool attends(const LayerPlan& plan) const { return plan.latent == 0; }
  /// Why a layer takes slower kernels than the engine has for other formats, as half a sentence, or "".
  virtual std::string why_slow(const LayerPlan&) const { return {}; }
  /// Whether the host program should keep a cache of these settings itself, as f16.
  virtual bool leaves_f16(const Settings& settings) const = 0;
  /// Bytes of memory that one side of a layer takes from the start.
  virtual size_t side_bytes(const LayerPlan& plan, Kind kind) const = 0;

  /// Bytes that one side may take in addition when sequences share a stream.
  virtual size_t more_bytes(const LayerPlan&, Kind) const { return 0; }

  /// Makes memory of the host program's zero, as fresh memory of the system's is: it takes no room until it is written
  /// again. False where the engine's memory cannot be given back so.
  virtual bool release(void* /*data*/, size_t /*size*/) const { return false; }
  /// Asks the system for large pages where memory of the host program's is full of codes, all of which each token
  /// reads. To be called before that memory is written.
  virtual void take_large_pages(void* /*data*/, size_t /*size*/) const {}

  /// Addresses for a buffer of which only a part will be used, and which is to take memory only there; null where the
  /// host program's buffers do so by themselves, or the device cannot.
  virtual std::unique_ptr<ReservedMemory> reserve(size_t /*size*/) { return nullptr; }

  virtual std::unique_ptr<KvCache> make_cache(const Settings& settings) = 0;
  /// A queue for the tasks of one backend; null where tasks run on threads of the host.
  virtual std::unique_ptr<Queue> make_queue() { return nullptr; }
};

/// The engine for a device, or null where this build has none. Throws std::runtime_error where the device fails.
std::unique_ptr<Engine> make_engine(const HostDevice& device);
/// The backends that this build has engines for: "CPU, CUDA".
std::string engine_names();

}  // namespace thimble
