#include "cuda/host/device.h"

#include <cstring>
#include <utility>

namespace thimble::cuda {

Status query_device(int ordinal, DeviceInfo* info) {
  int major = 0, minor = 0, multiprocessors = 0, shared = 0;
  const std::pair<int*, cudaDeviceAttr> wanted[] = {{&major, cudaDevAttrComputeCapabilityMajor},
                                                    {&minor, cudaDevAttrComputeCapabilityMinor},
                                                    {&multiprocessors, cudaDevAttrMultiProcessorCount},
                                                    {&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin}};
  for (const auto& [value, attribute] : wanted) {
    if (const cudaError_t e = cudaDeviceGetAttribute(value, attribute, ordinal); e != cudaSuccess) {
      return Status::from(e);
    }
  }
  *info = {ordinal, multiprocessors, size_t(shared), 10 * major + minor};
  return {};
}

DeviceTables::~DeviceTables() {
  if (memory_) (void)cudaFree(memory_);
}

Status DeviceTables::upload(const HostTables& tables) {
  if (memory_) return Status::invalid("tables are there already");
  CodecTables view = tables.view();
  // All arrays have elements of 4 bytes; each starts at a multiple of 256.
  std::vector<char> bytes;
  std::vector<std::pair<const void**, size_t>> places;
  const auto add = [&](const void** pointer, size_t n) {
    if (n == 0) return;
    const size_t at = (bytes.size() + 255) / 256 * 256;
    bytes.resize(at + n * 4);
    std::memcpy(bytes.data() + at, *pointer, n * 4);
    places.emplace_back(pointer, at);
  };
  const auto field = [](auto& pointer) { return reinterpret_cast<const void**>(&pointer); };
  add(field(view.packed), tables.packed.size());
  add(field(view.scale), tables.scale.size());
  add(field(view.words), tables.words.size());
  add(field(view.half_norms), tables.half_norms.size());
  add(field(view.mean), tables.mean.size());
  add(field(view.forward), tables.forward.size());
  add(field(view.undo), tables.undo.size());
  if (view.error) {
    add(field(view.error), tables.error.size());
    add(field(view.carriers), tables.carriers.size());
  }
  if (bytes.empty()) {  // of f16 rows
    view_ = view;
    return {};
  }
  if (const cudaError_t e = cudaMalloc(&memory_, bytes.size()); e != cudaSuccess) {
    memory_ = nullptr;
    return Status::from(e);
  }
  if (const cudaError_t e = cudaMemcpy(memory_, bytes.data(), bytes.size(), cudaMemcpyHostToDevice); e != cudaSuccess) {
    return Status::from(e);
  }
  for (const auto& [pointer, at] : places) *pointer = static_cast<const char*>(memory_) + at;
  view_ = view;
  return {};
}

}  // namespace thimble::cuda
