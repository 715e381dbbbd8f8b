#include <algorithm>

#include "cuda/attend/attend.h"
#include "cuda/attend/deal.h"
#include "cuda/attend/formats.h"
#include "cuda/attend/launch.h"
#include "cuda/attend/shape.h"
#include "cuda/attend/tile_shape.h"
#include "cuda/formats.h"
#include "cuda/layout.h"

namespace thimble::cuda {
namespace {

int blocks_per_pair(const DeviceInfo& device, int pairs) {
  return std::max(1, device.multiprocessors / pairs);
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

Status check_queries(const AttendArgs& args) {
  if (!args.queries || !aligned(args.queries, 16) ||
      (args.query_stream_stride | args.query_token_stride | args.query_head_stride) % 4 != 0) {
    return Status::invalid("queries are missing or not aligned to 16 bytes");
  }
  return {};
}

/// Whether the codes are in the order for tiles.
bool by_tiles(const AttendArgs& args) {
  return args.key_codec.width == 0;
}

Status check(const AttendArgs& args) {
  if (args.n_streams < 1 || args.n_kv_heads < 1) return Status::invalid("no streams or heads");
  if (args.n_tokens < 1 || args.n_tokens > kMaxTokens) return Status::invalid("1 to 8 query tokens a stream");
  if (args.group < 1 || args.group > kMaxGroup) return Status::invalid("group must be 1 to 64");
  if (args.n_cells < 0 || args.n_cells % kBlockCells != 0 || args.n_cells > (1 << 28))
    return Status::invalid("cells must be a multiple of 64, at most 2^28");
  if (!args.output) return Status::invalid("output is missing");
  if (Status s = check_queries(args); !s.ok()) return s;
  if (args.softcap < 0) return Status::invalid("softcap must not be negative");
  if (args.mask && (!aligned(args.mask, 16) || (args.mask_token_stride | args.mask_stream_stride) % 8 != 0)) {
    return Status::invalid("mask is not aligned to 16 bytes");
  }
  if (args.mask && (size_t(args.n_streams) * args.mask_stream_stride + kMaxTokens * args.mask_token_stride) >> 32) {
    return Status::unsupported("mask of 2^32 elements or more");
  }
  for (const ExactRows& rows : args.exact) {
    if (rows.capacity < 0) return Status::invalid("negative number of exact rows");
    if (rows.capacity > 0 && (!rows.keys || !rows.values || !rows.cells)) {
      return Status::invalid("exact rows are missing");
    }
    if (rows.capacity > 0 && (!aligned(rows.keys, 16) || !aligned(rows.values, 16))) {
      return Status::invalid("exact rows are not aligned to 16 bytes");
    }
  }
  const Pages& pages = args.pages;
  if (pages.sequences) {
    if (args.n_tokens != 1) return Status::invalid("with a block table, each query token is a stream");
    if (!pages.table || !pages.n_blocks || (args.exact[0].capacity > 0 && !pages.rows)) {
      return Status::invalid("the block table is incomplete");
    }
    if (args.fresh.keys || args.exact[1].capacity > 0 || args.n_judges > 0 || args.hidden_head_stride != 0) {
      return Status::unsupported("with a block table there is no window and no retrieval");
    }
    if ((pages.key_row_stride | pages.value_row_stride) % 8 != 0) {
      return Status::invalid("exact rows are not aligned to 16 bytes");
    }
  }
  if (args.fresh.keys && (!args.fresh.values || !args.fresh.tokens || !args.fresh.window_keys ||
                          !args.fresh.window_values || args.exact[0].capacity == 0)) {
    return Status::invalid("new rows have no place in the window");
  }
  if (by_tiles(args)) {
    if (args.value_codec.width != 0) return Status::invalid("keys and values are not in the same order of codes");
    if (pages.sequences) return Status::unsupported("no kernel for this format with a block table");
  }
  if (Status s = check_cache(args.keys, args.key_codec, args); !s.ok()) return s;
  return check_cache(args.values, args.value_codec, args);
}

// `batches`: whether the kernel can take several streams at once.
void plan(const DeviceInfo& device, AttendArgs& args, bool batches) {
  if (args.pages.sequences) batches = false;
  constexpr int kRowsOfASequence = 208;  // others' are not there, or hidden
  const int n_blocks = args.n_cells / kBlockCells;
  const int n_exact = std::min(args.exact[0].capacity, kRowsOfASequence) + args.exact[1].capacity;
  const int lanes = blocks_per_pair(device, args.n_kv_heads * row_groups(args.n_tokens, args.group));
  const DealOptions options = by_tiles(args) ? DealOptions{lanes, tile_warps(args.head_dim), false, false}
                                             : deal_options(args.head_dim, args.key_codec.width, args.value_codec.width,
                                                            lanes, batches && has_large_tables(device));
  const Deal deal = choose_deal(args.n_streams, n_blocks, n_exact, options);
  deal_out(args, deal.n_splits, exact_blocks(n_blocks, n_exact, deal.n_splits), deal.batch_shift);
}

const Status kNoHeadSize = Status::unsupported("head size must be 64, 128 or 256");

constexpr size_t kCounterBytes = kAttendCounterBytes;

}  // namespace

size_t attend_workspace_bytes(const DeviceInfo& device, const AttendArgs& args) {
  AttendArgs planned = args;
  plan(device, planned, true);
  const size_t parts = size_t(planned.n_streams) * (planned.n_splits + 1) * planned.n_kv_heads * planned.row_groups;
  return kCounterBytes + parts * (kRowGroup * size_t(args.head_dim) + 2 * kRowGroup) * sizeof(float);
}

bool attend_fits(const DeviceInfo& device, int head_dim, int key_width, int value_width, bool scores) {
  return tables_fit(card_of(device), head_dim, key_width, value_width, scores);
}

AttendBy attend_by(const DeviceInfo& device, const Format& keys, const Format& values, bool scores) {
  return attend_by(card_of(device), keys, values, scores);
}

int attend_batch(const DeviceInfo& device, const AttendArgs& args) {
  AttendArgs planned = args;
  plan(device, planned, true);
  return 1 << planned.batch_shift;
}

bool runs_at_once(const DeviceInfo& device, const AttendArgs& args) {
  AttendArgs planned = args;
  plan(device, planned, true);
  const int pairs = planned.n_kv_heads * planned.row_groups;
  return n_batches(planned) <= blocks_per_pair(device, pairs) && pairs <= device.multiprocessors;
}

Status attend(const DeviceInfo& device, AttendArgs args, void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  if (Status s = check(args); !s.ok()) return s;
  if (!workspace || !aligned(workspace, 256) || workspace_bytes < attend_workspace_bytes(device, args)) {
    return Status::invalid("workspace is missing, too small or not aligned to 256 bytes");
  }
  plan(device, args, true);
  const int pairs = args.n_kv_heads * args.row_groups;
  if (size_t(args.n_streams) * pairs * sizeof(int) > kCounterBytes) return Status::unsupported("too many streams");
  args.arrived = static_cast<int*>(workspace);
  args.partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + kCounterBytes);
  const dim3 grid(std::min(blocks_per_pair(device, pairs), n_batches(args)), args.n_kv_heads, args.row_groups);
  if (by_tiles(args)) return launch_attend_tiles(device, args, grid, stream);
  return for_head_dim(
      args.head_dim, [&]<int HeadDim>() { return launch_attend<HeadDim>(device, args, grid, stream); }, kNoHeadSize);
}

Status score_cells(const DeviceInfo& device, ScoreArgs score, cudaStream_t stream) {
  AttendArgs& args = score.attend;
  if (args.n_cells < 64) return Status::invalid("cells must be a multiple of 64");
  args.value_codec = args.key_codec;  // kernels come in pairs of widths; this one's values are not looked at
  args.values = args.keys;
  args.output = score.scores;
  args.exact[0] = args.exact[1] = {};
  args.fresh = {};
  args.pages = {};
  if (Status s = check(args); !s.ok()) return s;
  if (!score.scores || !score.block_maxima || !score.all_hidden) return Status::invalid("place for scores is missing");
  plan(device, args, false);
  const int pairs = args.n_kv_heads * args.row_groups;
  const dim3 grid(std::min(blocks_per_pair(device, pairs), args.n_streams * args.n_splits), args.n_kv_heads,
                  args.row_groups);
  if (by_tiles(args)) return launch_score_tiles(device, score, grid, stream);
  return for_head_dim(
      args.head_dim, [&]<int HeadDim>() { return launch_score<HeadDim>(device, score, grid, stream); }, kNoHeadSize);
}

}  // namespace thimble::cuda
