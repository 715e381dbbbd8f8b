// A CUDA device for the API whose kernels are emulated: their own source, run thread by thread. Device 0 has Hopper's
// shared memory, device 1 that of sm_86.
#define THIMBLE_SIMT_HOST
#include <cmath>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "api/cuda/ops.h"
#include "api/status.h"
#include "cuda/attend/deal.h"
#include "cuda/attend/formats.h"
#include "cuda/attend/kernel.h"
#include "cuda/encode/encode_kernel.h"
#include "cuda/state/cells_kernel.h"

namespace thimble::api {
namespace {

using cuda::simt::Machine;

/// Those of the kernels that tests use: each takes seconds to compile.
template <typename S>
constexpr bool is_compiled() {
#ifdef THIMBLE_FEW_KERNELS
  return S::kHeadDim == 64 && S::kKeyWidth == 4 && S::kValueWidth == 4;
#else
  if (!S::kLarge) return S::kHeadDim < 256 && S::kKeyWidth == S::kValueWidth && S::kKeyWidth != 8;
  return S::kHeadDim == 64 || (S::kHeadDim == 128 && S::kKeyWidth != 8) || (S::kHeadDim == 256 && S::kKeyWidth == 8);
#endif
}

class EmulatedTables : public CudaTables {
public:
  explicit EmulatedTables(const cuda::HostTables& tables) : tables_(tables), view_(tables_.view()) {}
  const cuda::CodecTables& view() const override { return view_; }

private:
  cuda::HostTables tables_;
  cuda::CodecTables view_;
};

class EmulatedOps : public CudaOps {
public:
  explicit EmulatedOps(bool large) : large_(large) {}

  const char* name() const override { return large_ ? "sm_90" : "sm_86"; }
  bool fits(int head_dim, int key_width, int value_width) const override {
    const size_t bytes = cuda::attend_shared_bytes(large_, head_dim, key_width, value_width);
    return bytes > 0 && bytes <= (large_ ? 227 : 99) * 1024;
  }
  int tokens_at_once() const override { return 4; }
  std::unique_ptr<CudaTables> tables(const cuda::HostTables& tables) override {
    return std::make_unique<EmulatedTables>(tables);
  }

  void begin(void*) override {
    if (in_call_) throw std::logic_error("a call within a call");
    in_call_ = true;
  }
  void end() noexcept override {
    for (void* memory : scratch_) ::operator delete (memory, std::align_val_t{256});
    scratch_.clear();
    in_call_ = false;
  }
  void* scratch(size_t bytes) override {
    if (!in_call_) throw std::logic_error("not between begin and end");
    scratch_.push_back(::operator new (bytes + 1, std::align_val_t{256}));
    std::memset(scratch_.back(), 0xff, bytes);  // NaN
    return scratch_.back();
  }
  void* upload(const void* from, size_t bytes) override {
    void* to = scratch(bytes);
    std::memcpy(to, from, bytes);
    return to;
  }

  void encode(const cuda::EncodeArgs& args) override {
    cuda::EncodeArgs a = args;
    a.tokens_per_block = 3;
    cuda::for_head_dim(
        a.head_dim,
        [&]<int D>() {
          using Kernel = cuda::EncodeKernel<D>;
          Machine::launch({(a.n_tokens + 2) / 3, 2 * a.n_kv_heads}, Kernel::kThreads, Kernel::kSharedBytes,
                          [&] { Kernel::run(a); });
          return true;
        },
        false);
  }
  void read_rows(const cuda::CellArgs& a) override {
    cuda::for_head_dim(
        a.head_dim,
        [&]<int D>() {
          using Kernel = cuda::RowsKernel<D>;
          Machine::launch({(a.n + Kernel::kWarps - 1) / Kernel::kWarps, a.n_kv_heads}, Kernel::kThreads,
                          Kernel::kSharedBytes, [&] { Kernel::read(a); });
          return true;
        },
        false);
  }
  void widen(const cuda::CellArgs& a) override {
    using Kernel = cuda::ConvertKernel;
    const size_t numbers = size_t(a.n) * a.n_kv_heads * a.head_dim;
    Machine::launch({int((numbers + Kernel::kNumbers - 1) / Kernel::kNumbers)}, Kernel::kThreads, 0,
                    [&] { Kernel::run<false>(a); });
  }
  void attend(const cuda::AttendArgs& args) override {
    const int key_width = args.key_codec.width, value_width = args.value_codec.width;
    const bool ran = cuda::for_head_dim(
        args.head_dim,
        [&]<int D>() {
          return cuda::for_widths(
              key_width, value_width,
              [&]<int KeyWidth, int ValueWidth>() {
                return large_ ? run<cuda::AttendShape<D, KeyWidth, ValueWidth, true, 1, true>>(args)
                              : run<cuda::AttendShape<D, KeyWidth, ValueWidth, false, 1, true>>(args);
              },
              false);
        },
        false);
    if (!ran) throw std::logic_error("this test program has no kernel for the format");
  }

private:
  /// As cuda::attend launches it, with few thread blocks, so that sequences are split and blocks take several tokens.
  template <typename S>
  static bool run(cuda::AttendArgs a) {
    if constexpr (is_compiled<S>()) {
      constexpr int kLanes = 3;
      const int n_blocks = a.n_cells / kBlockCells, n_exact = a.exact[0].capacity;
      const cuda::Deal deal = cuda::choose_deal(
          a.n_streams, n_blocks, n_exact, cuda::deal_options(S::kHeadDim, S::kKeyWidth, S::kValueWidth, kLanes, false));
      cuda::deal_out(a, deal.n_splits, cuda::exact_blocks(n_blocks, n_exact, deal.n_splits));
      const int pairs = a.n_kv_heads * a.row_groups;
      std::vector<float> partials(size_t(a.n_streams) * (a.n_splits + 1) * pairs * S::kPartialFloats, NAN);
      std::vector<int> arrived(size_t(a.n_streams) * pairs);
      a.partials = partials.data();
      a.arrived = arrived.data();
      Machine::launch({std::min(kLanes, cuda::n_batches(a)), a.n_kv_heads, a.row_groups}, S::kThreads,
                      cuda::shared_bytes<S>(), [&] { cuda::AttendKernel<S>::run(a); });
      return true;
    }
    return false;
  }

  bool large_;
  bool in_call_ = false;
  std::vector<void*> scratch_;
};

}  // namespace

std::unique_ptr<CudaOps> make_cuda_ops(int index) {
  if (index > 1) throw Failure(THIMBLE_UNSUPPORTED, "there is no CUDA device " + std::to_string(index));
  return std::make_unique<EmulatedOps>(index == 0);
}

}  // namespace thimble::api
