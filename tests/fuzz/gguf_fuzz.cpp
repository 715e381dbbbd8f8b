// libFuzzer harness of the GGUF reader alone: whatever the bytes and whatever value is asked for, the reader returns it
// or throws std::runtime_error. Built with -DTHIMBLE_FUZZ=ON and clang; run as
// `gguf_fuzz tests/fuzz/corpus -max_total_time=600`.
#include <stdexcept>

#include "profile/gguf.h"

namespace {

void refused_or(const auto& ask) {
  try {
    ask();
  } catch (const std::runtime_error&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  refused_or([&] {
    const thimble::gguf::Reader file(data, size);
    for (const char* key : {"general.architecture", "general.alignment", "thimble.version", "thimble.heads",
                            "thimble.bits", "thimble.source", "l0.k.mean", "l0.k.words.2", "l0.k.order.2", "a", ""}) {
      refused_or([&] { file.text(key); });
      refused_or([&] { file.value<uint32_t>(key); });
      refused_or([&] { file.value<float>(key); });
      refused_or([&] { file.array<int32_t>(key, 1 << 20); });
      refused_or([&] { file.array<float>(key, 1 << 20); });
      for (size_t count : {0, 1, 16, 4096}) {
        refused_or([&] { file.tensor<float>(key, count); });
        refused_or([&] { file.tensor<int8_t>(key, count); });
        refused_or([&] { file.tensor<int16_t>(key, count); });
      }
    }
  });
  return 0;
}
