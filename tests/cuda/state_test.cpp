// States of a device cache: rows saved, loaded and rotated by the kernels' own source, emulated, against a CacheLayer
// that holds the same cells. Rows are interchangeable, bit for bit, in both directions.
#define THIMBLE_SIMT_HOST
#include <gtest/gtest.h>

#include <cstring>
#include <map>

#include "cache/state_row.h"
#include "cuda/encode/encode_kernel.h"
#include "cuda/state/cell_state.h"
#include "cuda/state/cells_kernel.h"
#include "fixture.h"

namespace thimble::cuda {
namespace {

constexpr WindowSize kWindow{8, 3, 0};
constexpr int kSlots = 11, kCapacity = kSlots + kMaxTokens;
constexpr uint64_t kHash = 42;

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
            random_codec(kind, s.head_dim, kind == Kind::key ? s.key_bits : s.value_bits, s.dense, random));
      }
      format[k] = codecs->front().format;
      tables[k] = pack_tables(*codecs, s.tiles);
      const int n_slots = s.with_store ? 0 : kSlots * s.n_streams;
      cpu_memory[k].resize(CacheSide::memory_bytes(shape, format[k], n_slots));
      auto store = s.with_store ? ExactStore::ram(shape.n_cells(), s.n_heads * s.head_dim) : nullptr;
      sides.emplace_back(shape, codecs, n_slots, cpu_memory[k].data(), std::move(store));
      blocks[k].resize(format[k].block_bytes() * s.n_heads * s.n_streams * shape.blocks_per_stream());
      window[k].resize(size_t(s.n_streams) * s.n_heads * kCapacity * s.head_dim);
      if (s.with_store) this->store[k].resize(size_t(shape.n_cells()) * s.n_heads * s.head_dim);
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

  size_t row_bytes() const { return size_t(s.n_heads) * s.head_dim * 2; }

  /// Writes cells [first, first + n) of a stream on the CPU, one by one.
  void fill(int n, int stream, int first = 0) {
    Random random(unsigned(100 + stream));
    const int64_t base = stream * s.cells;
    for (int i = 0; i < n; i++) {
      const int64_t cell = base + first + i;
      for (Kind kind : {Kind::key, Kind::value}) {
        cpu->begin_write(kind, {&cell, 1});
        std::vector<uint16_t> row(row_bytes() / 2);
        for (uint16_t& x : row) x = float_to_half(random.normal());
        cpu->write_row(kind, 0, row.data());
      }
      cpu->commit([&](int, int64_t other) { return other >= base && other <= cell; });
    }
  }
  Rows save_cpu(Kind kind, int64_t first, int64_t n) const {
    Rows rows(n * row_bytes(), 0xee);
    for (int64_t i = 0; i < n; i++) save_cell(*cpu, kind, first + i, kHash, &rows[i * row_bytes()]);
    return rows;
  }
  void load_cpu(Kind kind, int64_t first, int64_t n, const Rows& rows) {
    for (int64_t i = 0; i < n; i++) load_cell(*cpu, kind, first + i, kHash, &rows[i * row_bytes()]);
  }
  Rows save(Kind kind, int64_t first, int64_t n) {
    Rows rows(n * row_bytes(), 0xee);
    state().save(args, kind, device_window, first, n, kHash, rows.data());
    return rows;
  }
  CellState::Refused load(Kind kind, std::vector<int64_t> cells, const Rows& rows, uint64_t hash = kHash) {
    return state().load(args, kind, device_window, cells, hash, rows.data());
  }
  CellState state() { return CellState(kernels, 50 * row_bytes()); }  // in several copies

  Setting s;
  Format format[2];
  HostTables tables[2];
  std::vector<uint8_t> cpu_memory[2], blocks[2];
  std::vector<uint16_t> window[2], store[2];
  std::unique_ptr<CacheLayer> cpu;
  EncodeArgs args;
  HostWindow device_window;
  EmulatedKernels kernels;
};

std::vector<int64_t> range(int64_t first, int64_t n) {
  std::vector<int64_t> cells;
  for (int64_t i = 0; i < n; i++) cells.push_back(first + i);
  return cells;
}

const Setting kSettings[] = {
    {64, 4, 4},
    {64, 2, 1, true},
    {128, 4, 2},
    {128, 2, 2, true, false, 3},
    {256, 1, 1, false, false, 1},
    {256, 2, 1, true, false, 2, 1, 128},
    {.head_dim = 64, .key_bits = 3, .value_bits = 1.25, .tiles = true},
    {.head_dim = 128, .key_bits = 1.5, .value_bits = 4, .dense = true, .tiles = true},
};

