// A layer on the CPU and one on the device, of the same codecs, for tests of what goes from the one to the other.
// Include it behind THIMBLE_SIMT_HOST.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <memory>

#include "cache/state_row.h"
#include "cuda/encode/encode_kernel.h"
#include "cuda/state/cell_state.h"
#include "cuda/state/cells_kernel.h"
#include "cuda/state/state.h"
#include "fixture.h"

namespace thimble::cuda {

inline constexpr WindowSize kWindow{8, 3, 0};
inline constexpr int kSlots = 11, kCapacity = kSlots + kMaxTokens;
inline constexpr uint64_t kHash = 42;

/// The device that the engine is emulated for (emulated/).
inline const DeviceInfo kEmulatedDevice{0, 4, 64 << 10, 75};

class EmulatedKernels : public StateKernels {
public:
  void* device_memory(Scratch which, size_t bytes) override { return grown(memory_[int(which)], bytes); }
  void* host_memory(size_t bytes) override { return grown(host_, bytes); }
  void begin() override {}
  void wait() override {}
  void copy(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void gather_codes(const CellArgs& a) override { codes<false>(a); }
  void scatter_codes(const CellArgs& a) override { codes<true>(a); }
  void read_rows(const CellArgs& a) override {
    by_dim(a.head_dim, [&]<int D>() { rows<D>(a, [&] { RowsKernel<D>::read(a); }); });
  }
  void put_rows(const CellArgs& a) override {
    by_dim(a.head_dim, [&]<int D>() { rows<D>(a, [&] { RowsKernel<D>::put(a); }); });
  }
  void widen(const CellArgs& a) override { convert<false>(a); }
  void round(const CellArgs& a) override { convert<true>(a); }
  void encode(const EncodeArgs& args) override {
    EncodeArgs a = args;
    a.tokens_per_block = 8;
    const int blocks = (a.n_tokens + 7) / 8;
    by_dim(a.head_dim, [&]<int D>() {
      using Kernel = EncodeKernel<D>;
      simt::Machine::launch({blocks, 2 * a.n_kv_heads}, Kernel::kThreads, Kernel::kSharedBytes,
                            [&] { Kernel::run(a); });
    });
  }

private:
  template <typename F>
  static void by_dim(int dim, F f) {
    if (dim == 64) f.template operator()<64>();
    if (dim == 128) f.template operator()<128>();
    if (dim == 256) f.template operator()<256>();
  }
  template <bool ToBlocks>
  static void codes(const CellArgs& a) {
    const int blocks = (a.n + CodesKernel::kCells - 1) / CodesKernel::kCells;
    simt::Machine::launch({blocks, a.n_kv_heads}, CodesKernel::kThreads, 0, [&] { CodesKernel::run<ToBlocks>(a); });
  }
  template <int D, typename F>
  static void rows(const CellArgs& a, F body) {
    using Kernel = RowsKernel<D>;
    const int blocks = (a.n + Kernel::kWarps - 1) / Kernel::kWarps;
    simt::Machine::launch({blocks, a.n_kv_heads}, Kernel::kThreads, Kernel::kSharedBytes, body);
  }
  template <bool Round>
  static void convert(const CellArgs& a) {
    const size_t total = size_t(a.n) * a.n_kv_heads * a.head_dim;
    const int blocks = int((total + ConvertKernel::kNumbers - 1) / ConvertKernel::kNumbers);
    simt::Machine::launch({blocks}, ConvertKernel::kThreads, 0, [&] { ConvertKernel::run<Round>(a); });
  }
  // Memory is new at every use, so that nothing that was there before is relied on.
  static void* grown(std::vector<uint64_t>& memory, size_t bytes) {
    if (memory.size() * 8 < bytes) memory.assign(bytes / 8 + 1, 0x7e007e007e007e00);
    return memory.data();
  }
  std::vector<uint64_t> memory_[int(Scratch::count)], host_;
};

struct Setting {
  int head_dim;
  double key_bits, value_bits;
  bool dense = false, with_store = false;
  int n_heads = 2, n_streams = 2;
  int64_t cells = 192;
  bool tiles = false;
  bool rows = false;  // read as rows, by the kernels for any head size
  int value_dim = 0;  // 0: head_dim

