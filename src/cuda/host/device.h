// A device's properties, and codec tables in its memory.
#pragma once

#include "cuda/host/status.h"
#include "cuda/host/tables.h"

namespace thimble::cuda {

/// What the launchers need to know of a device. Query it once.
struct DeviceInfo {
  int ordinal = 0;
  int multiprocessors = 0;
  size_t shared_bytes = 0;  // the most that a thread block may have
  int capability = 0;       // 80, 86, 89, 90
};
Status query_device(int ordinal, DeviceInfo* info);

/// Owns a copy of HostTables in the current device's memory.
class DeviceTables {
public:
  DeviceTables() = default;
  DeviceTables(const DeviceTables&) = delete;
  DeviceTables& operator=(const DeviceTables&) = delete;
  ~DeviceTables();

  /// Allocates, copies and waits for the copy. Once only.
  Status upload(const HostTables& tables);
  const CodecTables& view() const { return view_; }

private:
  void* memory_ = nullptr;
  CodecTables view_;
};

}  // namespace thimble::cuda
