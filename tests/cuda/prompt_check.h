// What becomes of a prompt's tokens in a layer (prepare_prompt, code_leaving and place_staged), under emulation or, in
// device_check.cu, on a device: dense rows, kept rows, transformed queries, codes bit for bit the codec's, and the
// window's rows.
#pragma once

#include <cstring>
#include <string>

#include "cuda/encode/encode.h"
#include "fixture.h"

namespace thimble::cuda {

struct PromptCase {
  int head_dim;
  double key_bits, value_bits;
  bool dense, tiles;
  bool restored = false;  // rows for attention are as the model wrote them
};

inline constexpr PromptCase kPromptCases[] = {{128, 2, 2, false, false},      {128, 2, 2, true, false},
                                              {64, 1, 2, true, false},        {64, 4, 4, false, false},
                                              {256, 2, 1, false, false},      {128, 3, 1.25, false, true},
                                              {256, 1.5, 3, true, true},      {128, 2, 2, false, false, true},
                                              {64, 4, 1, false, false, true}, {256, 1, 2, false, false, true}};

/// `Device`: Vector<T> that kernels and the host use, tables_of(HostTables) and done(Status). Returns what is wrong,
/// number by number, or "".
template <typename Device>
class PromptCheck {
  template <typename T>
  using Vector = typename Device::template Vector<T>;
  // Of streams 1 and 2 of 3, of which 1 is attended to as well; layer 0 is staged alone, layer 2 has another head size.
  static constexpr int kHeads = 2, kGroup = 3, kStreams = 3, kCells = 512, kCapacity = 12, kDenseCells = 128,
                       kLayers = 3;

public:
  PromptCheck(const DeviceInfo& device, const PromptCase& c, int n_tokens)
      : device_(device), c_(c), n_(n_tokens), random_(5) {
    for (int h = 0; h < kHeads; h++) {
      codecs_[0].push_back(random_codec(Kind::key, c.head_dim, c.key_bits, c.dense, random_));
      codecs_[1].push_back(random_codec(Kind::value, c.head_dim, c.value_bits, c.dense, random_));
    }
    for (int kind = 0; kind < 2; kind++) {
      tables_.push_back(Device::tables_of(pack_tables(codecs_[kind], c.tiles)));
      const size_t block = codecs_[kind][0].format.block_bytes();
      cache_[kind].resize(size_t(kStreams) * kHeads * kCells / kBlockCells * block);
      window_[kind].resize(size_t(kStreams) * kHeads * kCapacity * dim());
      for (uint16_t& x : window_[kind]) x = float_to_half(random_.normal());
      const std::vector<float> rows = random_.normals(size_t(n_) * kHeads * dim());
      rows_[kind].assign(rows.begin(), rows.end());
      dense_[kind].resize(size_t(kHeads) * kDenseCells * dim(), 0x7e00);
    }
    std::fill_n(rows_[0].begin(), dim(), 0.0f);  // what has no direction
    for (int i = 0; i < n_; i++) {
      const int stream = 1 + i % 2;
      cells_.push_back(i == 3 ? -1 : stream * kCells + 64 + i / 2 * 37 % 448);
      slots_.push_back(i % 5 == 2 && i / 5 < kCapacity ? i / 5 : -1);
    }
    window_cells_.resize(kStreams * kCapacity, -1);
    for (int row = 0; row < kCapacity; row += 2) {
      window_cells_[row] = row;                       // of a stream that is not attended to
      window_cells_[kCapacity + row] = row * 6 % 64;  // cells below 64 are no token's
      window_cells_[2 * kCapacity + row] = (row * 6 + 1) % 64;
    }
    for (int row : {0, 4, 10}) {
      leaving_cells_.push_back(kCells + window_cells_[kCapacity + row]);
      leaving_slots_.push_back(row);
    }
  }

