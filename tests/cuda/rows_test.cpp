// Layers that are read as rows: kernels for any head size and format, with their launchers, in emulation, against the
// codec's specification.
#define THIMBLE_SIMT_HOST
#include "cuda/rows/rows.h"

#include "state_layer.h"

namespace thimble::cuda {
namespace {

struct Shape {
  int head_dim;
  double bits;
  bool dense = false;
};
void PrintTo(const Shape& shape, std::ostream* out) {
  *out << shape.head_dim << " numbers, " << shape.bits << " bits" << (shape.dense ? ", a matrix" : "");
}

constexpr Shape kShapes[] = {{2, 4},          {32, 4},        {34, 3},         {48, 2, true},  {64, 1},
                             {80, 1.5, true}, {96, 1.25},     {112, 3, true},  {128, 2},       {160, 4},
                             {192, 1, true},  {256, 2, true}, {64, 16, false}, {72, 16, false}};

/// One side of a layer in the plain order, all cells empty.
struct Side {
  Side(const Shape& shape, int n_heads, int n_streams, int64_t cells) : shape{n_heads, cells, n_streams}, capacity(24) {
    Random random(unsigned(shape.head_dim));
    for (int h = 0; h < n_heads; h++) {
      codecs.push_back(random_codec(Kind::key, shape.head_dim, shape.bits, shape.dense, random));
    }
    tables = pack_row_tables(codecs);
    const size_t block = codecs[0].format.block_bytes(), stream = block * size_t(this->shape.blocks_per_stream());
    blocks.resize(stream * n_streams * n_heads);
    window.resize(size_t(n_streams) * n_heads * capacity * shape.head_dim);
    args.n_kv_heads = n_heads;
    args.head_dim = shape.head_dim;
    args.cells_per_stream = int(cells);
    args.key_codec = tables.view();
    args.key_cache = {blocks.data(), stream, stream * n_streams, block};
    args.window = {window.data(), nullptr, nullptr, capacity};
  }

  int dim() const { return args.head_dim; }
  size_t row_size() const { return size_t(shape.n_kv_heads) * dim(); }
  /// The codec's specification of a cell's codes, and of what they stand for.
  std::vector<uint8_t> vector(const uint16_t* row, int head) const {
    const HeadCodec& codec = codecs[head];
    std::vector<float> x(dim()), y(dim());
    std::transform(row + head * dim(), row + (head + 1) * dim(), x.begin(), half_to_float);
    codec.transform.forward(x.data(), y.data());
    std::vector<uint8_t> block(codec.format.block_bytes()), out(size_t(codec.format.vector_bytes()));
    encode_cell(codec, y.data(), block.data(), 5);
    copy_cell_out(codec.format, Kind::key, block.data(), 5, out.data());
    return out;
  }
  std::vector<uint16_t> decoded(const std::vector<uint8_t>& vector, int head) const {
    const HeadCodec& codec = codecs[head];
    std::vector<uint8_t> block(codec.format.block_bytes());
    std::vector<float> x(dim()), y(dim());
    copy_cell_in(codec.format, Kind::key, vector.data(), block.data(), 5);
    decode_cell(codec, block.data(), 5, y.data());
    codec.transform.inverse(y.data(), x.data());
    std::vector<uint16_t> row(x.size());
    std::transform(x.begin(), x.end(), row.begin(), float_to_half);
    return row;
  }
  std::vector<uint8_t> stored(int64_t cell, int head) const {
    const CodePacker packer{Kind::key, tables.order};
    const int64_t stream = cell / shape.cells_per_stream, in_stream = cell % shape.cells_per_stream;
    const uint8_t* block = args.key_cache.data + stream * args.key_cache.stream_stride +
                           head * args.key_cache.head_stride + in_stream / kBlockCells * args.key_cache.block_stride;
    std::vector<uint8_t> out;
    for (int i = 0; i < packer.vector_bytes(); i++) out.push_back(block[packer.place(i, int(in_stream % kBlockCells))]);
    return out;
  }

