#include "devices.h"

#include <ggml-backend.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "model.h"

namespace thimble {
namespace {

bool are_ours(const std::string& names) {
  return names.starts_with("THIMBLE");
}

ggml_backend_dev_t find(const std::string& name) {
  ggml_backend_dev_t device = ggml_backend_dev_by_name(name.c_str());
  if (!device) {
    throw std::runtime_error("--device " + name +
                             ": there is no such device; llama-server --list-devices, or thimble doctor, names them");
  }
  return device;
}

std::string hardware(ggml_backend_dev_t device) {
  ggml_backend_dev_props props;
  ggml_backend_dev_get_props(device, &props);
  return props.device_id ? props.device_id : "";
}

// The device that one of the plugin's wraps: the one with the same hardware. The CPU has no number.
ggml_backend_dev_t wrapped(ggml_backend_dev_t ours) {
  for (size_t i = 0; !hardware(ours).empty() && i < ggml_backend_dev_count(); i++) {
    ggml_backend_dev_t device = ggml_backend_dev_get(i);
    if (device != ours && hardware(device) == hardware(ours)) return device;
  }
  return find("CPU");
}

void append(std::string& names, const std::string& name) {
  names += (names.empty() ? "" : ",") + name;
}

}  // namespace

MeasuredDevices start_llama_on(const std::string& names) {
  if (!are_ours(names)) {  // before llama.cpp starts, which may load the plugin
    std::string wanted = names;
    std::replace(wanted.begin(), wanted.end(), ',', '+');
    setenv("THIMBLE_KV", ("device=" + wanted).c_str(), 1);
  }
  start_llama();
  if (are_ours(names)) load_plugin();
  MeasuredDevices devices{"", "", {}};
  ggml_backend_dev_t first = nullptr;
  int n = 0;
  for (const std::string& name : device_names(names)) {
    ggml_backend_dev_t device = find(name);
    if (are_ours(names)) device = wrapped(device);
    append(devices.plain, ggml_backend_dev_name(device));
    append(devices.coded, are_ours(names) ? name : "THIMBLE" + std::to_string(n));
    if (n++ == 0) first = device;
  }
  if (!first) throw std::runtime_error("--device names no device");
  // An engine serves the devices of one backend of ggml's, and the CPU, which has no hardware id.
  const bool is_cpu = ggml_backend_dev_type(first) == GGML_BACKEND_DEVICE_TYPE_CPU;
  devices.host = {is_cpu ? "CPU" : ggml_backend_reg_name(ggml_backend_dev_backend_reg(first)), hardware(first)};
  return devices;
}

}  // namespace thimble
