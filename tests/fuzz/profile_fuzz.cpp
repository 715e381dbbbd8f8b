// libFuzzer harness of the profile reader: whatever the bytes, the reader returns a profile or throws
// std::runtime_error.
// Built with -DTHIMBLE_FUZZ=ON and clang; run as `profile_fuzz tests/fuzz/corpus -max_total_time=600`.
#include <stdexcept>

#include "profile/profile.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const thimble::Profile profile = thimble::read_profile(data, size);
    for (size_t i = 0; i < profile.shape.layers.size(); i++) {
      for (thimble::Kind kind : {thimble::Kind::key, thimble::Kind::value}) {
        for (double bits : profile.bits) {
          if (profile.shape.layers[i].n_kv_heads > 0) profile.codec(int(i), 0, kind, bits);
        }
      }
    }
  } catch (const std::runtime_error&) {
  }
  return 0;
}
