// ggml's tables of functions for our devices and their backends.
#include "plugin/device.h"

#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>

#include "ggml-impl.h"
#include "plugin/buffer_type.h"
#include "plugin/calibration.h"
#include "plugin/device_table.h"
#include "plugin/kv_buffer.h"
#include "plugin/nodes.h"
#include "plugin/row_reader.h"
#include "plugin/runner.h"

namespace thimble {
namespace {

struct BackendContext {
  ggml_backend_t inner;
  std::unique_ptr<Runner> runner;
};

BackendContext& context_of(ggml_backend_t backend) {
  return *static_cast<BackendContext*>(backend->context);
}

// ---- backend
const char* backend_name(ggml_backend_t backend) {
  return device_of(backend->device).name().c_str();
}
bool is_ours(ggml_backend_t backend) {
  return backend->iface.get_name == backend_name;
}

void backend_free(ggml_backend_t backend) {
  context_of(backend).runner.reset();  // before the backend that it uses
  ggml_backend_free(context_of(backend).inner);
  delete &context_of(backend);
  delete backend;
}

ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph* graph) {
  try {
    BackendContext& context = context_of(backend);
    if (Calibration* calibration = calibration_of(device_of(backend->device), graph)) {
      return calibration->compute(context.inner, graph);
    }
    return context.runner->compute(graph);
  } catch (const std::exception& error) {
    GGML_LOG_ERROR("thimble: %s\n", error.what());
    return GGML_STATUS_FAILED;
  }
}

// How often this thread has waited for a backend of ours.
thread_local uint64_t n_waits = 0;

void backend_synchronize(ggml_backend_t backend) {
  n_waits++;
  ggml_backend_synchronize(context_of(backend).inner);
}

const ggml_backend_i kBackendInterface = [] {
  ggml_backend_i i{};
  i.get_name = backend_name;
  i.free = backend_free;
  i.synchronize = backend_synchronize;
  i.graph_compute = backend_compute;
  return i;
}();

void backend_set_async(ggml_backend_t backend, ggml_tensor* tensor, const void* data, size_t offset, size_t size) {
  if (KvBuffer::layer_of(tensor)) {
    ggml_backend_synchronize(context_of(backend).inner);
    return ggml_backend_tensor_set(tensor, data, offset, size);
  }
  ggml_tensor ours = KvBuffer::handed_over(tensor);
  ggml_backend_tensor_set_async(context_of(backend).inner, &ours, data, offset, size);
}
void backend_get_async(ggml_backend_t backend, const ggml_tensor* tensor, void* data, size_t offset, size_t size) {
  if (KvBuffer::layer_of(tensor)) {
    ggml_backend_synchronize(context_of(backend).inner);
    return ggml_backend_tensor_get(tensor, data, offset, size);
  }
  const ggml_tensor ours = KvBuffer::handed_over(tensor);
  ggml_backend_tensor_get_async(context_of(backend).inner, &ours, data, offset, size);
}
// Copies between two devices. False where the inner backend cannot, or a coded cache takes part: the caller then waits
// for both and copies.
bool backend_copy_async(ggml_backend_t from, ggml_backend_t to, const ggml_tensor* source, ggml_tensor* target) {
  ggml_backend_t inner = context_of(to).inner;
  if (!inner->iface.cpy_tensor_async || KvBuffer::layer_of(source) || KvBuffer::layer_of(target)) return false;
  const ggml_tensor inner_source = KvBuffer::handed_over(source);
  ggml_tensor inner_target = KvBuffer::handed_over(target);
  return inner->iface.cpy_tensor_async(is_ours(from) ? context_of(from).inner : from, inner, &inner_source,
                                       &inner_target);
}

// Our events hold one of the inner device's.
ggml_backend_event_t inner_event(ggml_backend_event_t event) {
  return static_cast<ggml_backend_event_t>(event->context);
}
void backend_record_event(ggml_backend_t backend, ggml_backend_event_t event) {
  ggml_backend_event_record(inner_event(event), context_of(backend).inner);
}
void backend_wait_event(ggml_backend_t backend, ggml_backend_event_t event) {
  ggml_backend_event_wait(context_of(backend).inner, inner_event(event));
}

// For an inner backend that computes beside the host.
const ggml_backend_i kAsyncInterface = [] {
  ggml_backend_i i = kBackendInterface;
  i.set_tensor_async = backend_set_async;
  i.get_tensor_async = backend_get_async;
  i.cpy_tensor_async = backend_copy_async;
  // llama.cpp's pipeline of batches over several devices
  i.event_record = backend_record_event;
  i.event_wait = backend_wait_event;
  return i;
}();

ggml_guid kGuid = {0x74, 0x68, 0x69, 0x6d, 0x62, 0x6c, 0x65, 0x2d, 0x6b, 0x76, 0x2d, 0x63, 0x61, 0x63, 0x68, 0x65};

// ---- device

const char* device_name(ggml_backend_dev_t device) {
  return device_of(device).name().c_str();
}
const char* device_description(ggml_backend_dev_t device) {
  return device_of(device).description().c_str();
}

void device_memory(ggml_backend_dev_t device, size_t* free, size_t* total) {
  ggml_backend_dev_memory(device_of(device).inner(), free, total);
}

enum ggml_backend_dev_type device_type(ggml_backend_dev_t) {
  return GGML_BACKEND_DEVICE_TYPE_GPU;
}

void device_props(ggml_backend_dev_t device, ggml_backend_dev_props* props) {
  // With the inner device's device_id, so that llama.cpp counts the hardware once.
  ggml_backend_dev_get_props(device_of(device).inner(), props);
  props->name = device_name(device);
  props->description = device_description(device);
  props->type = device_type(device);
  // The inner device's caps: with events, llama.cpp lets several devices work at a prompt at once.
}

ggml_backend_t device_init(ggml_backend_dev_t device, const char* params) {
  ggml_backend_t inner = ggml_backend_dev_init(device_of(device).inner(), params);
  if (!inner) return nullptr;
  try {
    const bool is_async = inner->iface.synchronize != nullptr;
    auto backend = std::make_unique<ggml_backend>();
    backend->guid = &kGuid;
    backend->iface = is_async ? kAsyncInterface : kBackendInterface;
    backend->device = device;
    backend->context = new BackendContext{inner, make_runner(device_of(device), inner)};
    return backend.release();
  } catch (const std::exception& error) {
    GGML_LOG_ERROR("thimble: %s\n", error.what());
    ggml_backend_free(inner);
    return nullptr;
  }
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t device) {
  return device_of(device).buffer_type();
}

ggml_backend_buffer_type_t device_host_buffer_type(ggml_backend_dev_t device) {
  return ggml_backend_dev_host_buffer_type(device_of(device).inner());
}

ggml_backend_event_t device_new_event(ggml_backend_dev_t device) {
  ggml_backend_event_t inner = ggml_backend_event_new(device_of(device).inner());
  return inner ? new ggml_backend_event{device, inner} : nullptr;
}
void device_free_event(ggml_backend_dev_t, ggml_backend_event_t event) {
  ggml_backend_event_free(inner_event(event));
  delete event;
}
void device_synchronize_event(ggml_backend_dev_t, ggml_backend_event_t event) {
  ggml_backend_event_synchronize(inner_event(event));
}

bool device_offload_op(ggml_backend_dev_t device, const ggml_tensor* op) {
  return ggml_backend_dev_offload_op(device_of(device).inner(), op);
}

ggml_backend_buffer_t device_from_host(ggml_backend_dev_t device, void* data, size_t size, size_t max_tensor_size) {
  return ggml_backend_dev_buffer_from_host_ptr(device_of(device).inner(), data, size, max_tensor_size);
}

// While it loads a model, llama.cpp asks whether an op runs on each weight in our buffer type first, with an empty
// dummy buffer. Where the inner device has a faster buffer type for the weight (the CPU's repacked types), the answer
// is no, and llama.cpp takes that type, which our registry lists as an extra one (plugin.cpp).
bool has_better_home(ggml_backend_dev_t inner, const ggml_tensor* op) {
  ggml_tensor* weight = op->src[0];
  if ((op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_MUL_MAT_ID) || !weight || weight->data || !weight->buffer ||
      weight->buffer->size != 0 || !is_kv_buffer_type(weight->buffer->buft)) {
    return false;
  }
  const auto get_extra_types = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
      ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(inner), "ggml_backend_dev_get_extra_bufts"));
  ggml_backend_buffer_type_t* types = get_extra_types ? get_extra_types(inner) : nullptr;
  ggml_backend_buffer_t ours = weight->buffer;
  bool better = false;
  for (; types && *types && !better; types++) {
    ggml_backend_buffer_t dummy = ggml_backend_buft_alloc_buffer(*types, 0);
    weight->buffer = dummy;
    better = dummy && ggml_backend_dev_supports_op(inner, op);
    weight->buffer = ours;
    if (dummy) ggml_backend_buffer_free(dummy);
  }
  return better;
}

