// Encoding and decoding of rows.
#include <algorithm>
#include <functional>
#include <string>

#include "api/args.h"
#include "api/memory.h"
#include "codec/half.h"

namespace thimble::api {
namespace {

// Fewer vectors than this take less time to code than another thread takes to wake.
constexpr int64_t kVectorsAThread = 32;

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

CacheSide side_of_all(const thimble_blocks& blocks, const thimble_codec& codec) {
  return side_of(blocks, codec, blocks.n_blocks * kBlockCells, 1, nullptr);
}

/// Calls f(row, head), on all threads, for every head of each row that has a cell.
template <typename Args, typename F>
void for_vectors(thimble_context& context, const Args& args, F f) {
  const int n_heads = args.codec->n_heads();
  const int64_t n = args.n_rows * n_heads;
  const int64_t n_threads = std::clamp<int64_t>(n / kVectorsAThread, 1, context.team.size());
  const auto work = [&](int thread) {
    if (thread >= n_threads) return;
    for (int64_t i = n * thread / n_threads; i < n * (thread + 1) / n_threads; i++) {
      if (args.cells[i / n_heads] >= 0) f(i / n_heads, int(i % n_heads));
    }
  };
  if (n_threads == 1) {
    work(0);
  } else {
    context.team.run(work);
  }
}

void encode(thimble_context& context, const thimble_encode_args& args) {
  const CacheSide side = side_of_all(args.blocks, *args.codec);
  const size_t dim = side.format().head_dim;
  for_vectors(context, args, [&](int64_t row, int head) {
    const size_t first = size_t(row) * args.row_stride;
    if (args.type == THIMBLE_F16) {
      side.encode_head(head, static_cast<const uint16_t*>(args.rows) + first, args.cells[row]);
    } else {
      side.encode_head(head, static_cast<const float*>(args.rows) + first + head * dim, args.cells[row]);
    }
  });
}

void decode(thimble_context& context, const thimble_decode_args& args) {
  const CacheSide side = side_of_all(args.blocks, *args.codec);
  const size_t dim = side.format().head_dim;
  for_vectors(context, args, [&](int64_t row, int head) {
    const size_t first = size_t(row) * args.row_stride + head * dim;
    if (args.type == THIMBLE_F32) {
      side.decode_head(head, args.cells[row], static_cast<float*>(args.rows) + first);
      return;
    }
    float x[kMaxHeadDim];
    side.decode_head(head, args.cells[row], x);
    std::transform(x, x + dim, static_cast<uint16_t*>(args.rows) + first, float_to_half);
  });
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
    encode(*context, a);
  });
}

thimble_status thimble_decode(thimble_context* context, const thimble_decode_args* args, void* stream) {
  return guarded([&] {
    const Use use(context, stream);
    const thimble_decode_args a = take_args(args, "thimble_decode_args");
    check(a);
    decode(*context, a);
  });
}
