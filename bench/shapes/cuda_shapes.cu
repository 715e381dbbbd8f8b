// Times attention of one decode step over one layer by shape, on a device: from codes of 2 bits, the same as on a card
// of compute capability 8.6 (99 KiB of shared memory a thread block) and 7.5 (64 KiB), and ggml-cuda's FLASH_ATTN_EXT
// over f16 and q8_0, in one process. Where there are no kernels over codes, the time is that of decoding all cells to
// f16 and of ggml's attention over these. Medians over graphs of 24 steps, whose caches take turns.
//
// It links libggml, which bench/gpu.sh's kernels do not have. With a build for CUDA (-DTHIMBLE_CUDA=ON) in $b and
// llama.cpp's libraries with ggml-cuda in $l:
//   nvcc -std=c++20 -O3 -arch=sm_90a -I. -Isrc -I<llama.cpp>/ggml/include bench/shapes/cuda_shapes.cu -o cuda_shapes
//     $b/src/cuda/libthimble_cuda{,_state,_layout}.a $b/src/{cache,store,kernels,codec}/*.a -L$l -lggml -lggml-base
#include <cuda_runtime.h>
#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "bench/device_timer.h"
#include "cuda/attend/attend.h"
#include "cuda/host/cache.h"
#include "cuda/rows/rows.h"

using namespace thimble;
using namespace thimble::cuda;
using namespace thimble::bench;