// Whether a tensor is divided among devices (--split-mode tensor): each of them then has a tensor of its own for its
// part.
bool is_meta(ggml_backend_buffer_t buffer) {
  ggml_backend_dev_t device = buffer ? ggml_backend_buft_get_device(buffer->buft) : nullptr;
  return device && ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_META;
}

// Reports a write to a cache that is not coded. A cache that the plan leaves f16 is in the report on all caches of the
// context. A cache that llama.cpp put on another device, which the user may not have meant, gets a warning, once for
// each buffer.
void report_uncoded(Device& device, const ggml_tensor* op) {
  if (op->op != GGML_OP_SET_ROWS) return;
  const ggml_tensor* cache = root_of(op);
  const auto name = parse_cache_name(cache->name);
  if (!name || is_meta(cache->buffer)) return;
  const std::shared_ptr<const CachePlanner> planner = device.planner();
  const bool calibrates = planner->settings().calibrates();
  const std::vector<KvBuffer*> ours = calibrates ? device.calibrated({cache->buffer}) : std::vector<KvBuffer*>{};
  if (!ours.empty() && op->ne[0] != cache->ne[0] && !ours.front()->in_use()) {
    throw std::runtime_error("flash attention is off, which calibrate= needs: start with --flash-attn on");
  }
  const bool is_elsewhere = calibrates && ours.empty();
  if (!is_elsewhere && !planner->why_f16(geometry_of(device, cache, *name)).empty()) return device.report_caches();
  static std::mutex mutex;
  static std::set<ggml_backend_buffer_t> told;
  const std::lock_guard lock(mutex);
  if (!told.insert(cache->buffer).second) return;
  GGML_LOG_WARN(
      "thimble: the KV cache of some layers (%s) is not on %s and so not %s: leave out --no-kv-offload and put all "
      "layers there (-ngl 99)\n",
      cache->name, device.name().c_str(), calibrates ? "read for calibrate=" : "coded");
}

