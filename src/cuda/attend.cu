#include <algorithm>

#include "cuda/attend.h"
#include "cuda/attend_launch.h"
#include "cuda/attend_shape.h"
#include "cuda/layout.h"
#include "cuda/prepare.h"

namespace thimble::cuda {
namespace {

int blocks_per_pair(const DeviceInfo& device, int pairs) {
  return std::max(1, device.multiprocessors / pairs);
}

// Splits of a stream's cells: the number that makes the busiest thread block end first. Each warp of a block takes
// blocks of 64 cells in turns, and exact rows, which take about half as long, one waiting for the other; an item costs
// about three turns for its score table and for combining.
int choose_splits(int n_streams, int n_blocks, int n_exact, int lanes, int warps) {
  constexpr int kItemCost = 3;
  const auto turns = [&](int n, int splits) { return ((n + splits - 1) / splits + warps - 1) / warps; };
  int best = 1, best_cost = 0;
  const int most = std::max(n_blocks, (n_exact + warps - 1) / warps);
  for (int splits = 1; splits <= std::max(1, std::min(lanes, most)); splits++) {
    const int items = (n_streams * splits + lanes - 1) / lanes;
    const int cost = items * (2 * turns(n_blocks, splits) + turns(n_exact, splits) + 2 * kItemCost);
    if (splits == 1 || cost < best_cost) {
      best = splits;
      best_cost = cost;
    }
  }
  return best;
}

bool aligned(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

Status check_cache(const CacheView& cache, const CodecTables& codec, const AttendArgs& args) {
  if (codec.head_dim != args.head_dim || codec.n_kv_heads != args.n_kv_heads) {
    return Status::invalid("codec tables are of another shape");
  }
  if (!codec.packed || !codec.scale) return Status::invalid("codec tables are missing");
  if (args.n_cells == 0) return {};
  if (!cache.data || !aligned(cache.data, 16) ||
      (cache.stream_stride | cache.head_stride | cache.block_stride) % 16 != 0) {
    return Status::invalid("cache is missing or not aligned to 16 bytes");
  }
  return {};
}

Status check(const AttendArgs& args) {
  if (args.n_streams < 1 || args.n_kv_heads < 1) return Status::invalid("no streams or heads");
  if (args.n_tokens < 1 || args.n_tokens > kMaxTokens) return Status::invalid("1 to 8 query tokens a stream");
  if (args.group < 1 || args.group > 64) return Status::invalid("group must be 1 to 64");
  if (args.n_cells < 0 || args.n_cells % kBlockCells != 0 || args.n_cells > (1 << 28))
    return Status::invalid("cells must be a multiple of 64, at most 2^28");
  if (!args.output) return Status::invalid("output is missing");
  if (!args.queries || !args.query_factors || !aligned(args.queries, 16) || !aligned(args.query_factors, 16)) {
    return Status::invalid("queries are missing or not aligned to 16 bytes");
  }
  if (args.softcap < 0) return Status::invalid("softcap must not be negative");
  if (args.mask && (!aligned(args.mask, 16) || (args.mask_token_stride | args.mask_stream_stride) % 8 != 0)) {
    return Status::invalid("mask is not aligned to 16 bytes");
  }
  if (args.mask && size_t(args.n_streams) * args.mask_stream_stride + kMaxTokens * args.mask_token_stride >> 32) {
    return Status::unsupported("mask of 2^32 elements or more");
  }
  for (const ExactRows& rows : args.exact) {
    if (rows.capacity < 0) return Status::invalid("negative number of exact rows");
    if (rows.capacity > 0 && (!rows.keys || !rows.values || !rows.cells)) {
      return Status::invalid("exact rows are missing");
    }
  }
  if (Status s = check_cache(args.keys, args.key_codec, args); !s.ok()) return s;
  return check_cache(args.values, args.value_codec, args);
}

void plan(const DeviceInfo& device, AttendArgs& args) {
  args.row_groups = row_groups(args.n_tokens, args.group);
  const int lanes = blocks_per_pair(device, args.n_kv_heads * args.row_groups);
  args.n_splits =
      choose_splits(args.n_streams, args.n_cells / kBlockCells, args.exact[0].capacity + args.exact[1].capacity, lanes,
                    attend_warps(args.head_dim, args.key_codec.width, args.value_codec.width));
}

// Counters come first in a workspace, in a part of constant size: calls of other shapes must find them zero.
constexpr size_t kCounterBytes = 64 << 10;

}  // namespace

size_t attend_workspace_bytes(const DeviceInfo& device, const AttendArgs& args) {
  AttendArgs planned = args;
  plan(device, planned);
  const size_t items = size_t(planned.n_streams) * planned.n_splits * planned.n_kv_heads * planned.row_groups;
  return kCounterBytes + items * (kRowGroup * size_t(args.head_dim) + 2 * kRowGroup) * sizeof(float);
}

Status attend(const DeviceInfo& device, AttendArgs args, void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  if (Status s = check(args); !s.ok()) return s;
  if (!workspace || !aligned(workspace, 256) || workspace_bytes < attend_workspace_bytes(device, args)) {
    return Status::invalid("workspace is missing, too small or not aligned to 256 bytes");
  }
  plan(device, args);
  const int pairs = args.n_kv_heads * args.row_groups;
  if (size_t(args.n_streams) * pairs * sizeof(int) > kCounterBytes) return Status::unsupported("too many streams");
  args.arrived = static_cast<int*>(workspace);
  args.partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + kCounterBytes);
  const dim3 grid(std::min(blocks_per_pair(device, pairs), args.n_streams * args.n_splits), pairs);
  switch (args.head_dim) {
    case 64:
      return launch_attend_64(device, args, grid, stream);
    case 128:
      return launch_attend_128(device, args, grid, stream);
    case 256:
      return launch_attend_256(device, args, grid, stream);
    default:
      return Status::unsupported("head size must be 64, 128 or 256");
  }
}

Status score_cells(const DeviceInfo& device, ScoreArgs score, cudaStream_t stream) {
  AttendArgs& args = score.attend;
  if (args.n_cells < 64) return Status::invalid("cells must be a multiple of 64");
  args.value_codec = args.key_codec;  // kernels come in pairs of widths; this one's values are not looked at
  args.values = args.keys;
  args.output = score.scores;
  args.exact[0] = args.exact[1] = {};
  if (Status s = check(args); !s.ok()) return s;
  if (!score.scores || !score.tops || !score.all_hidden) return Status::invalid("place for scores is missing");
  plan(device, args);
  const int pairs = args.n_kv_heads * args.row_groups;
  const dim3 grid(std::min(blocks_per_pair(device, pairs), args.n_streams * args.n_splits), pairs);
  switch (args.head_dim) {
    case 64:
      return launch_score_64(device, score, grid, stream);
    case 128:
      return launch_score_128(device, score, grid, stream);
    case 256:
      return launch_score_256(device, score, grid, stream);
    default:
      return Status::unsupported("head size must be 64, 128 or 256");
  }
}

Status step(const DeviceInfo& device, const PrepareArgs& prepare_args, const AttendArgs& attend_args, void* workspace,
            size_t workspace_bytes, cudaStream_t stream) {
  if (prepare_args.queries != attend_args.queries || prepare_args.query_factors != attend_args.query_factors ||
      prepare_args.n_query_tokens != attend_args.n_tokens || prepare_args.n_streams != attend_args.n_streams) {
    return Status::invalid("the queries that are prepared are not those that are attended with");
  }
  if (Status s = prepare(device, prepare_args, stream); !s.ok()) return s;
  return attend(device, attend_args, workspace, workspace_bytes, stream);
}

}  // namespace thimble::cuda
