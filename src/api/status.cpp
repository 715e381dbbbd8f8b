#include "api/status.h"

#include <new>

namespace thimble::api {
namespace {

std::string& last_error() {
  thread_local std::string sentence;
  return sentence;
}

thimble_status keep(thimble_status status, const char* sentence) noexcept {
  try {
    last_error() = sentence;
  } catch (...) {
    last_error().clear();  // there is no memory for the sentence either
    return THIMBLE_OUT_OF_MEMORY;
  }
  return status;
}

}  // namespace

thimble_status keep_error() noexcept {
  try {
    throw;
  } catch (const Failure& e) {
    return keep(e.status(), e.what());
  } catch (const std::invalid_argument& e) {  // from the core: no format has this rate or head size
    return keep(THIMBLE_INVALID_ARGUMENT, e.what());
  } catch (const std::bad_alloc&) {
    return keep(THIMBLE_OUT_OF_MEMORY, "there is not enough memory: make the batch smaller or free some");
  } catch (const std::exception& e) {
    return keep(THIMBLE_INTERNAL, e.what());
  } catch (...) {
    return keep(THIMBLE_INTERNAL, "something unknown went wrong");
  }
}

}  // namespace thimble::api

const char* thimble_last_error() {
  return thimble::api::last_error().c_str();
}

const char* thimble_status_name(thimble_status status) {
  switch (status) {
    case THIMBLE_OK:
      return "ok";
    case THIMBLE_INVALID_ARGUMENT:
      return "invalid argument";
    case THIMBLE_UNSUPPORTED:
      return "unsupported";
    case THIMBLE_BAD_PROFILE:
      return "bad profile";
    case THIMBLE_OUT_OF_MEMORY:
      return "out of memory";
    case THIMBLE_INTERNAL:
      return "internal error";
  }
  return "unknown status";
}

const char* thimble_version() {
  return THIMBLE_VERSION;
}
