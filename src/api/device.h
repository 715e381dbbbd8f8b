// What a context computes on. The calls of thimble.h check their arguments and hand them on to one of these.
#pragma once

#include <memory>

#include "api/status.h"

namespace thimble::api {

class Device {
public:
  virtual ~Device() = default;
  /// thimble_context_instruction_set.
  virtual const char* name() const = 0;
  /// Throws a Failure where the device takes no such stream.
  virtual void check_stream(const void* stream) const = 0;

  // One call at a time. Arguments are checked as far as they must be right on all devices; an attention has at least
  // one sequence. Each throws a Failure where this device cannot do it.
  virtual void encode(const thimble_encode_args& args, void* stream) = 0;
  virtual void decode(const thimble_decode_args& args, void* stream) = 0;
  virtual void attend(const thimble_attend_args& args, void* stream) = 0;
};

/// With `n_threads` threads, the caller's among them.
std::unique_ptr<Device> make_cpu_device(int n_threads);

/// The device that CUDA gives this number. Throws a Failure where there is none or the build has no CUDA.
std::unique_ptr<Device> make_cuda_device(int index);

}  // namespace thimble::api
