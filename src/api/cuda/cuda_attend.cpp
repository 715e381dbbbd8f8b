// Attention on CUDA. A query token is a stream of the kernel, whatever its sequence, so that tokens of sequences of all
// lengths, prompts and single tokens, go through one launch; a block table says where each sequence's blocks lie, also
// in contiguous memory.
#include <algorithm>
#include <cstring>
#include <string>

#include "api/cuda/cuda_device.h"
#include "api/sequences.h"
#include "attention/problem.h"

namespace thimble::api {
namespace {

using Args = thimble_attend_args;

constexpr int64_t kMaxCells = 1 << 28;  // of a sequence
constexpr int kMaxGroup = 64;
constexpr int64_t kCounters = 16384;  // of a launch, which counts for each token, KV head and row group

bool aligned(const void* p, size_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

/// Arrays that go to the device in one copy.
class Arrays {
public:
  /// Returns the array's place.
  template <typename T>
  size_t add(const std::vector<T>& values) {
    const size_t at = (bytes_.size() + 15) / 16 * 16;
    bytes_.resize(at + values.size() * sizeof(T));
    std::memcpy(bytes_.data() + at, values.data(), values.size() * sizeof(T));
    return at;
  }
  void upload(CudaOps& ops) { device_ = static_cast<char*>(ops.upload(bytes_.data(), bytes_.size())); }
  template <typename T>
  const T* at(size_t place) const {
    return reinterpret_cast<const T*>(device_ + place);
  }

private:
  std::vector<char> bytes_;
  char* device_ = nullptr;
};

/// Those sequences that have query tokens, as the kernel wants them.
struct Sequences {
  std::vector<int32_t> of_token;     // [tokens]
  std::vector<int32_t> table;        // [sequences][max_blocks]
  std::vector<int32_t> n_blocks;     // [sequences]
  std::vector<uint32_t> hidden;      // [sequences][2 * max_blocks]: exact cells, and what lies behind the last
  std::vector<int32_t> cells, rows;  // [sequences][max_exact]: exact cells, -1 behind the last, and their rows
  int max_blocks = 0, max_exact = 0;

  explicit Sequences(const Args& args) {
    std::vector<int64_t> active;
    const auto n_exact = [&](int64_t s) {
      return args.exact.start ? args.exact.start[s + 1] - args.exact.start[s] : 0;
    };
    for (int64_t s = 0; s < args.n_sequences; s++) {
      const int64_t n_tokens = first_token(args, s + 1) - first_token(args, s);
      if (n_tokens == 0) continue;
      of_token.insert(of_token.end(), size_t(n_tokens), int32_t(active.size()));
      active.push_back(s);
      n_blocks.push_back(int32_t(blocks_for(args.n_cells[s])));
      max_blocks = std::max(max_blocks, n_blocks.back());
      max_exact = std::max(max_exact, int(n_exact(s)));
    }
    const size_t n = active.size();
    table.resize(n * max_blocks);
    hidden.resize(n * max_blocks * 2, ~0u);
    cells.resize(n * max_exact, -1);
    rows.resize(n * max_exact);
    for (size_t i = 0; i < n; i++) {
      const int64_t s = active[i], first_block = s * args.blocks_per_sequence;
      for (int b = 0; b < n_blocks[i]; b++) {
        table[i * max_blocks + b] = args.block_table ? args.block_table[first_block + b] : int32_t(first_block + b);
      }
      uint32_t* bits = hidden.data() + i * max_blocks * 2;
      std::fill_n(bits, args.n_cells[s] / 32, 0u);
      if (const int64_t rest = args.n_cells[s] % 32; rest > 0) bits[args.n_cells[s] / 32] = ~0u << rest;
      for (int64_t k = 0; k < n_exact(s); k++) {
        const int64_t entry = args.exact.start[s] + k, cell = args.exact.cells[entry];
        bits[cell / 32] |= 1u << cell % 32;
        cells[i * max_exact + k] = int32_t(cell);
        rows[i * max_exact + k] = int32_t(args.exact.rows[entry]);
      }
    }
  }
};

void check_formats(const Args& args, const CudaOps& ops) {
  check_cuda(*args.keys, args.key_blocks, "key_blocks");
  check_cuda(*args.values, args.value_blocks, "value_blocks");
  const Format &k = args.keys->format(), &v = args.values->format();
  require_supported(k.head_dim == v.head_dim && (v.width(0) == k.width(0) || v.width(0) == 2 * k.width(0)),
                    "on CUDA values have the keys' head size, and the keys' rate or half of it: use such codecs, or a "
                    "context on the CPU");
  require_supported(ops.fits(k.head_dim, k.width(0), v.width(0)), [&] {
    return "heads of " + std::to_string(k.head_dim) + " numbers at " + std::to_string(k.bits()) +
           " bits take more shared memory than this GPU has: use fewer bits or a context on the CPU";
  });
  require_supported(args.n_heads / args.keys->n_heads() <= kMaxGroup, "on CUDA at most 64 query heads share a KV head");
}

void check_arrays(const Args& args, int64_t max_cells) {
  require_supported(max_cells <= kMaxCells, "on CUDA a sequence has at most 2^28 cells");
  require_supported(aligned(args.q) && (args.q_token_stride | args.q_head_stride) % 4 == 0,
                    "on CUDA q must be aligned to 16 bytes, and its strides multiples of 4");
  const size_t dim = args.values->format().head_dim;
  require_supported(aligned(args.out) && args.out_head_stride == dim && args.out_token_stride == args.n_heads * dim,
                    "on CUDA out must be aligned to 16 bytes and [token][head][value head size] without gaps");
  const int64_t whole = blocks_for(max_cells) * kBlockCells;
  require_supported(!args.mask || (aligned(args.mask) && args.mask_stride % 8 == 0 &&
                                   args.mask_stride >= size_t(whole) && args.mask_stride < size_t(1) << 31),
                    [&] {
                      return "on CUDA the mask must be aligned to 16 bytes, and mask_stride be a multiple of 8 and at "
                             "least the cells of whole blocks: " +
                             std::to_string(whole);
                    });
  const thimble_exact& exact = args.exact;
  require_supported(!exact.start || exact.start[args.n_sequences] == 0 ||
                        (aligned(exact.keys) && aligned(exact.values) &&
                         (exact.key_stride | exact.value_stride) % 8 == 0 && exact.n_rows <= INT32_MAX),
                    "on CUDA exact.keys and values must be aligned to 16 bytes, their strides multiples of 8, and "
                    "their rows fewer than 2^31");
}

}  // namespace

void CudaDevice::attend(const Args& args, void* stream) {
  check_formats(args, *ops_);
  const int64_t first = first_token(args, 0), n_tokens = first_token(args, args.n_sequences) - first;
  if (n_tokens == 0) return;
  check_arrays(args, *std::max_element(args.n_cells, args.n_cells + args.n_sequences));

  cuda::AttendArgs a;
  a.n_kv_heads = args.keys->n_heads();
  a.group = args.n_heads / a.n_kv_heads;
  a.head_dim = args.keys->format().head_dim;
  a.keys = {static_cast<uint8_t*>(args.key_blocks.data), 0, args.key_blocks.head_stride, args.key_blocks.block_stride};
  a.values = {static_cast<uint8_t*>(args.value_blocks.data), 0, args.value_blocks.head_stride,
              args.value_blocks.block_stride};
  a.key_codec = tables(*args.keys);
  a.value_codec = tables(*args.values);
  a.query_stream_stride = args.q_token_stride;
  a.query_head_stride = args.q_head_stride;
  a.scale = scale_of(args);
  a.softcap = args.softcap;
  a.sinks = args.sinks;
  a.mask_stream_stride = args.mask ? args.mask_stride : 0;

  const Sequences sequences(args);
  a.n_cells = sequences.max_blocks * kBlockCells;
  std::vector<float> slopes;
  for (int h = 0; args.max_bias > 0 && h < args.n_heads; h++) {
    slopes.push_back(alibi_slope(args.max_bias, args.n_heads, h));
  }
  Arrays arrays;
  const size_t of_token = arrays.add(sequences.of_token), table = arrays.add(sequences.table);
  const size_t n_blocks = arrays.add(sequences.n_blocks), hidden = arrays.add(sequences.hidden);
  const size_t cells = arrays.add(sequences.cells), rows = arrays.add(sequences.rows), slope = arrays.add(slopes);

  const CudaCall call(*ops_, stream);
  arrays.upload(*ops_);
  a.pages.table = arrays.at<int32_t>(table);
  a.pages.n_blocks = arrays.at<int32_t>(n_blocks);
  a.pages.table_stride = sequences.max_blocks;
  a.hidden = arrays.at<uint32_t>(hidden);
  a.hidden_stream_stride = size_t(sequences.max_blocks) * 2;
  if (sequences.max_exact > 0) {
    a.exact[0] = {args.exact.keys, args.exact.values, arrays.at<int32_t>(cells), sequences.max_exact, false};
    a.pages.rows = arrays.at<int32_t>(rows);
    a.pages.key_row_stride = args.exact.key_stride;
    a.pages.value_row_stride = args.exact.value_stride;
  }
  if (!slopes.empty()) a.slopes = arrays.at<float>(slope);

  const int64_t pairs = int64_t{a.n_kv_heads} * cuda::row_groups(1, a.group);
  int64_t at_once = std::min<int64_t>(ops_->tokens_at_once(), std::max<int64_t>(1, kCounters / pairs));
  if (a.mask_stream_stride > 0) {  // the kernel counts a mask's elements in 32 bits
    at_once = std::clamp<int64_t>(int64_t{UINT32_MAX} / int64_t(a.mask_stream_stride), 1, at_once);
  }
  for (int64_t done = 0; done < n_tokens; done += a.n_streams) {
    a.n_streams = int(std::min(at_once, n_tokens - done));
    const size_t token = size_t(first + done);
    a.queries = args.q + token * args.q_token_stride;
    a.output = args.out + token * args.out_token_stride;
    if (args.mask) a.mask = args.mask + token * args.mask_stride;
    a.pages.sequences = arrays.at<int32_t>(of_token) + done;
    ops_->attend(a);
  }
}

}  // namespace thimble::api
