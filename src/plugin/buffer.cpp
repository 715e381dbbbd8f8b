// ggml's tables of functions for our buffers and their type.
#include <filesystem>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ggml-impl.h"
#include "plugin/buffer_type.h"
#include "plugin/device.h"
#include "plugin/kv_buffer.h"

namespace thimble {
namespace {

Device& device_of(ggml_backend_buffer_type_t type) {
  return *static_cast<Device*>(type->context);
}
KvBuffer& context_of(ggml_backend_buffer_t buffer) {
  return *static_cast<KvBuffer*>(buffer->context);
}

// ---- buffer

void buffer_free(ggml_backend_buffer_t buffer) {
  delete &context_of(buffer);
}

void* buffer_base(ggml_backend_buffer_t buffer) {
  return context_of(buffer).base();
}

ggml_status init_in_inner(KvBuffer& kv, ggml_tensor* tensor) {
  kv.back(tensor);
  tensor->buffer = kv.inner();
  return kv.inner()->iface.init_tensor ? kv.inner()->iface.init_tensor(kv.inner(), tensor) : GGML_STATUS_SUCCESS;
}

// A cache of another type than f16 is taken with the first view of it that llama.cpp makes of it: a program that uses
// this buffer over RPC shows its tensors alone, and they are gone when the call ends.
ggml_status init_view(KvBuffer& kv, ggml_tensor* view) {
  ggml_tensor* root = view->view_src;
  const auto name = view->type == GGML_TYPE_F16 ? std::nullopt : parse_cache_name(root->name);
  if (!name) return GGML_STATUS_SUCCESS;
  if (kv.add_of_other_type(root, view, *name)) return GGML_STATUS_SUCCESS;
  const ggml_status status = init_in_inner(kv, root);
  return status == GGML_STATUS_SUCCESS ? init_in_inner(kv, view) : status;
}

ggml_status buffer_init_tensor(ggml_backend_buffer_t buffer, ggml_tensor* tensor) {
  KvBuffer& kv = context_of(buffer);
  // A device that has none of a layer's heads has an empty cache of it.
  const auto name = tensor->view_src || ggml_is_empty(tensor) ? std::nullopt : parse_cache_name(tensor->name);
  try {
    // A view of a cache keeps this buffer. A view of another tensor got the inner buffer from its source already.
    if (tensor->view_src) return init_view(kv, tensor);
    if (name && tensor->type != GGML_TYPE_F16) {
      if (!kv.device().planner()->settings().calibrates()) return GGML_STATUS_SUCCESS;
      throw std::runtime_error(std::string("cache type ") + ggml_type_name(tensor->type) +
                               ": calibrate= reads an f16 cache; leave --cache-type-k and --cache-type-v at f16");
    }
    if (name && kv.add(tensor, *name)) return GGML_STATUS_SUCCESS;
  } catch (const std::exception& error) {
    GGML_LOG_ERROR("thimble: %s\n", error.what());
    return GGML_STATUS_FAILED;
  }
  if (is_recurrent_state(tensor->name)) kv.device().end_of_caches();
  // llama.cpp marks buffers of weights as such, but it marks only this buffer, so the inner one is marked here.
  if (tensor->op == GGML_OP_NONE && std::string_view(tensor->name).ends_with(".weight")) {
    ggml_backend_buffer_set_usage(kv.inner(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
  }
  return init_in_inner(kv, tensor);
}

// The inner buffer for a tensor that is no coded cache, or null. A caller may have placed such a tensor here without
// init_tensor (ggml's Meta device does so).
ggml_backend_buffer_t inner_of_unmanaged(ggml_backend_buffer_t buffer, const ggml_tensor* tensor) {
  return KvBuffer::layer_of(tensor) ? nullptr : context_of(buffer).inner();
}

// Whether the program serves this device to others. They reserve memory for whole caches, of which codes take a part.
// In other programs buffers have the sizes that are used.
bool is_rpc_server() {
  static const bool is = [] {
    std::error_code none;
    const std::string program = std::filesystem::read_symlink("/proc/self/exe", none).filename().string();
    return program.find("rpc-server") != std::string::npos || program.find("rpc_server") != std::string::npos;
  }();
  return is;
}

// Runs `f`, of which an exception goes to llama.cpp. ggml's RPC server would end by it, so there it goes to the log.
template <typename F>
void guard(ggml_backend_buffer_t buffer, F f) {
  try {
    f();
  } catch (const std::exception& error) {
    if (context_of(buffer).far().empty() && !is_rpc_server()) throw;
    GGML_LOG_ERROR("thimble: %s\n", error.what());
  }
}

// Runs `f` on the inner buffer's part of a tensor that is no coded cache; false where it is one.
template <typename F>
bool in_inner(ggml_backend_buffer_t buffer, const ggml_tensor* tensor, size_t offset, size_t size, F f) {
  ggml_backend_buffer_t inner = inner_of_unmanaged(buffer, tensor);
  if (!inner) return false;
  guard(buffer, [&] {
    context_of(buffer).back(static_cast<char*>(tensor->data) + offset, size);
    f(inner);
  });
  return true;
}

void buffer_memset(ggml_backend_buffer_t buffer, ggml_tensor* tensor, uint8_t value, size_t offset, size_t size) {
  const auto set = [&](ggml_backend_buffer_t inner) { inner->iface.memset_tensor(inner, tensor, value, offset, size); };
  if (in_inner(buffer, tensor, offset, size, set)) return;
  const std::vector<uint8_t> data(size, value);
  guard(buffer, [&] { context_of(buffer).load(tensor, data.data(), offset, size); });
}

void buffer_set(ggml_backend_buffer_t buffer, ggml_tensor* tensor, const void* data, size_t offset, size_t size) {
  const auto set = [&](ggml_backend_buffer_t inner) {
    inner->iface.set_tensor(inner, tensor, data, offset, size);
    context_of(buffer).far().note_set(tensor, offset, size);
  };
  if (in_inner(buffer, tensor, offset, size, set)) return;
  guard(buffer, [&] { context_of(buffer).load(tensor, static_cast<const uint8_t*>(data), offset, size); });
}

void buffer_get(ggml_backend_buffer_t buffer, const ggml_tensor* tensor, void* data, size_t offset, size_t size) {
  const auto get = [&](ggml_backend_buffer_t inner) { inner->iface.get_tensor(inner, tensor, data, offset, size); };
  if (in_inner(buffer, tensor, offset, size, get)) return;
  guard(buffer, [&] { context_of(buffer).save(tensor, static_cast<uint8_t*>(data), offset, size); });
}

bool buffer_copy(ggml_backend_buffer_t buffer, const ggml_tensor* from, ggml_tensor* to) {
  if (auto* inner = inner_of_unmanaged(buffer, to)) {
    if (!inner->iface.cpy_tensor || KvBuffer::layer_of(from)) return false;
    const ggml_tensor source = KvBuffer::handed_over(from);
    ggml_tensor target = KvBuffer::handed_over(to);
    return inner->iface.cpy_tensor(inner, &source, &target);
  }
  return context_of(buffer).copy(from, to);
}

void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
  context_of(buffer).clear(value);
}

const ggml_backend_buffer_i kBufferInterface = [] {
  ggml_backend_buffer_i i{};
  i.free_buffer = buffer_free;
  i.get_base = buffer_base;
  i.init_tensor = buffer_init_tensor;
  // rows of a coded tensor go through its cache
  i.memset_tensor = buffer_memset;
  i.set_tensor = buffer_set;
  i.get_tensor = buffer_get;
  i.cpy_tensor = buffer_copy;
  i.clear = buffer_clear;
  return i;
}();

// ---- buffer type

ggml_backend_buffer_type_t inner_type(ggml_backend_buffer_type_t type) {
  return ggml_backend_dev_buffer_type(device_of(type).inner());
}

const char* type_name(ggml_backend_buffer_type_t type) {
  return device_of(type).name().c_str();
}

// Of a buffer that stands for memory elsewhere.
constexpr size_t kSmallBuffer = 256;

ggml_backend_buffer_t type_alloc(ggml_backend_buffer_type_t type, size_t size) {
  std::unique_ptr<ReservedMemory> reserved;
  try {
    if (size > 0 && is_rpc_server()) reserved = device_of(type).engine().reserve(size);
  } catch (const std::exception& error) {
    GGML_LOG_ERROR("thimble: %s\n", error.what());
    return nullptr;
  }
  ggml_backend_buffer_t inner = ggml_backend_buft_alloc_buffer(inner_type(type), reserved ? kSmallBuffer : size);
  if (!inner) return nullptr;
  auto* kv = new KvBuffer(device_of(type), inner, size, std::move(reserved));
  return ggml_backend_buffer_init(type, kBufferInterface, kv, size);
}

size_t type_alignment(ggml_backend_buffer_type_t type) {
  return ggml_backend_buft_get_alignment(inner_type(type));
}
size_t type_max_size(ggml_backend_buffer_type_t type) {
  return ggml_backend_buft_get_max_size(inner_type(type));
}

size_t type_alloc_size(ggml_backend_buffer_type_t type, const ggml_tensor* tensor) {
  try {
    const auto name = tensor->view_src || ggml_is_empty(tensor) ? std::nullopt : parse_cache_name(tensor->name);
    if (name) {
      const LayerPlan plan = device_of(type).planner()->plan(geometry_of(device_of(type), tensor, *name));
      if (plan.coded) return bytes_in_buffer(plan, tensor, name->kind);
    }
  } catch (const std::exception&) {
    // init_tensor will fail with the same error and report it; here the nominal size is good enough.
  }
  return ggml_backend_buft_get_alloc_size(inner_type(type), tensor);
}

}  // namespace

ggml_backend_buffer_type make_buffer_type(Device& device) {
  ggml_backend_buffer_type type{};
  type.iface.get_name = type_name;
  type.iface.alloc_buffer = type_alloc;
  type.iface.get_alignment = type_alignment;
  type.iface.get_max_size = type_max_size;
  type.iface.get_alloc_size = type_alloc_size;
  type.device = device.handle();
  type.context = &device;
  return type;
}

bool is_kv_buffer_type(ggml_backend_buffer_type_t type) {
  return type->iface.get_name == type_name;
}

void KvBuffer::hand_over(ggml_tensor* tensor) {
  ggml_backend_buffer_t buffer = tensor->buffer;
  if (!buffer || buffer->iface.get_base != buffer_base || layer_of(tensor)) return;
  context_of(buffer).back(tensor);
  tensor->buffer = context_of(buffer).inner();
}

ggml_tensor KvBuffer::handed_over(const ggml_tensor* tensor) {
  ggml_tensor copy = *tensor;
  copy.buffer = root_of(tensor)->buffer;
  copy.view_src = nullptr;
  hand_over(&copy);
  return copy;
}

KvBuffer* KvBuffer::of(const ggml_tensor* tensor) {
  const ggml_tensor* root = root_of(tensor);
  if (!root->buffer || root->buffer->iface.get_base != buffer_base) return nullptr;
  return &context_of(root->buffer);
}

}  // namespace thimble
