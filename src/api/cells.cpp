// Encoding and decoding of rows.
#include <algorithm>
#include <functional>
#include <string>

#include "api/args.h"
#include "api/memory.h"

namespace thimble::api {
namespace {

std::string row_name(int64_t row) {
  return "cells[" + std::to_string(row) + "]";
}

// Checks the arguments that encoding and decoding share.
template <typename Args>
void check(const Args& args) {
  check_codec(args.codec, "the codec");
  check_blocks(args.blocks, *args.codec, "blocks");
  require(args.n_rows >= 0, "n_rows is negative");
  require(args.n_rows == 0 || (args.cells && args.rows), "cells and rows must not be null where there are rows");
  require(args.type == THIMBLE_F32 || args.type == THIMBLE_F16, "type must be THIMBLE_F32 or THIMBLE_F16");
  const size_t row_size = size_t(args.codec->n_heads()) * args.codec->format().head_dim;
  require(args.n_rows <= 1 || args.row_stride >= row_size, [&] {
    return "row_stride is " + std::to_string(args.row_stride) + ", a row has " + std::to_string(row_size) + " numbers";
  });
  const int64_t n_cells = args.blocks.n_blocks * kBlockCells;
  for (int64_t row = 0; row < args.n_rows; row++) {
    require(args.cells[row] < n_cells, [&] {
      return row_name(row) + " is " + std::to_string(args.cells[row]) + ", the memory has cells 0 to " +
             std::to_string(n_cells - 1);
    });
  }
}

// Two threads must not write one cell.
void check_cells_differ(const int64_t* cells, int64_t n) {
  if (std::adjacent_find(cells, cells + n, std::greater_equal<>()) == cells + n) return;  // they ascend
  std::vector<int64_t> sorted(cells, cells + n);
  std::sort(sorted.begin(), sorted.end());
  const auto first = std::lower_bound(sorted.begin(), sorted.end(), 0);
  const auto twice = std::adjacent_find(first, sorted.end());
  require(twice == sorted.end(), [&] { return "cell " + std::to_string(*twice) + " is there twice"; });
}

}  // namespace
}  // namespace thimble::api

using namespace thimble::api;

thimble_status thimble_encode(thimble_context* context, const thimble_encode_args* args, void* stream) {
  return guarded([&] {
    const Use use(context, stream);
    const thimble_encode_args a = take_args(args, "thimble_encode_args");
    check(a);
    check_cells_differ(a.cells, a.n_rows);
    context->device->encode(a, stream);
  });
}

thimble_status thimble_decode(thimble_context* context, const thimble_decode_args* args, void* stream) {
  return guarded([&] {
    const Use use(context, stream);
    const thimble_decode_args a = take_args(args, "thimble_decode_args");
    check(a);
    context->device->decode(a, stream);
  });
}
