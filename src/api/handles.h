// The opaque types of the C API.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "api/device.h"
#include "api/status.h"
#include "codec/head_codec.h"
#include "profile/profile.h"

struct thimble_profile {
  thimble::Profile profile;
};

struct thimble_codec {
  std::shared_ptr<const std::vector<thimble::HeadCodec>> heads;  // of one kind and format, at least one

  thimble::Kind kind() const { return heads->front().kind; }
  const thimble::Format& format() const { return heads->front().format; }
  int n_heads() const { return int(heads->size()); }
};

struct thimble_context {
  std::unique_ptr<thimble::api::Device> device;
  std::atomic<bool> busy{false};
};

namespace thimble::api {

/// Holds a context for the length of a call. Throws a Failure where it is null or at work for another call, or where
/// its device does not take `stream`.
class Use {
public:
  Use(thimble_context* context, const void* stream);
  ~Use() { context_.busy.store(false, std::memory_order_release); }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;

private:
  thimble_context& context_;
};

}  // namespace thimble::api
