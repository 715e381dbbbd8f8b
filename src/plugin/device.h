// THIMBLE0: a ggml device of type GPU that wraps an inner device and codes the KV cache. Being a "GPU", it gets the
// layers and their caches by llama.cpp's own defaults.
#pragma once

#include "ggml-backend-impl.h"

namespace thimble {

/// The devices of the plugin, made once: around the device that THIMBLE_KV's `device` names, or the CPU. Throws
/// std::runtime_error where there is no such device.
void make_devices(ggml_backend_reg_t registry);
size_t device_count();
ggml_backend_dev_t device_at(size_t index);

/// The inner device of one of ours.
ggml_backend_dev_t inner_device(ggml_backend_dev_t device);
/// The inner backend of one of ours.
ggml_backend_t inner_backend(ggml_backend_t backend);

}  // namespace thimble