  std::string run() {
    Vector<uint16_t> staged(size_t(2 * kLayers) * side(), 0x7e00);
    Vector<int32_t> slots;  // of layers 0 and 1
    for (int layer = 0; layer < kLayers; layer++) slots.insert(slots.end(), slots_.begin(), slots_.end());
    EncodeArgs batch = layer();
    batch.n_tokens = n_;
    batch.cells = cells_.data();
    batch.keys = rows_[0].data();
    batch.values = rows_[1].data();
    batch.key_token_stride = batch.value_token_stride = size_t(kHeads) * dim();
    batch.key_head_stride = batch.value_head_stride = dim();
    batch.dense = {dense_[0].data(), dense_[1].data(), 1, 1, kDenseCells};
    batch.window_cells = window_cells_.data();
    PromptArgs prompt;
    prompt.batch = batch;
    prompt.first_window_row = kCapacity;
    prompt.n_window_rows = kCapacity;
    StagedRows rows{staged.data(), side(), n_, cells_.data(), slots.data(), {3, 2}};  // of layer 0 keys alone
    prompt.staged_keys = rows.of(1, true);
    prompt.staged_values = rows.of(1, false);
    const std::vector<float> numbers = random_.normals(size_t(n_) * kHeads * kGroup * dim());
    Vector<float> in(numbers.begin(), numbers.end()), out(in.size()), expected(in.size());
    TransformArgs q;
    q.n_tokens = n_;
    q.n_kv_heads = kHeads;
    q.group = kGroup;
    q.head_dim = dim();
    q.in = in.data();
    q.token_stride = size_t(kHeads) * kGroup * dim();
    q.head_stride = dim();
    q.codec = batch.key_codec;
    q.out = expected.data();
    Device::done(transform_rows(device_, q, nullptr));
    q.out = out.data();
    prompt.queries = q;
    if (c_.restored) {
      prompt.queries.n_streams = 0;
      prompt.is_restored[0] = prompt.is_restored[1] = true;
      out = expected;
    }
    Device::done(prepare_prompt(device_, prompt, nullptr));
    // Another layer's, of which nobody attends to the keys.
    PromptArgs alone;
    alone.batch = batch;
    alone.batch.values = nullptr;
    alone.batch.dense = {};
    alone.queries.n_streams = 0;
    alone.staged_keys = rows.of(0, true);
    alone.staged_values = rows.of(0, false);
    Device::done(prepare_prompt(device_, alone, nullptr));
    check_rows(rows, in, out, expected);

    Vector<EncodeArgs> layers(3, layer());
    layers[0].key_cache = {};  // of the same memory, so nothing is written
    layers[0].value_cache = {};
    other_window_.resize(window_[0].size());
    layers[0].window.keys = layers[0].window.values = other_window_.data();
    layers[2].head_dim = 2 * dim();
    Vector<int64_t> leaving_cells(leaving_cells_.begin(), leaving_cells_.end());
    Vector<int32_t> leaving_slots(leaving_slots_.begin(), leaving_slots_.end());
    Vector<int> n_leaving(2);
    n_leaving[0] = int(leaving_cells.size());
    Vector<int> none(2);
    Vector<WindowBooks> books(1);
    books[0] = {};
    books[0].n_batches = 1;
    LayerWindow window;
    window.leaving_cells = leaving_cells.data();
    window.leaving_slots = leaving_slots.data();
    window.n_leaving = n_leaving.data();
    window.books = books.data();
    Vector<LayerWindow> windows(3, window);
    windows[0].n_leaving = none.data();
    LeaveArgs leave;
    leave.layers = layers.data();
    leave.windows = windows.data();
    leave.n_layers = 3;
    leave.n_kv_heads = kHeads;
    leave.n_tokens = n_;
    leave.staged = rows;
    const std::vector<uint16_t> before[2] = {{window_[0].begin(), window_[0].end()},
                                             {window_[1].begin(), window_[1].end()}};
    Device::done(code_leaving(device_, leave, dim(), nullptr));
    check_codes(before);
    leave.n_layers = 2;
    Device::done(place_staged(device_, leave, nullptr));
    check_window(before);
    return wrong_;
  }

private:
  int dim() const { return c_.head_dim; }
  size_t side() const { return size_t(n_) * kHeads * dim(); }
  void expect(bool good, const char* what, int number) {
    if (!good && wrong_.size() < 500) wrong_ += std::string(what) + " " + std::to_string(number) + "; ";
  }

  EncodeArgs layer() {
    EncodeArgs a;
    a.n_kv_heads = kHeads;
    a.head_dim = dim();
    a.cells_per_stream = kCells;
    a.key_codec = tables_[0].view();
    a.value_codec = tables_[1].view();
    for (int kind = 0; kind < 2; kind++) {
      const size_t block = codecs_[kind][0].format.block_bytes(), head = block * kCells / kBlockCells;
      CacheView& view = kind == 0 ? a.key_cache : a.value_cache;
      view.data = cache_[kind].data();
      view.stream_stride = head * kHeads;
      view.head_stride = head;
      view.block_stride = block;
    }
    a.window = {window_[0].data(), window_[1].data(), nullptr, kCapacity};
    return a;
  }

  /// A row of the batch, as the cache keeps it.
  std::vector<float> token(int kind, int i, int head) const {
    const float* from = &rows_[kind][(size_t(i) * kHeads + head) * dim()];
    std::vector<float> x(from, from + dim());
    for (float& v : x) v = half_to_float(float_to_half(v));
    return x;
  }
  static std::vector<float> floats(const uint16_t* from, int n) {
    std::vector<float> x;
    for (int d = 0; d < n; d++) x.push_back(half_to_float(from[d]));
    return x;
  }

  void check_dense(int kind, int head, int cell, const std::vector<float>& x, int number) {
    std::vector<float> y(dim());
    codecs_[kind][head].transform.forward(x.data(), y.data());
    if (c_.restored) y = x;
    const uint16_t* got = &dense_[kind][(size_t(head) * kDenseCells + cell) * dim()];
    for (int d = 0; d < dim(); d++) {
      const float error = std::abs(half_to_float(got[d]) - y[d]);
      expect(c_.dense ? error < 2e-3f * (1 + std::abs(y[d])) : got[d] == float_to_half(y[d]), "dense row", number);
    }
  }