// What the CPU saved of a sequence of n cells is loaded into the device's cache, and saved from there.
TEST(CudaState, RowsAreTheCpusBothWays) {
  for (const Setting& setting : kSettings) {
    for (const auto& [n, first] : {std::pair{1, 40}, {63, 0}, {64, 1}, {65, 63}}) {
      {
        Layer layer(setting);
        const int stream = setting.n_streams - 1;
        layer.fill(n, stream, first);
        const int64_t cell = stream * setting.cells + first;
        for (Kind kind : {Kind::key, Kind::value}) {
          const Rows rows = layer.save_cpu(kind, cell, n);
          EXPECT_TRUE(layer.load(kind, range(cell, n), rows).empty());
          EXPECT_TRUE(layer.save(kind, cell, n) == rows) << setting.head_dim << " " << setting.key_bits << " " << n;
          // Codes lie where the encoder puts them, and where attention reads them.
          const int k = int(kind);
          const size_t block_bytes = layer.format[k].block_bytes(), per_stream = setting.cells / kBlockCells;
          for (int head = 0; head < setting.n_heads; head++) {
            for (int64_t i = 0; i < n; i++) {
              if (layer.device_window.slot_of(cell + i) >= 0) continue;
              const size_t index = (size_t(head) * setting.n_streams + stream) * per_stream + (first + i) / kBlockCells;
              std::vector<uint8_t> block(block_bytes), got(size_t(layer.format[k].vector_bytes())), expected(got);
              block_from_cuda(layer.format[k], kind, &layer.blocks[k][index * block_bytes], block.data(),
                              setting.tiles);
              copy_cell_out(layer.format[k], kind, block.data(), int((first + i) % kBlockCells), got.data());
              const CacheSide& side = layer.cpu->side(kind);
              copy_cell_out(layer.format[k], kind, side.block(head, cell + i), side.in_block(cell + i),
                            expected.data());
              ASSERT_EQ(got, expected);
            }
          }
        }
        Layer back(setting);
        for (Kind kind : {Kind::key, Kind::value}) {
          const Rows rows = layer.save(kind, cell, n);
          back.load_cpu(kind, cell, n, rows);
          EXPECT_TRUE(back.save_cpu(kind, cell, n) == rows);
        }
      }
    }
  }
}

// Into cells that are not adjacent, from any row on; others stay as they were.
TEST(CudaState, IntoScatteredCells) {
  Layer layer({128, 4, 2});
  layer.fill(100, 0);
  for (Kind kind : {Kind::key, Kind::value}) {
    const Rows rows = layer.save_cpu(kind, 0, 100);
    EXPECT_TRUE(layer.load(kind, range(0, 100), rows).empty());
    std::vector<int64_t> cells;
    for (int i = 0; i < 60; i++) cells.push_back(192 + (i * 67 + 5) % 192);
    EXPECT_TRUE(layer.load(kind, cells, Rows(rows.begin() + 20 * layer.row_bytes(), rows.end())).empty());
    const Rows saved = layer.save(kind, 192, 192);
    for (int i = 0; i < 60; i++) {
      const uint8_t* row = &rows[(20 + i) * layer.row_bytes()];
      EXPECT_TRUE(std::equal(row, row + layer.row_bytes(), &saved[(cells[i] - 192) * layer.row_bytes()]));
    }
    EXPECT_TRUE(layer.save(kind, 0, 100) == rows);
  }
}

TEST(CudaState, OfAnExactStore) {
  for (bool dense : {false, true}) {
    Layer layer({64, 2, 2, dense, true});
    layer.fill(100, 1, 7);
    for (Kind kind : {Kind::key, Kind::value}) {
      const Rows rows = layer.save_cpu(kind, 192 + 7, 100);
      EXPECT_TRUE(layer.load(kind, range(192 + 7, 100), rows).empty());
      EXPECT_TRUE(layer.save(kind, 192 + 7, 100) == rows);
    }
    // The window has the ends of it.
    for (int64_t cell : range(192 + 7, 100))
      EXPECT_EQ(layer.device_window.slot_of(cell) >= 0,
                cell < 192 + 7 + kWindow.pool || cell >= 192 + 107 - kWindow.last);
    Layer codes({64, 2, 2, dense});  // codes into a cache with a store: what they stand for is kept
    codes.fill(100, 0);
    for (Kind kind : {Kind::key, Kind::value}) {
      const Rows rows = codes.save_cpu(kind, 0, 100);
      layer.load_cpu(kind, 0, 100, rows);
      EXPECT_TRUE(layer.load(kind, range(0, 100), rows).empty());
      EXPECT_TRUE(layer.save(kind, 0, 100) == layer.save_cpu(kind, 0, 100));
    }
  }
}

