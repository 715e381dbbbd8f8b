// ggml's table of functions for our devices (device.cpp).
#pragma once

#include "ggml-backend-impl.h"

namespace thimble {

extern const ggml_backend_device_i kDeviceInterface;

}  // namespace thimble
