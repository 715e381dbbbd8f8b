// Attention over a caller's blocks: checks the arguments.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "api/args.h"
#include "api/memory.h"
#include "api/sequences.h"

namespace thimble::api {
namespace {

constexpr int kMaxQueryHeads = 1 << 16;

using Args = thimble_attend_args;

std::string at(const char* name, int64_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}

void check_sides(const Args& args) {
  check_codec(args.keys, "keys");
  check_codec(args.values, "values");
  require(args.keys->kind() == Kind::key, "keys is a codec of values");
  require(args.values->kind() == Kind::value, "values is a codec of keys");
  require(args.keys->n_heads() == args.values->n_heads(), "keys and values have different numbers of heads");
  check_blocks(args.key_blocks, *args.keys, "key_blocks");
  check_blocks(args.value_blocks, *args.values, "value_blocks");
  require(args.n_heads > 0 && args.n_heads <= kMaxQueryHeads && args.n_heads % args.keys->n_heads() == 0, [&] {
    return "n_heads is " + std::to_string(args.n_heads) + ": it must be a multiple of the codecs' " +
           std::to_string(args.keys->n_heads()) + " heads";
  });
}

void check_table(const Args& args, int64_t sequence, int64_t n_blocks) {
  const int32_t* row = args.block_table + sequence * args.blocks_per_sequence;
  for (int64_t b = 0; b < blocks_for(args.n_cells[sequence]); b++) {
    require(row[b] >= 0 && row[b] < n_blocks, [&] {
      return "block_table: block " + std::to_string(b) + " of sequence " + std::to_string(sequence) + " is " +
             std::to_string(row[b]) + ", the memory has blocks 0 to " + std::to_string(n_blocks - 1);
    });
  }
}

void check_sequences(const Args& args) {
  require(args.n_sequences >= 0, "n_sequences is negative");
  if (args.n_sequences == 0) return;
  require(args.n_cells != nullptr, "n_cells is null");
  constexpr int kMaxBlocks = std::numeric_limits<int32_t>::max() / kBlockCells;  // cells of a sequence are an int
  require(args.blocks_per_sequence > 0 && args.blocks_per_sequence <= kMaxBlocks,
          [&] { return "blocks_per_sequence must be between 1 and " + std::to_string(kMaxBlocks); });
  const int64_t n_blocks = std::min(args.key_blocks.n_blocks, args.value_blocks.n_blocks);
  require(args.block_table || int64_t{args.n_sequences} * args.blocks_per_sequence <= n_blocks, [&] {
    return "n_sequences * blocks_per_sequence is " +
           std::to_string(int64_t{args.n_sequences} * args.blocks_per_sequence) + ", the memory has " +
           std::to_string(n_blocks) + " blocks";
  });
  require(!args.first_tokens || args.first_tokens[0] >= 0, "first_tokens[0] is negative");
  for (int64_t s = 0; s < args.n_sequences; s++) {
    require(args.n_cells[s] >= 0 && args.n_cells[s] <= int64_t{args.blocks_per_sequence} * kBlockCells, [&] {
      return at("n_cells", s) + " is " + std::to_string(args.n_cells[s]) + ": it must be between 0 and " +
             std::to_string(int64_t{args.blocks_per_sequence} * kBlockCells) + ", the cells of blocks_per_sequence";
    });
    const int64_t n_tokens = first_token(args, s + 1) - first_token(args, s);
    require(n_tokens >= 0 && n_tokens <= std::numeric_limits<int32_t>::max() / args.n_heads,
            [&] { return at("first_tokens", s + 1) + " is less than the one before it, or too far from it"; });
    if (args.block_table) check_table(args, s, n_blocks);
  }
}

void check_queries(const Args& args) {
  const int64_t first = first_token(args, 0), end = first_token(args, args.n_sequences);
  if (end > first) require(args.q && args.out, "q and out must not be null where there are query tokens");
  const size_t dim = args.values->format().head_dim;
  require(apart(end, args.out_token_stride, args.n_heads, args.out_head_stride, dim),
          "out: vectors overlap: set out_token_stride and out_head_stride, in elements");
  require(std::isfinite(args.scale) && std::isfinite(args.softcap) && std::isfinite(args.max_bias) &&
              args.softcap >= 0 && args.max_bias >= 0,
          "scale, softcap and max_bias must be finite, the last two not negative");
  if (!args.mask) return;
  const int64_t most = *std::max_element(args.n_cells, args.n_cells + args.n_sequences);
  require(args.mask_stride >= size_t(most), [&] {
    return "mask_stride is " + std::to_string(args.mask_stride) + ", a sequence has " + std::to_string(most) + " cells";
  });
}

void check_exact(const Args& args) {
  const thimble_exact& exact = args.exact;
  if (!exact.start) return;
  require(exact.start[0] == 0, "exact.start[0] must be 0");
  for (int64_t s = 0; s < args.n_sequences; s++) {
    require(exact.start[s + 1] >= exact.start[s],
            [&] { return at("exact.start", s + 1) + " is less than the one before it"; });
  }
  if (exact.start[args.n_sequences] == 0) return;
  require(exact.cells && exact.rows && exact.keys && exact.values,
          "exact: cells, rows, keys and values must not be null");
  const size_t n_heads = args.keys->n_heads();
  require(exact.n_rows <= 1 || (exact.key_stride >= n_heads * args.keys->format().head_dim &&
                                exact.value_stride >= n_heads * args.values->format().head_dim),
          "exact.key_stride and value_stride must be at least a row's numbers");
  for (int64_t s = 0; s < args.n_sequences; s++) {
    int64_t before = -1;
    for (int64_t i = exact.start[s]; i < exact.start[s + 1]; i++) {
      const int64_t cell = exact.cells[i], row = exact.rows[i];
      require(cell > before && cell < args.n_cells[s], [&] {
        return at("exact.cells", i) + " is " + std::to_string(cell) +
               ": cells of a sequence ascend, and are below its n_cells";
      });
      require(row >= 0 && row < exact.n_rows, [&] {
        return at("exact.rows", i) + " is " + std::to_string(row) + ", there are " + std::to_string(exact.n_rows);
      });
      before = cell;
    }
  }
}

}  // namespace
}  // namespace thimble::api

using namespace thimble::api;

thimble_status thimble_attend(thimble_context* context, const thimble_attend_args* args, void* stream) {
  return guarded([&] {
    const Use use(context, stream);
    const thimble_attend_args a = take_args(args, "thimble_attend_args");
    check_sides(a);
    check_sequences(a);
    if (a.n_sequences == 0) return;
    check_queries(a);
    check_exact(a);
    context->device->attend(a, stream);
  });
}