TEST(CudaState, RefusesRowsOfOtherSettingsAndWritesNothingOfThem) {
  Layer layer({64, 4, 4});
  layer.fill(60, 0);
  const Rows rows = layer.save_cpu(Kind::key, 0, 60);
  const std::vector<size_t> refused = layer.load(Kind::key, range(0, 60), rows, kHash + 1);
  std::vector<size_t> coded;
  for (size_t i = 0; i < 60; i++) {
    if (row_kind(&rows[i * layer.row_bytes()], kHash, true) == RowKind::coded) coded.push_back(i);
  }
  EXPECT_EQ(refused, coded);
  EXPECT_EQ(refused.size(), 60u - kSlots);
  const std::vector<uint8_t>& blocks = layer.blocks[0];
  EXPECT_TRUE(std::all_of(blocks.begin(), blocks.end(), [](uint8_t byte) { return byte == 0; }));
}

// A loaded sequence takes the rows of another, whose cells are coded of the rows as they were.
TEST(CudaState, CellsThatLeaveForOthersAreCoded) {
  const Setting setting{64, 4, 2};
  Layer layer(setting);
  const auto load = [&](int64_t first, int n, int64_t from) {
    for (Kind kind : {Kind::key, Kind::value}) layer.load(kind, range(first, n), layer.save_cpu(kind, from, n));
  };
  layer.fill(40, 0);
  layer.fill(9, 1);
  load(0, 40, 0);
  load(100, 9, 192);  // as exact rows: 9 for a ring of 8, which the first sequence had
  for (Kind kind : {Kind::key, Kind::value}) {
    const CacheSide& side = layer.cpu->side(kind);
    const Rows saved = layer.save(kind, 0, 40);
    for (int64_t cell = 40 - kWindow.last; cell < 40; cell++) {
      ASSERT_EQ(layer.device_window.slot_of(cell), -1);
      side.encode_row(layer.cpu->exact_row(kind, cell), cell);
      Rows vectors(row_vectors_bytes(side.shape(), side.format())), row(layer.row_bytes());
      for (int head = 0; head < setting.n_heads; head++) {
        copy_cell_out(side.format(), kind, side.block(head, cell), side.in_block(cell),
                      vectors.data() + head * size_t(side.format().vector_bytes()));
      }
      write_coded_row(vectors.data(), vectors.size(), kHash, row.data(), row.size());
      EXPECT_TRUE(std::equal(row.begin(), row.end(), &saved[cell * row.size()])) << cell;
    }
    EXPECT_TRUE(layer.save(kind, 101, 8) == layer.save_cpu(kind, 193, 8));
  }
}

// Keys are read as the CPU decodes them, and what is written back unchanged is coded as the CPU codes it.
TEST(CudaState, KeysToRotate) {
  for (const Setting& setting : kSettings) {
    Layer layer(setting);
    layer.fill(70, 0);
    const Rows rows = layer.save_cpu(Kind::key, 0, 70);
    layer.load(Kind::key, range(0, 70), rows);
    const std::vector<int64_t> cells = range(1, 68);
    CellState state = layer.state();
    float* keys = state.read_keys(layer.args, layer.device_window, cells);
    const size_t size = layer.row_bytes() / 2;
    CacheSide& side = layer.cpu->side(Kind::key);
    std::vector<float> expected(size);
    for (size_t i = 0; i < cells.size(); i++) {
      uint16_t* exact = layer.cpu->exact_row(Kind::key, cells[i]);
      if (exact) {
        std::transform(exact, exact + size, expected.begin(), half_to_float);
      } else {
        side.decode_row(cells[i], expected.data());
      }
      ASSERT_TRUE(std::equal(expected.begin(), expected.end(), keys + i * size)) << setting.head_dim << " " << cells[i];
      // The steps of CpuCache::write_keys, with a rotation by half a turn.
      std::vector<uint16_t> row(size);
      for (size_t d = 0; d < size; d++) row[d] = float_to_half(keys[i * size + d] = -expected[d]);
      if (exact) std::copy(row.begin(), row.end(), exact);
      if (layer.cpu->window().find(cells[i]) < 0) side.encode_row(row.data(), cells[i]);
    }
    state.write_keys(layer.args, layer.device_window, cells);
    EXPECT_TRUE(layer.save(Kind::key, 0, 70) == layer.save_cpu(Kind::key, 0, 70)) << setting.head_dim;
  }
}

}  // namespace
}  // namespace thimble::cuda
