#include "engine/lane.h"

namespace thimble {

void Failure::set(const std::string& why) {
  const std::lock_guard lock(mutex_);
  if (failed_) return;
  why_ = why;
  failed_.store(true, std::memory_order_release);
}

void Failure::clear() {
  failed_ = false;
  why_.clear();
}

}  // namespace thimble
