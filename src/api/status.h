// How a call of the C API fails: the code inside it throws, the caller gets a status and a sentence.
#pragma once

#include <concepts>
#include <stdexcept>
#include <string>

#include "thimble/thimble.h"

namespace thimble::api {

/// The error of a call that is wrong or asks for what the library does not have.
class Failure : public std::runtime_error {
public:
  Failure(thimble_status status, const std::string& what) : std::runtime_error(what), status_(status) {}
  thimble_status status() const { return status_; }

private:
  thimble_status status_;
};

/// Throws a Failure of THIMBLE_INVALID_ARGUMENT. `what` is a callable where the sentence must be put together.
inline void require(bool holds, const char* what) {
  if (!holds) throw Failure(THIMBLE_INVALID_ARGUMENT, what);
}
template <std::invocable What>
void require(bool holds, What what) {
  if (!holds) throw Failure(THIMBLE_INVALID_ARGUMENT, what());
}

/// Returns the status of the exception that is being handled; its sentence becomes this thread's thimble_last_error().
thimble_status keep_error() noexcept;

/// Runs a call's body.
template <typename F>
thimble_status guarded(F body) noexcept {
  try {
    body();
    return THIMBLE_OK;
  } catch (...) {
    return keep_error();
  }
}

}  // namespace thimble::api