  CacheShape shape;
  int capacity;
  std::vector<HeadCodec> codecs;
  HostTables tables;
  std::vector<uint8_t> blocks;
  std::vector<uint16_t> window;
  EncodeArgs args;
};

class CudaRows : public testing::TestWithParam<Shape> {};

// New rows with and without a row in the window, one that is none, and a vector of zeros: codes bit for bit.
TEST_P(CudaRows, AreEncodedAsSpecified) {
  for (int n : {1, 63, 64, 65}) {
    Side side(GetParam(), 2, 2, 128);
    Random random{unsigned(n)};
    const size_t stride = side.row_size() + 3;
    std::vector<float> rows = random.normals(n * stride);
    if (n > 5) std::fill_n(rows.begin() + 5 * stride, side.row_size(), 0.0f);
    std::vector<int64_t> cells;
    std::vector<int32_t> slots;
    for (int i = 0; i < n; i++) {
      cells.push_back(i == 2 ? -1 : 128 + (i * 5 + 60) % 128);
      slots.push_back(i % 7 == 3 && i < 7 * side.capacity ? i / 7 : -1);
    }
    EncodeArgs args = side.args;
    args.n_tokens = n;
    args.cells = cells.data();
    args.window.slots = slots.data();
    args.keys = rows.data();
    args.key_token_stride = stride;
    args.key_head_stride = side.dim();
    ASSERT_TRUE(encode_rows(kEmulatedDevice, args, nullptr).ok());
    for (int i = 0; i < n; i++) {
      if (cells[i] < 0) continue;
      std::vector<uint16_t> row(side.row_size());
      std::transform(&rows[i * stride], &rows[i * stride] + row.size(), row.begin(), float_to_half);
      for (int head = 0; head < 2; head++) {
        if (slots[i] >= 0) {
          const uint16_t* kept = &side.window[((2 + head) * size_t(side.capacity) + slots[i]) * side.dim()];
          EXPECT_TRUE(std::equal(kept, kept + side.dim(), &row[head * side.dim()]));
        } else {
          ASSERT_EQ(side.stored(cells[i], head), side.vector(row.data(), head)) << "row " << i << " of " << n;
        }
      }
    }
  }
}

// Rows of the window that leave it, as many as the device says.
TEST_P(CudaRows, LeaveTheWindow) {
  Side side(GetParam(), 2, 2, 64);
  Random random(3);
  for (uint16_t& x : side.window) x = float_to_half(random.normal());
  std::vector<int64_t> cells = {3, 64 + 63, 40, 17};
  std::vector<int32_t> slots = {23, 0, 11, 5};
  WindowBooks books{};
  books.n_batches = 6;
  int n_leaving[2] = {99, 3};
  LayerWindow window;
  window.leaving_cells = cells.data();
  window.leaving_slots = slots.data();
  window.books = &books;
  window.n_leaving = n_leaving;
  ASSERT_TRUE(code_leaving_rows(kEmulatedDevice, side.args, window, 4, nullptr).ok());
  for (int i = 0; i < 4; i++) {
    for (int head = 0; head < 2; head++) {
      const size_t at = ((cells[i] / 64 * 2 + head) * side.capacity + slots[i]) * side.dim();
      std::vector<uint16_t> row(side.row_size());
      std::copy_n(&side.window[at], side.dim(), &row[head * side.dim()]);
      const std::vector<uint8_t> coded = side.stored(cells[i], head);
      const bool leaves = i < 3;
      EXPECT_EQ(coded == side.vector(row.data(), head), leaves);
      EXPECT_EQ(std::all_of(coded.begin(), coded.end(), [](uint8_t b) { return b == 0; }), !leaves);
    }
  }
}

// Cells that are coded, in the window, in flight (some of which the window has too, before they are written there), and
// never written.
TEST_P(CudaRows, AreReadFromWhereTheyAre) {
  for (int n_cells : {1, 63, 64, 65}) {
    for (bool transposed : {false, true}) {
      Side side(GetParam(), 2, 3, 128);
      Random random{unsigned(n_cells)};
      const size_t size = side.row_size();
      std::vector<uint16_t> expected(2 * n_cells * size);  // of streams 1 and 2
      std::vector<float> rows = random.normals(2 * n_cells * size);
      std::vector<int64_t> cells;
      for (int i = 0; i < 2 * n_cells; i++) cells.push_back(128 + i / n_cells * 128 + i % n_cells);
      EncodeArgs args = side.args;
      args.n_tokens = 2 * n_cells;
      args.cells = cells.data();
      args.keys = rows.data();
      args.key_token_stride = size;
      args.key_head_stride = side.dim();
      ASSERT_TRUE(encode_rows(kEmulatedDevice, args, nullptr).ok());
      for (uint16_t& x : side.window) x = float_to_half(random.normal());
      std::vector<int32_t> window_cells(3 * side.capacity, -1);
      for (int i = 0; i < 4; i++) window_cells[side.capacity + 2 * i] = (7 * i + 3) % 128;
      window_cells[2 * side.capacity + 9] = 0;
      window_cells[4] = 0;  // of a stream that is not read
      const std::vector<float> flight = random.normals(3 * size);
      const std::vector<int64_t> in_flight = {128 + 3, 256 + n_cells - 1, 256 + 100};
      for (int i = 0; i < 2 * n_cells; i++) {
        const int64_t stream = i / n_cells, cell = i % n_cells;
        std::vector<uint16_t> row(size);
        std::transform(&rows[i * size], &rows[i * size] + size, row.begin(), float_to_half);
        for (int head = 0; head < 2; head++) {
          std::vector<uint16_t> out = side.decoded(side.vector(row.data(), head), head);
          for (int r = 0; r < side.capacity; r++) {
            if (window_cells[(stream + 1) * side.capacity + r] != cell) continue;
            std::copy_n(&side.window[(((stream + 1) * 2 + head) * side.capacity + r) * side.dim()], side.dim(),
                        out.begin());
          }
          for (size_t f = 0; f < in_flight.size(); f++) {
            if (in_flight[f] != (stream + 1) * 128 + cell) continue;
            const float* from = &flight[f * size + head * side.dim()];
            std::transform(from, from + side.dim(), out.begin(), float_to_half);
          }
          for (int d = 0; d < side.dim(); d++) {
            const size_t number = size_t(head) * side.dim() + d;
            const size_t at = transposed ? number * n_cells + cell : cell * size + number;
            expected[stream * n_cells * size + at] = out[d];
          }
        }
      }
      ReadRowsArgs read;
      read.side = side_of(side.args, Kind::key);
      read.first_stream = 1;
      read.n_streams = 2;
      read.n_cells = n_cells;
      read.window_cells = window_cells.data();
      read.flight = {3, in_flight.data(), flight.data()};
      std::vector<int32_t> exact(2 * n_cells, 77);
      std::vector<uint16_t> out(expected.size());
      read.exact = exact.data();
      read.transposed = transposed;
      read.out = out.data();
      ASSERT_TRUE(read_rows(kEmulatedDevice, read, nullptr).ok());
      EXPECT_TRUE(out == expected) << n_cells << (transposed ? " transposed" : "");
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, CudaRows, testing::ValuesIn(kShapes));

TEST(CudaRowsOfALayer, KeepTheQueriesThatWillJudge) {
  constexpr int kHeads = 3, kDim = 48, kTokens = 4;
  Random random(1);
  const std::vector<float> queries = random.normals(2 * kTokens * kHeads * kDim);  // [stream][head][token][number]
  const std::vector<int32_t> judges = {3, -1, 1, 0};
  std::vector<float> kept(4 * kHeads * kDim, -7);
  KeepQueriesArgs keep;
  keep.n_streams = 2;
  keep.n_tokens = kTokens;
  keep.n_heads = kHeads;
  keep.head_dim = kDim;
  keep.queries = queries.data();
  keep.stream_stride = kTokens * kHeads * kDim;
  keep.token_stride = kDim;
  keep.head_stride = kTokens * kDim;
  keep.judges = judges.data();
  keep.n_judges = 2;
  keep.kept = kept.data();
  ASSERT_TRUE(keep_queries(kEmulatedDevice, keep, nullptr).ok());
  for (int i = 0; i < 4; i++) {
    for (int head = 0; head < kHeads; head++) {
      for (int d = 0; d < kDim; d++) {
        const float got = kept[(i * kHeads + head) * kDim + d];
        const size_t from = ((size_t(i / 2) * kHeads + head) * kTokens + std::max(judges[i], 0)) * kDim + d;
        EXPECT_EQ(got, judges[i] < 0 ? -7 : queries[from]);
      }
    }
  }
}

TEST(CudaRowsOfALayer, HeadsThatAreTooLargeAreRefused) {
  Side side({64, 4}, 1, 1, 64);
  CellArgs args = side_of(side.args, Kind::key);
  args.head_dim = args.codec.head_dim = kMaxRowDim + 2;
  args.n = 1;
  EXPECT_EQ(read_any_rows(kEmulatedDevice, args, nullptr).code, Status::Code::unsupported);
}

}  // namespace
}  // namespace thimble::cuda