// Whether llama.cpp was told to use flash attention (--flash-attn on), which the inner device cannot do. Left to itself
// it asks once, and then computes attention by matrix products. Told to, it asks for each graph that it reserves memory
// for, and before each one it waits for its backends.
bool is_told_to_use(const ggml_tensor* attention) {
  ManagedLayer* layer = KvBuffer::layer_of(attention->src[1]);
  if (!layer) return false;
  if (!layer->unsupported_at) layer->unsupported_at = n_waits;
  return *layer->unsupported_at != n_waits;
}

bool device_supports_op(ggml_backend_dev_t handle, const ggml_tensor* op) {
  Device& device = device_of(handle);
  std::string why;
  NodeKind kind = classify(op, &why);
  if (kind == NodeKind::other) {
    report_uncoded(device, op);
    return !has_better_home(device.inner(), op) && ggml_backend_dev_supports_op(device.inner(), op);
  }
  if (kind == NodeKind::view) return true;
  const KvBuffer* buffer = buffer_of_cache(op);
  if (buffer && &buffer->device() != &device) return false;
  kind = bind(op, kind);
  if (kind != NodeKind::refused) why = refusal(op, kind);
  if (why.empty() && kind == NodeKind::read) {
    if (!ggml_backend_dev_supports_op(device.inner(), ReadingNode(op).tensor())) {
      if (op->op == GGML_OP_FLASH_ATTN_EXT && !is_told_to_use(op)) return false;
      why = std::string(ggml_op_name(op->op)) + " on the KV cache (" + op->name +
            "): the device does not support this node; " +
            (op->op == GGML_OP_FLASH_ATTN_EXT ? "start without --flash-attn on, or " : "") +
            "run the model without the THIMBLE device (--device none, or thimble --kv f16)";
    } else {
      buffer_of_cache(op)->tell_of_reading(op);
    }
  }
  // While the context is made an exception reaches llama_init_from_model, which fails with our sentence. Later the
  // graph fails instead. The answer "not supported" would make ggml abort, since no other device can read codes.
  if (!why.empty() && buffer && !buffer->in_use()) throw std::runtime_error(why);
  return true;
}

bool device_supports_buft(ggml_backend_dev_t device, ggml_backend_buffer_type_t type) {
  return type == device_buffer_type(device) || ggml_backend_dev_supports_buft(device_of(device).inner(), type);
}

}  // namespace

const ggml_backend_device_i kDeviceInterface = [] {
  ggml_backend_device_i i{};
  i.get_name = device_name;
  i.get_description = device_description;
  i.get_memory = device_memory;
  i.get_type = device_type;
  i.get_props = device_props;
  i.init_backend = device_init;
  i.get_buffer_type = device_buffer_type;
  i.get_host_buffer_type = device_host_buffer_type;
  i.buffer_from_host_ptr = device_from_host;
  // what the scheduler gives to which device
  i.supports_op = device_supports_op;
  i.supports_buft = device_supports_buft;
  i.offload_op = device_offload_op;
  i.event_new = device_new_event;
  i.event_free = device_free_event;
  i.event_synchronize = device_synchronize_event;
  return i;
}();

Device& device_of(ggml_backend_dev_t device) {
  return *static_cast<Device*>(device->context);
}
ggml_backend_t inner_backend(ggml_backend_t backend) {
  return is_ours(backend) ? context_of(backend).inner : nullptr;
}

}  // namespace thimble
