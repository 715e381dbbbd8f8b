// The calls on the CPU, on a team of threads.
#include <algorithm>
#include <vector>

#include "api/device.h"
#include "api/memory.h"
#include "api/sequences.h"
#include "api/team.h"
#include "attention/attention.h"
#include "codec/half.h"
#include "kernels/kernels.h"

namespace thimble::api {
namespace {

class CpuDevice : public Device {
public:
  explicit CpuDevice(int n_threads) : kernels_(kernels()), team_(n_threads) {}

  const char* name() const override { return kernels_.name; }
  void check_stream(const void* stream) const override {
    if (stream) throw Failure(THIMBLE_UNSUPPORTED, "a context on the CPU takes no stream: pass null");
  }
  void encode(const thimble_encode_args& args, void* stream) override;
  void decode(const thimble_decode_args& args, void* stream) override;
  void attend(const thimble_attend_args& args, void* stream) override;

private:
  void take_exact(const thimble_attend_args& args);

  const Kernels& kernels_;
  Team team_;
  std::vector<Attention> attention_;           // one a sequence, kept so that calls reuse their memory
  std::vector<std::vector<ExactCell>> exact_;  // by sequence
};

// Fewer vectors than this take less time to code than another thread takes to wake.
constexpr int64_t kVectorsAThread = 32;

CacheSide side_of_all(const thimble_blocks& blocks, const thimble_codec& codec) {
  return side_of(blocks, codec, blocks.n_blocks * kBlockCells, 1, nullptr);
}

/// Calls f(row, head), on all threads, for every head of each row that has a cell.
template <typename Args, typename F>
void for_vectors(Team& team, const Args& args, F f) {
  const int n_heads = args.codec->n_heads();
  const int64_t n = args.n_rows * n_heads;
  const int64_t n_threads = std::clamp<int64_t>(n / kVectorsAThread, 1, team.size());
  const auto work = [&](int thread) {
    if (thread >= n_threads) return;
    for (int64_t i = n * thread / n_threads; i < n * (thread + 1) / n_threads; i++) {
      if (args.cells[i / n_heads] >= 0) f(i / n_heads, int(i % n_heads));
    }
  };
  if (n_threads == 1) {
    work(0);
  } else {
    team.run(work);
  }
}

void CpuDevice::encode(const thimble_encode_args& args, void*) {
  const CacheSide side = side_of_all(args.blocks, *args.codec);
  const size_t dim = side.format().head_dim;
  for_vectors(team_, args, [&](int64_t row, int head) {
    const size_t first = size_t(row) * args.row_stride;
    if (args.type == THIMBLE_F16) {
      side.encode_head(head, static_cast<const uint16_t*>(args.rows) + first, args.cells[row]);
    } else {
      side.encode_head(head, static_cast<const float*>(args.rows) + first + head * dim, args.cells[row]);
    }
  });
}

void CpuDevice::decode(const thimble_decode_args& args, void*) {
  const CacheSide side = side_of_all(args.blocks, *args.codec);
  const size_t dim = side.format().head_dim;
  for_vectors(team_, args, [&](int64_t row, int head) {
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

AttentionProblem problem_of(const thimble_attend_args& args, int sequence, const std::vector<ExactCell>& exact) {
  const int64_t first = first_token(args, sequence);
  AttentionProblem p;
  p.n_heads = args.n_heads;
  p.n_tokens = int(first_token(args, sequence + 1) - first);
  p.first_stream = sequence;
  p.n_cells = args.n_cells[sequence];
  p.value_dim = args.values->format().head_dim;
  p.q = args.q + size_t(first) * args.q_token_stride;
  p.q_token = args.q_token_stride;
  p.q_head = args.q_head_stride;
  p.out = args.out + size_t(first) * args.out_token_stride;
  p.out_token = args.out_token_stride;
  p.out_head = args.out_head_stride;
  if (args.mask) p.mask = args.mask + size_t(first) * args.mask_stride;
  p.mask_token = args.mask_stride;
  p.scale = scale_of(args);
  p.max_bias = args.max_bias;
  p.softcap = args.softcap;
  p.sinks = args.sinks;
  p.exact = exact;
  return p;
}

void CpuDevice::take_exact(const thimble_attend_args& args) {
  const thimble_exact& exact = args.exact;
  if (exact_.size() < size_t(args.n_sequences)) exact_.resize(args.n_sequences);
  for (int s = 0; s < args.n_sequences; s++) {
    exact_[s].clear();
    if (!exact.start) continue;
    for (int64_t i = exact.start[s]; i < exact.start[s + 1]; i++) {
      exact_[s].push_back({int(exact.cells[i]), exact.keys + exact.rows[i] * exact.key_stride,
                           exact.values + exact.rows[i] * exact.value_stride});
    }
  }
}

void CpuDevice::attend(const thimble_attend_args& args, void*) {
  const int64_t cells = int64_t{args.blocks_per_sequence} * kBlockCells;
  const int n = args.n_sequences;
  const CacheLayer layer(side_of(args.key_blocks, *args.keys, cells, n, args.block_table),
                         side_of(args.value_blocks, *args.values, cells, n, args.block_table),
                         Window({0, 0, 0}, 0, cells, n));
  take_exact(args);
  if (attention_.size() < size_t(n)) attention_.resize(n);
  for (int s = 0; s < n; s++) {
    attention_[s].prepare(layer, problem_of(args, s, exact_[s]), {}, team_.size(), kernels_);
  }
  team_.run([&](int thread) {
    for (int s = 0; s < n; s++) attention_[s].attend(thread);
  });
}

}  // namespace

std::unique_ptr<Device> make_cpu_device(int n_threads) {
  return std::make_unique<CpuDevice>(n_threads);
}

}  // namespace thimble::api
