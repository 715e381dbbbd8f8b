// The opaque types of the C API.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "api/status.h"
#include "api/team.h"
#include "attention/attention.h"
#include "codec/head_codec.h"
#include "kernels/kernels.h"
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
  explicit thimble_context(int n_threads) : kernels(thimble::kernels()), team(n_threads) {}

  const thimble::Kernels& kernels;
  thimble::api::Team team;
  std::vector<thimble::Attention> attention;           // one a sequence, kept so that calls reuse their memory
  std::vector<std::vector<thimble::ExactCell>> exact;  // by sequence
  std::atomic<bool> busy{false};
};

namespace thimble::api {

/// Holds a context for the length of a call. Throws a Failure where it is null or at work for another call, or where
/// `stream` is not null.
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
