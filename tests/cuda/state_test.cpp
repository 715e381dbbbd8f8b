// States of a device cache: rows saved, loaded and rotated by the kernels' own source, emulated, against a CacheLayer
// that holds the same cells. Rows are interchangeable, bit for bit, in both directions.
#define THIMBLE_SIMT_HOST
#include "state_layer.h"

namespace thimble::cuda {
namespace {

const Setting kSettings[] = {
    {64, 4, 4},
    {64, 2, 1, true},
    {128, 4, 2},
    {128, 2, 2, true, false, 3},
    {256, 1, 1, false, false, 1},
    {256, 2, 1, true, false, 2, 1, 128},
    {.head_dim = 64, .key_bits = 3, .value_bits = 1.25, .tiles = true},
    {.head_dim = 128, .key_bits = 1.5, .value_bits = 4, .dense = true, .tiles = true},
    {.head_dim = 80, .key_bits = 4, .value_bits = 2, .rows = true, .value_dim = 48},
    {.head_dim = 96, .key_bits = 1, .value_bits = 3, .dense = true, .n_heads = 1, .rows = true, .value_dim = 64},
    {.head_dim = 34, .key_bits = 1.25, .value_bits = 16, .rows = true, .value_dim = 256},
    {.head_dim = 64, .key_bits = 16, .value_bits = 4, .with_store = true, .rows = true},
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
              const uint8_t* coded = &layer.blocks[k][index * block_bytes];
              const int in_block = int((first + i) % kBlockCells);
              if (setting.rows) {
                const CodePacker packer{kind, layer.tables[k].order};
                for (size_t byte = 0; byte < got.size(); byte++) got[byte] = coded[packer.place(int(byte), in_block)];
              } else {
                block_from_cuda(layer.format[k], kind, coded, block.data(), setting.tiles);
                copy_cell_out(layer.format[k], kind, block.data(), in_block, got.data());
              }
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
  const CacheSide& side = layer.cpu->side(Kind::key);
  const std::vector<uint64_t> hashes = layer.hashes();
  const RowLayout layout = row_layout(side.format(), hashes, true);
  for (size_t i = 0; i < 60; i++) {
    if (row_kind(&rows[i * layer.row_bytes()], layout) == RowKind::coded) coded.push_back(i);
  }
  EXPECT_EQ(refused, coded);
  EXPECT_EQ(refused.size(), 60u - kSlots);
  const std::vector<uint8_t>& blocks = layer.blocks[0];
  EXPECT_TRUE(std::all_of(blocks.begin(), blocks.end(), [](uint8_t byte) { return byte == 0; }));
}

// Rows that came from two devices: of every other one, which is exact, the first head is coded.
TEST(CudaState, MixedRowsAreTheCpus) {
  for (const Setting& setting : {Setting{64, 4, 2}, Setting{128, 2, 1, false, false, 3}}) {
    Layer from(setting), to(setting);
    from.fill(60, 0);
    from.fill(60, 1);
    for (Kind kind : {Kind::key, Kind::value}) {
      const size_t bytes = from.row_bytes(kind), head = bytes / setting.n_heads;
      Rows rows = from.save_cpu(kind, 60 - kWindow.last, kWindow.last);
      for (int64_t i = 0; i < kWindow.last; i += 2) {
        const Rows coded = from.save_cpu(kind, 192 + 20 + i, 1);
        std::copy_n(coded.begin(), head, &rows[i * bytes]);
      }
      to.load_cpu(kind, 3, kWindow.last, rows);
      EXPECT_TRUE(to.load(kind, range(3, kWindow.last), rows).empty());
      EXPECT_TRUE(to.save(kind, 3, kWindow.last) == to.save_cpu(kind, 3, kWindow.last));
      EXPECT_FALSE(to.save(kind, 3, kWindow.last) == rows);
      EXPECT_GE(to.device_window.slot_of(3), 0);
    }
  }
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
      const std::vector<uint64_t> hashes = layer.hashes();
      const RowLayout layout = row_layout(side.format(), hashes, true);
      Rows vectors(layout.vectors_bytes()), row(layer.row_bytes());
      for (int head = 0; head < setting.n_heads; head++) {
        copy_cell_out(side.format(), kind, side.block(head, cell), side.in_block(cell),
                      vectors.data() + head * size_t(side.format().vector_bytes()));
      }
      write_coded_row(vectors.data(), layout, row.data());
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
