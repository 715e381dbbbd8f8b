#include "api/memory.h"

#include <limits>
#include <string>

namespace thimble::api {
namespace {

// Sets `all` to the extent of n rows of `size`, a stride apart. False where they overlap or the extent overflows.
bool extent(int64_t n, size_t stride, size_t size, size_t& all) {
  if (n <= 1) {
    all = size;
    return true;
  }
  size_t before;
  return stride >= size && !__builtin_mul_overflow(size_t(n - 1), stride, &before) &&
         !__builtin_add_overflow(before, size, &all) && all <= size_t(std::numeric_limits<ptrdiff_t>::max());
}

bool nested(int64_t inner_n, size_t inner_stride, int64_t outer_n, size_t outer_stride, size_t size) {
  size_t inner, all;
  return extent(inner_n, inner_stride, size, inner) && extent(outer_n, outer_stride, inner, all);
}

}  // namespace

bool apart(int64_t n, size_t n_stride, int64_t m, size_t m_stride, size_t size) {
  return nested(n, n_stride, m, m_stride, size) || nested(m, m_stride, n, n_stride, size);
}

void check_codec(const thimble_codec* codec, const char* name) {
  require(codec != nullptr, [&] { return std::string(name) + " is null: make one with thimble_codec_create"; });
}

void check_blocks(const thimble_blocks& blocks, const thimble_codec& codec, const char* name) {
  const std::string blocks_name = name;
  require(blocks.data != nullptr, [&] { return blocks_name + ".data is null"; });
  // At most so many that the number of their cells fits an int64_t.
  require(blocks.n_blocks > 0 && blocks.n_blocks <= std::numeric_limits<int64_t>::max() / kBlockCells,
          [&] { return blocks_name + ".n_blocks must be above 0"; });
  require(
      apart(blocks.n_blocks, blocks.block_stride, codec.n_heads(), blocks.head_stride, codec.format().block_bytes()),
      [&] {
        return blocks_name + ": blocks of " + std::to_string(codec.format().block_bytes()) +
               " bytes overlap or reach beyond all memory: set block_stride and head_stride, in bytes";
      });
}

CacheSide side_of(const thimble_blocks& blocks, const thimble_codec& codec, int64_t cells_per_stream, int n_streams,
                  const int32_t* table) {
  return {{codec.n_heads(), cells_per_stream, n_streams},
          codec.heads,
          static_cast<uint8_t*>(blocks.data),
          {blocks.head_stride, blocks.block_stride, table}};
}

}  // namespace thimble::api