namespace {

constexpr int kCells = 32768, kBuffers = 3, kSteps = 24, kRounds = 11;

struct Shape {
  const char* name;
  int keys, values, group, n_kv_heads;
  bool latent = false;  // the values are the first numbers of the row, and `keys` those behind them
  int n_heads() const { return group * n_kv_heads; }
};
constexpr Shape kShapes[] = {
    {"64x3", 64, 64, 3, 3},           {"128x4", 128, 128, 4, 8},         {"128x8", 128, 128, 8, 4},
    {"256x8", 256, 256, 8, 2},        {"256x12", 256, 256, 12, 2},       {"512x4", 512, 512, 4, 2},
    {"512x8", 512, 512, 8, 2},        {"96x1", 96, 96, 1, 32},           {"80x1", 80, 80, 1, 32},
    {"576x16", 64, 512, 16, 1, true}, {"576x128", 64, 512, 128, 1, true}};

// -- ours --

std::vector<uint8_t> random_blocks(const Format& format, int n_heads) {
  std::minstd_rand random(1);
  const size_t block = format.block_bytes();
  std::vector<uint8_t> bytes(block * (kCells / kBlockCells) * n_heads);
  for (uint8_t& b : bytes) b = uint8_t(random() >> 8);
  set_scales(bytes, block);
  return bytes;
}

double attend_to_codes(const DeviceInfo& device, const Shape& shape, const Format& format, AttendBy by) {
  DeviceTables tables[2];
  CacheView caches[2][kBuffers];
  AttendArgs a;
  std::mt19937 engine(2);
  std::vector<float> queries(size_t(shape.n_heads()) * shape.keys);
  for (float& q : queries) q = std::normal_distribution<float>()(engine);
  a.n_kv_heads = shape.n_kv_heads;
  a.group = shape.group;
  a.head_dim = shape.keys;
  a.n_cells = kCells;
  a.queries = copied(queries);
  a.query_head_stride = shape.keys;
  a.query_token_stride = a.query_stream_stride = queries.size();
  a.scale = 1 / std::sqrt(float(shape.keys));
  a.mask = allocate<uint16_t>(kCells);
  a.output = allocate<float>(queries.size());
  for (Kind kind : {Kind::key, Kind::value}) {
    const std::vector<HeadCodec> codecs(shape.n_kv_heads, make_uncalibrated_codec(kind, format));
    require(tables[int(kind)].upload(pack_tables(codecs, by == AttendBy::tiles)));
    const std::vector<uint8_t> bytes = random_blocks(format, shape.n_kv_heads);
    const size_t head = bytes.size() / shape.n_kv_heads;
    for (CacheView& view : caches[int(kind)]) view = {copied(bytes), bytes.size(), head, format.block_bytes()};
  }
  a.key_codec = tables[0].view();
  a.value_codec = tables[1].view();
  const size_t workspace_bytes = attend_workspace_bytes(device, a);
  void* workspace = allocate<char>(workspace_bytes);
  const auto step = [&](int i, cudaStream_t s) {
    AttendArgs x = a;
    x.keys = caches[0][i % kBuffers];
    x.values = caches[1][i % kBuffers];
    require(attend(device, x, workspace, workspace_bytes, s));
  };
  return time_steps(kSteps, step).median;
}

double decode_rows(const DeviceInfo& device, const Shape& shape, const Format formats[2]) {
  const CacheShape cache{shape.n_kv_heads, kCells, 1};
  const WindowSize window{0, 0, 0};
  const int capacity = DeviceWindow::rows_of_stream(window, kCells, 1);
  std::vector<HeadCodec> codecs[2];
  uint8_t* memory[2];
  for (Kind kind : {Kind::key, Kind::value}) {
    const Format& format = formats[int(kind)];
    codecs[int(kind)].assign(shape.n_kv_heads, make_uncalibrated_codec(kind, format));
    memory[int(kind)] = allocate<uint8_t>(DeviceLayer::side_bytes(kind, cache, format, capacity, true));
  }
  DeviceLayer layer;
  require(layer.init(cache, codecs[0], codecs[1], window, capacity, memory, true, AttendBy::nothing));
  ReadRowsArgs reads[2];
  for (Kind kind : {Kind::key, Kind::value}) {
    const std::vector<uint8_t> bytes = random_blocks(formats[int(kind)], shape.n_kv_heads);
    require(cudaMemcpy(memory[int(kind)], bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
    ReadRowsArgs& r = reads[int(kind)];
    r.side = side_of(layer.encode_args(), kind);
    r.n_cells = kCells;
    r.exact = allocate<int32_t>(kCells);
    r.out = allocate<uint16_t>(size_t(kCells) * shape.n_kv_heads * formats[int(kind)].head_dim);
  }
  const auto step = [&](int, cudaStream_t s) {
    for (const ReadRowsArgs& r : reads) require(read_rows(device, r, s));
  };
  return time_steps(kSteps, step).median;
}

/// "31.2 (tables)". `f16_us`: of ggml's attention over f16.
std::string ours(const DeviceInfo& device, const Shape& shape, double f16_us) {
  const Format values = make_format(shape.values, 2);
  const Format formats[2] = {shape.latent ? make_position_format(shape.keys, values, 162) : make_format(shape.keys, 2),
                             values};
  const AttendBy by = attend_by(device, formats[0], formats[1], false);
  const bool from_codes = by != AttendBy::nothing && shape.group <= kMaxGroup;
  const double us = from_codes ? attend_to_codes(device, shape, values, by) : decode_rows(device, shape, formats);
  char text[64];
  if (from_codes) {
    std::snprintf(text, sizeof(text), "%.1f (%s)", us, by == AttendBy::tables ? "tables" : "tiles");
  } else {
    std::snprintf(text, sizeof(text), "%.1f (decoding %.1f)", us + f16_us, us);
  }
  return text;
}

// -- ggml --

double ggml(ggml_backend_t backend, const Shape& shape, ggml_type type) {
  const int64_t keys = shape.latent ? shape.keys + shape.values : shape.keys;
  ggml_context* context =
      ggml_init({ggml_tensor_overhead() * (kSteps * 8 + 16) + ggml_graph_overhead(), nullptr, true});
  ggml_tensor* q = ggml_new_tensor_3d(context, GGML_TYPE_F32, keys, 1, shape.n_heads());
  ggml_tensor* mask = ggml_new_tensor_2d(context, GGML_TYPE_F16, kCells, 1);
  ggml_cgraph* graph = ggml_new_graph(context);
  ggml_tensor* caches[kBuffers][2];
  const auto view = [&](ggml_tensor* t, int64_t dim) {
    return ggml_view_3d(context, t, dim, kCells, shape.n_kv_heads, t->nb[1],
                        ggml_row_size(type, t->ne[0] / shape.n_kv_heads), 0);
  };
  for (auto& cache : caches) {
    cache[0] = ggml_new_tensor_2d(context, type, keys * shape.n_kv_heads, kCells);
    cache[1] =
        shape.latent ? cache[0] : ggml_new_tensor_2d(context, type, int64_t(shape.values) * shape.n_kv_heads, kCells);
  }
  ggml_tensor* out = nullptr;
  for (int i = 0; i < kSteps; i++) {
    ggml_tensor* const* cache = caches[i % kBuffers];
    out = ggml_flash_attn_ext(context, q, view(cache[0], keys), view(cache[1], shape.values), mask,
                              1 / std::sqrt(float(keys)), 0.0f, 0.0f);
    ggml_prec_set_acc(out, GGML_PREC_F32);
    ggml_build_forward_expand(graph, out);
  }
  if (!ggml_backend_supports_op(backend, out)) {
    ggml_free(context);
    return NAN;
  }
  ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(context, backend);
  require(buffer != nullptr, "no memory for ggml's caches");
  ggml_backend_buffer_clear(buffer, 0);
  std::vector<double> times;
  for (int i = 0; i < kRounds + 2; i++) {
    const auto begin = std::chrono::steady_clock::now();
    require(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS, "ggml failed");
    ggml_backend_synchronize(backend);
    const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - begin;
    if (i > 1) times.push_back(time.count() / kSteps);
  }
  ggml_backend_buffer_free(buffer);
  ggml_free(context);
  return times_of(times).median;
}

}  // namespace

int main() {
  DeviceInfo device;
  require(query_device(0, &device));
  DeviceInfo ampere = device, turing = device;
  ampere.capability = 86;
  ampere.shared_bytes = size_t(99) << 10;
  turing.capability = 75;
  turing.shared_bytes = size_t(64) << 10;
  ggml_backend_load_all();
  ggml_backend_t backend = ggml_backend_init_by_name("CUDA0", nullptr);
  require(backend != nullptr, "ggml has no CUDA0");
  std::printf("us of a step over %d cells, 2 bits\n\n| shape | this card | 99 KiB | 64 KiB | ggml f16 | ggml q8_0 |\n",
              kCells);
  std::printf("| --- | --- | --- | --- | --- | --- |\n");
  for (const Shape& shape : kShapes) {
    const double peers[2] = {ggml(backend, shape, GGML_TYPE_F16), ggml(backend, shape, GGML_TYPE_Q8_0)};
    std::printf("| %s |", shape.name);
    for (const DeviceInfo& card : {device, ampere, turing}) std::printf(" %s |", ours(card, shape, peers[0]).c_str());
    for (const double us : peers) {
      if (std::isnan(us)) {
        std::printf(" none |");
      } else {
        std::printf(" %.1f |", us);
      }
    }
    std::printf("\n");
    std::fflush(stdout);
  }
  ggml_backend_free(backend);
}