  int dim(Kind kind) const { return kind == Kind::key || value_dim == 0 ? head_dim : value_dim; }
};

using Rows = std::vector<uint8_t>;

/// A layer on the CPU and one on the device, of the same codecs, both empty.
struct Layer {
  explicit Layer(const Setting& setting, unsigned seed = 5) : s(setting) {
    Random random(seed);
    const CacheShape shape{s.n_heads, s.cells, s.n_streams};
    std::vector<CacheSide> sides;
    for (Kind kind : {Kind::key, Kind::value}) {
      const int k = int(kind);
      auto codecs = std::make_shared<std::vector<HeadCodec>>();
      for (int h = 0; h < s.n_heads; h++) {
        codecs->push_back(
            random_codec(kind, s.dim(kind), kind == Kind::key ? s.key_bits : s.value_bits, s.dense, random));
      }
      format[k] = codecs->front().format;
      tables[k] = s.rows ? pack_row_tables(*codecs) : pack_tables(*codecs, s.tiles);
      const int n_slots = s.with_store ? 0 : kSlots * s.n_streams;
      cpu_memory[k].resize(CacheSide::memory_bytes(shape, format[k], n_slots));
      auto store = s.with_store ? ExactStore::ram(shape.n_cells(), s.n_heads * s.dim(kind)) : nullptr;
      sides.emplace_back(shape, codecs, n_slots, cpu_memory[k].data(), std::move(store));
      blocks[k].resize(format[k].block_bytes() * s.n_heads * s.n_streams * shape.blocks_per_stream());
      window[k].resize(size_t(s.n_streams) * s.n_heads * kCapacity * s.dim(kind));
      if (s.with_store) this->store[k].resize(size_t(shape.n_cells()) * s.n_heads * s.dim(kind));
    }
    cpu = std::make_unique<CacheLayer>(std::move(sides[0]), std::move(sides[1]),
                                       Window(kWindow, kSlots * s.n_streams, s.cells, s.n_streams));
    args.n_kv_heads = s.n_heads;
    args.head_dim = s.head_dim;
    args.cells_per_stream = int(s.cells);
    args.key_codec = tables[0].view();
    args.value_codec = tables[1].view();
    for (int k = 0; k < 2; k++) {
      const size_t block = format[k].block_bytes(), stream = block * size_t(shape.blocks_per_stream());
      (k == 0 ? args.key_cache : args.value_cache) = CacheView{blocks[k].data(), stream, stream * s.n_streams, block};
    }
    args.window = {window[0].data(), window[1].data(), nullptr, kCapacity};
    if (s.with_store) args.store = {store[0].data(), store[1].data(), 0, s.n_streams, int(s.cells)};
    device_window.n_streams = s.n_streams;
    device_window.cells_per_stream = int(s.cells);
    device_window.last = kWindow.last;
    device_window.pool = kWindow.pool;
    device_window.slots = kSlots;
    device_window.capacity = kCapacity;
    device_window.books.resize(s.n_streams);
    device_window.cells.assign(size_t(s.n_streams) * kCapacity, -1);
    device_window.order.resize(device_window.cells.size());
    device_window.sequence.resize(device_window.cells.size());
    device_window.list_hidden(size_t(shape.blocks_per_stream()) * kBlockCells / 32);
  }

  size_t row_bytes(Kind kind = Kind::key) const { return size_t(s.n_heads) * s.dim(kind) * 2; }

  /// Writes cells [first, first + n) of a stream on the CPU, one by one.
  void fill(int n, int stream, int first = 0) {
    Random random(unsigned(100 + stream));
    const int64_t base = stream * s.cells;
    for (int i = 0; i < n; i++) {
      const int64_t cell = base + first + i;
      for (Kind kind : {Kind::key, Kind::value}) {
        cpu->begin_write(kind, {&cell, 1});
        std::vector<uint16_t> row(row_bytes(kind) / 2);
        for (uint16_t& x : row) x = float_to_half(random.normal());
        cpu->write_row(kind, 0, row.data());
      }
      cpu->commit([&](int, int64_t other) { return other >= base && other <= cell; });
    }
  }
  std::vector<uint64_t> hashes(uint64_t hash = kHash) const { return std::vector<uint64_t>(s.n_heads, hash); }
  Rows save_cpu(Kind kind, int64_t first, int64_t n) const {
    Rows rows(n * row_bytes(kind), 0xee);
    for (int64_t i = 0; i < n; i++) save_cell(*cpu, kind, first + i, hashes(), &rows[i * row_bytes(kind)]);
    return rows;
  }
  void load_cpu(Kind kind, int64_t first, int64_t n, const Rows& rows) {
    for (int64_t i = 0; i < n; i++) load_cell(*cpu, kind, first + i, hashes(), &rows[i * row_bytes(kind)]);
  }
  Rows save(Kind kind, int64_t first, int64_t n) {
    Rows rows(n * row_bytes(kind), 0xee);
    state().save(args, kind, device_window, first, n, hashes(), rows.data());
    return rows;
  }
  CellState::Refused load(Kind kind, std::vector<int64_t> cells, const Rows& rows, uint64_t hash = kHash) {
    return state().load(args, kind, device_window, cells, hashes(hash), rows.data());
  }
  CellState state() {  // in several copies
    return CellState(s.rows ? *of_rows : static_cast<StateKernels&>(kernels), 50 * row_bytes());
  }

  Setting s;
  Format format[2];
  HostTables tables[2];
  std::vector<uint8_t> cpu_memory[2], blocks[2];
  std::vector<uint16_t> window[2], store[2];
  std::unique_ptr<CacheLayer> cpu;
  EncodeArgs args;
  HostWindow device_window;
  EmulatedKernels kernels;
  std::unique_ptr<StateKernels> of_rows = state_kernels(kEmulatedDevice);  // with their launchers
};

inline std::vector<int64_t> range(int64_t first, int64_t n) {
  std::vector<int64_t> cells;
  for (int64_t i = 0; i < n; i++) cells.push_back(first + i);
  return cells;
}

}  // namespace thimble::cuda