  void check_rows(const StagedRows& rows, const Vector<float>& in, const Vector<float>& out,
                  const Vector<float>& expected) {
    for (int kind = 0; kind < 2; kind++) {
      for (int head = 0; head < kHeads; head++) {
        std::vector<bool> is_row(kDenseCells);
        for (int i = 0; i < n_; i++) {
          if (cells_[i] < 0) continue;
          const std::vector<float> x = token(kind, i, head);
          for (int layer = kind; layer < 2; layer++) {
            const uint16_t* kept = rows.of(layer, kind == 0) + (size_t(head) * n_ + i) * dim();
            expect(floats(kept, dim()) == x, "kept row", i);
          }
          if (cells_[i] / kCells != 1 || cells_[i] % kCells >= kDenseCells) continue;
          is_row[cells_[i] % kCells] = true;
          check_dense(kind, head, int(cells_[i] % kCells), x, i);
        }
        for (int row = 0; row < kCapacity; row += 2) {
          const int cell = window_cells_[kCapacity + row];
          is_row[cell] = true;
          const uint16_t* from = &window_[kind][((size_t(kHeads) + head) * kCapacity + row) * dim()];
          check_dense(kind, head, cell, floats(from, dim()), 1000 + row);
        }
        for (int cell = 0; cell < kDenseCells; cell++) {
          const bool written = dense_[kind][(size_t(head) * kDenseCells + cell) * dim()] != 0x7e00;
          expect(written == is_row[cell], "rows written", cell);
        }
      }
    }
    for (size_t i = 0; i < in.size(); i++) {
      expect(std::abs(out[i] - expected[i]) <= 1e-5f * (1 + std::abs(expected[i])), "query", int(i));
    }
  }

  std::vector<uint8_t> coded(int kind, int64_t cell, int head) const {
    const Format& format = codecs_[kind][head].format;
    const size_t block = format.block_bytes();
    const int stream = int(cell) / kCells, in_stream = int(cell) % kCells;
    const size_t at = (size_t(stream) * kHeads + head) * kCells / kBlockCells + in_stream / kBlockCells;
    std::vector<uint8_t> cpu(block), got(format.vector_bytes());
    block_from_cuda(format, Kind(kind), &cache_[kind][at * block], cpu.data(), c_.tiles);
    copy_cell_out(format, Kind(kind), cpu.data(), in_stream % kBlockCells, got.data());
    return got;
  }
  std::vector<uint8_t> encoded(int kind, int head, const std::vector<float>& x) const {
    const HeadCodec& codec = codecs_[kind][head];
    std::vector<float> y(dim());
    codec.transform.forward(x.data(), y.data());
    std::vector<uint8_t> row(codec.format.vector_bytes());
    const uint16_t scale = encode_vector(codec, y.data(), row.data());
    std::memcpy(&row[codec.format.n_subspaces()], &scale, 2);
    return row;
  }

  void check_codes(const std::vector<uint16_t> (&before)[2]) {
    for (int kind = 0; kind < 2; kind++) {
      expect(std::equal(before[kind].begin(), before[kind].end(), window_[kind].begin()), "window before", kind);
      for (int head = 0; head < kHeads; head++) {
        for (int i = 0; i < n_; i++) {
          if (cells_[i] < 0) continue;
          const std::vector<uint8_t> got = coded(kind, cells_[i], head);
          const std::vector<uint8_t> none(got.size());
          expect(got == (slots_[i] >= 0 ? none : encoded(kind, head, token(kind, i, head))), "code of token", i);
        }
        for (size_t i = 0; i < leaving_cells_.size(); i++) {
          const size_t at =
              ((size_t(leaving_cells_[i] / kCells) * kHeads + head) * kCapacity + leaving_slots_[i]) * dim();
          expect(coded(kind, leaving_cells_[i], head) == encoded(kind, head, floats(&before[kind][at], dim())),
                 "code of row", int(i));
        }
      }
    }
  }

  void check_window(const std::vector<uint16_t> (&before)[2]) {
    for (int kind = 0; kind < 2; kind++) {
      std::vector<uint16_t> expected = before[kind];
      for (int i = 0; i < n_; i++) {
        for (int head = 0; head < kHeads && cells_[i] >= 0 && slots_[i] >= 0; head++) {
          const std::vector<float> x = token(kind, i, head);
          const size_t at = ((size_t(cells_[i] / kCells) * kHeads + head) * kCapacity + slots_[i]) * dim();
          std::transform(x.begin(), x.end(), expected.begin() + at, float_to_half);
        }
      }
      expect(std::equal(expected.begin(), expected.end(), window_[kind].begin()), "window's rows", kind);
    }
  }

  DeviceInfo device_;
  PromptCase c_;
  int n_;
  Random random_;
  std::vector<HeadCodec> codecs_[2];  // by Kind, as all of these
  std::vector<typename Device::Tables> tables_;
  Vector<uint8_t> cache_[2];
  Vector<uint16_t> window_[2], dense_[2], other_window_;
  Vector<float> rows_[2];
  Vector<int64_t> cells_;
  Vector<int32_t> slots_, window_cells_;
  std::vector<int64_t> leaving_cells_;
  std::vector<int32_t> leaving_slots_;
  std::string wrong_;
};

}  // namespace thimble::cuda
