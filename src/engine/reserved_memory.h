// Addresses of a device, of which those in use have memory.
#pragma once

#include <cstddef>
#include <vector>

namespace thimble {

class ReservedMemory {
public:
  struct Range {
    char* data;
    size_t size;
  };

  virtual ~ReservedMemory() = default;

  virtual char* base() const = 0;
  /// Gives memory to what of [data, data + size) has none, in whole pieces. Returns the ranges that are new; they hold
  /// anything. Throws std::runtime_error with a sentence where the device has no memory left.
  virtual std::vector<Range> back(const void* data, size_t size) = 0;
  /// All that has memory.
  virtual std::vector<Range> backed() const = 0;
};

}  // namespace thimble
