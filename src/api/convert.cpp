// Blocks between the orders that devices keep them in.
#include <cstring>
#include <string>

#include "api/memory.h"
#include "cuda/layout.h"

using namespace thimble::api;

namespace {

bool is_device(int32_t device) {
  return device == THIMBLE_DEVICE_CPU || device == THIMBLE_DEVICE_CUDA;
}

}  // namespace

thimble_status thimble_convert_blocks(const thimble_codec* codec, int32_t from_device, const void* from,
                                      int32_t to_device, void* to, int64_t n_blocks) {
  return guarded([&] {
    check_codec(codec, "the codec");
    require(is_device(from_device) && is_device(to_device), "from_device or to_device is no thimble_device");
    require(n_blocks >= 0, "n_blocks is negative");
    require(n_blocks == 0 || (from && to), "from and to must not be null where there are blocks");
    const thimble::Format& format = codec->format();
    if (!thimble::cuda::cuda_supports(format)) {
      throw Failure(THIMBLE_UNSUPPORTED, "blocks of this codec are never on CUDA, which takes heads of 64, 128 or 256 "
                                         "numbers at 4, 2 or 1 bits: copy them as they are");
    }
    const size_t bytes = format.block_bytes();
    for (int64_t i = 0; i < n_blocks; i++) {
      const uint8_t* block = static_cast<const uint8_t*>(from) + i * bytes;
      uint8_t* place = static_cast<uint8_t*>(to) + i * bytes;
      if (from_device == to_device) {
        std::memcpy(place, block, bytes);
      } else if (to_device == THIMBLE_DEVICE_CUDA) {
        thimble::cuda::block_to_cuda(format, codec->kind(), block, place);
      } else {
        thimble::cuda::block_from_cuda(format, codec->kind(), block, place);
      }
    }
  });
}
