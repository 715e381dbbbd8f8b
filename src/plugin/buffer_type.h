// The buffer type of our devices (buffer.cpp).
#pragma once

#include "ggml-backend-impl.h"

namespace thimble {

class Device;

/// The buffer type of a device; `device` must outlive it.
ggml_backend_buffer_type make_buffer_type(Device& device);
bool is_kv_buffer_type(ggml_backend_buffer_type_t type);

}  // namespace thimble
