// Times a layer's decode step and its parts on a device: Llama-3.1-8B's shape (32 heads, 8 KV heads, head size 128),
// one sequence. Prints medians of CUDA graph replays. --once: runs each kernel once, for profilers.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "bench/device_timer.h"
#include "cache/window.h"
#include "cuda/attend/attend.h"
#include "cuda/encode/encode.h"
#include "cuda/retrieve/retrieve.h"

using namespace thimble;
using namespace thimble::cuda;
using namespace thimble::bench;

namespace {

constexpr int kHeads = 32, kKvHeads = 8, kDim = 128, kGroup = kHeads / kKvHeads;
constexpr int kWindow = 137, kTop = 64;

bool once = false;

void time(const char* what, int n, double bytes, const std::function<void(int, cudaStream_t)>& enqueue) {
  if (once) {
    enqueue(0, nullptr);
    return require(cudaDeviceSynchronize());
  }
  const Times us = time_steps(n, enqueue);
  std::printf("| %s | %.1f | %.1f..%.1f | %.0f |\n", what, us.median, us.least, us.most, bytes / us.median / 1e3);
}

/// Attention to 131072 cells at several rates, by tables where there are any and by tiles.
void time_rates(const DeviceInfo& device) {
  constexpr int kCells = 131072, kBuffers = 3;
  std::mt19937 engine(2);
  AttendArgs a;
  a.n_kv_heads = kKvHeads;
  a.group = kGroup;
  a.head_dim = kDim;
  a.n_cells = kCells;
  std::vector<float> queries(kHeads * kDim);
  for (float& q : queries) q = std::normal_distribution<float>()(engine);
  a.queries = copied(queries);
  a.query_head_stride = kDim;
  a.query_token_stride = a.query_stream_stride = kHeads * kDim;
  a.scale = 0.088f;
  a.mask = allocate<uint16_t>(kCells);
  a.output = allocate<float>(kHeads * kDim);
  struct Rate {
    double keys, values;
    bool tiles;
  };
  for (const Rate& rate : {Rate{2, 2, false},
                           {2, 2, true},
                           {4, 4, false},
                           {4, 4, true},
                           {3, 3, true},
                           {1.5, 1.5, true},
                           {1.25, 1.25, true},
                           {3, 1.5, true},
                           {1, 1, false},
                           {1, 1, true}}) {
    DeviceTables tables[2];
    CacheView caches[2][kBuffers];
    double bytes_read = 0;
    for (Kind kind : {Kind::key, Kind::value}) {
      const Format format = make_format(kDim, kind == Kind::key ? rate.keys : rate.values);
      require(tables[int(kind)].upload(
          pack_tables(std::vector<HeadCodec>(kKvHeads, make_uncalibrated_codec(kind, format)), rate.tiles)));
      const size_t block = format.block_bytes(), head = block * (kCells / 64), cache = head * kKvHeads;
      std::vector<uint8_t> bytes(head);
      for (uint8_t& b : bytes) b = uint8_t(engine());
      set_scales(bytes, block);
      bytes.resize(cache);
      for (int h = 1; h < kKvHeads; h++) std::memcpy(&bytes[h * head], bytes.data(), head);
      for (CacheView& view : caches[int(kind)]) view = {copied(bytes), cache, head, block};
      bytes_read += double(cache);
    }
    a.key_codec = tables[0].view();
    a.value_codec = tables[1].view();
    const size_t workspace_bytes = attend_workspace_bytes(device, a);
    void* workspace = allocate<char>(workspace_bytes);
    char name[100];
    std::snprintf(name, sizeof(name), "attend 1x%d, mask, %g/%g bits by %s", kCells, rate.keys, rate.values,
                  rate.tiles ? "tiles" : "tables");
    time(name, 24, bytes_read, [&](int i, cudaStream_t s) {
      AttendArgs x = a;
      x.keys = caches[0][i % kBuffers];
      x.values = caches[1][i % kBuffers];
      require(attend(device, x, workspace, workspace_bytes, s));
    });
  }
}

}  // namespace

int main(int argc, char** argv) {
  once = argc > 1 && std::strcmp(argv[1], "--once") == 0;
  DeviceInfo device;
  require(query_device(0, &device));
  std::mt19937 engine(1);
  std::normal_distribution<float> normal;
  const auto normals = [&](size_t n) {
    std::vector<float> x(n);
    for (float& v : x) v = normal(engine);
    return copied(x);
  };
  if (!once) std::printf("| what | us | spread | GB/s |\n| --- | --- | --- | --- |\n");

  if (!once) time_rates(device);
  constexpr int kCells = 131072, kPrefill = 512, kBuffers = 3;
  for (const bool dense : {false, true}) {
    std::vector<HeadCodec> key_codecs, value_codecs;
    for (int h = 0; h < kKvHeads; h++) {
      key_codecs.push_back(make_uncalibrated_codec(Kind::key, make_format(kDim, 2)));
      value_codecs.push_back(make_uncalibrated_codec(Kind::value, make_format(kDim, 2)));
      for (HeadCodec* codec : {&key_codecs.back(), &value_codecs.back()}) {
        if (!dense) continue;
        std::vector<float> matrix(kDim * kDim), mean(kDim, 0.25f);
        for (float& v : matrix) v = normal(engine) / 12;
        for (int i = 0; i < kDim; i++) matrix[i * kDim + i] += 2;
        codec->transform = Transform::dense(mean, matrix);
        codec->derive_tables();
      }
    }
    DeviceTables key_tables, value_tables;
    require(key_tables.upload(pack_tables(key_codecs)));
    require(value_tables.upload(pack_tables(value_codecs)));
    const size_t block = key_codecs[0].format.block_bytes(), head = block * (kCells / 64), cache = head * kKvHeads;

    EncodeArgs p;
    p.n_kv_heads = kKvHeads;
    p.head_dim = kDim;
    p.n_tokens = 1;
    p.keys = normals(size_t(kPrefill) * kKvHeads * kDim);
    p.values = normals(size_t(kPrefill) * kKvHeads * kDim);
    p.key_token_stride = p.value_token_stride = kKvHeads * kDim;
    p.key_head_stride = p.value_head_stride = kDim;
    std::vector<int64_t> cells(kPrefill);
    for (int i = 0; i < kPrefill; i++) cells[i] = kCells - kPrefill + i;
    std::swap(cells.front(), cells.back());
    p.cells = copied(cells);
    p.cells_per_stream = kCells;
    p.key_codec = key_tables.view();
    p.value_codec = value_tables.view();
    p.window = {allocate<uint16_t>(kKvHeads * kWindow * kDim), allocate<uint16_t>(kKvHeads * kWindow * kDim),
                copied(std::vector<int32_t>(kPrefill, 0)), kWindow};
    AttendArgs a;
    a.n_kv_heads = kKvHeads;
    a.group = kGroup;
    a.head_dim = kDim;
    a.n_cells = kCells;
    a.key_codec = p.key_codec;
    a.value_codec = p.value_codec;
    a.queries = normals(kHeads * kDim);
    a.query_head_stride = kDim;
    a.query_token_stride = a.query_stream_stride = kHeads * kDim;
    a.scale = 0.088f;
    a.mask = allocate<uint16_t>(kCells);
    a.output = allocate<float>(kHeads * kDim);
    std::vector<int32_t> window_cells(kWindow);
    std::vector<uint32_t> hidden(kCells / 32);
    for (int i = 0; i < kWindow; i++) {
      window_cells[i] = i;
      hidden[window_cells[i] / 32] |= 1u << window_cells[i] % 32;
    }
    a.exact[0] = {p.window.keys, p.window.values, copied(window_cells), kWindow, false};
    a.hidden = copied(hidden);
    std::vector<int32_t> tokens(kWindow, -1);
    tokens[0] = 0;
    const NewRows fresh{
        p.keys,         p.values,      p.key_token_stride, p.key_head_stride, p.value_token_stride, p.value_head_stride,
        copied(tokens), p.window.keys, p.window.values};
    AttendArgs without = a;  // which may mean more splits
    without.exact[0] = {};
    const size_t workspace_bytes = std::max(attend_workspace_bytes(device, a), attend_workspace_bytes(device, without));
    void* workspace = allocate<char>(workspace_bytes);

    std::vector<CacheView> key_caches, value_caches;
    std::vector<uint8_t> bytes(cache);
    for (uint8_t& b : bytes) b = uint8_t(engine());
    set_scales(bytes, block);
    for (int i = 0; i < kBuffers; i++) {
      key_caches.push_back({copied(bytes), cache, head, block});
      value_caches.push_back({copied(bytes), cache, head, block});
    }
    const auto encode_at = [&](int i, int n_tokens) {
      EncodeArgs x = p;
      x.n_tokens = n_tokens;
      x.key_cache = key_caches[i % kBuffers];
      x.value_cache = value_caches[i % kBuffers];
      return x;
    };
    const auto attend_at = [&](int i) {
      AttendArgs x = a;
      x.keys = key_caches[i % kBuffers];
      x.values = value_caches[i % kBuffers];
      return x;
    };
    char name[100];
    const auto label = [&](const char* what) {
      std::snprintf(name, sizeof(name), "%s, %s", what, dense ? "dense" : "Hadamard");
      return name;
    };
    time(label("encode 512 tokens"), 6, 0,
         [&](int i, cudaStream_t s) { require(encode(device, encode_at(i, kPrefill), s)); });
    constexpr int kLayers = 32;
    EncodeArgs layer = p;
    layer.key_cache = key_caches[0];
    layer.value_cache = value_caches[0];
    LayerWindow window;
    window.books = copied(std::vector<WindowBooks>{{1, 0, 0, 0, 0, 0, 0, {}, 0, 0}});
    window.leaving_cells = const_cast<int64_t*>(p.cells);
    window.leaving_slots = const_cast<int32_t*>(p.window.slots);
    window.n_leaving = copied(std::vector<int>{1, 0});
    LeaveArgs leave;
    leave.layers = copied(std::vector<EncodeArgs>(kLayers, layer));
    leave.windows = copied(std::vector<LayerWindow>(kLayers, window));
    leave.n_layers = kLayers;
    leave.n_kv_heads = kKvHeads;
    leave.n_tokens = 1;
    time(label("code a cell that leaves the window, 32 layers"), 24, 0,
         [&](int, cudaStream_t s) { require(code_leaving(device, leave, kDim, s)); });

    // Tokens of one sequence: 17 cells leave with every 17th of them, judged by its queries. A round's cells are the
    // last round's, which have left by then but for the pool.
    constexpr WindowSize kSize;
    constexpr int kRows = kMaxWindowRows, kSteps = 20 * 17;
    std::vector<EncodeArgs> layers(kLayers, layer);
    std::vector<LayerWindow> windows(kLayers);
    const std::vector<int32_t> none(kRows, -1);
    for (int i = 0; i < kLayers; i++) {
      LayerWindow& w = windows[i];
      w.last = kSize.last;
      w.pool = kSize.pool;
      w.spare = kSize.spare;
      w.n_kv_heads = kKvHeads;
      w.group = kGroup;
      w.head_dim = kDim;
      w.books = allocate<WindowBooks>(1);
      w.cells = copied(none);
      w.order = allocate<uint32_t>(kRows);
      w.sequence = allocate<uint32_t>(kRows);
      w.tokens = allocate<int32_t>(kRows);
      w.judges = allocate<int32_t>(kMaxTokens);
      w.leaving_cells = allocate<int64_t>(kRows);
      w.leaving_slots = allocate<int32_t>(kRows);
      w.n_leaving = allocate<int>(2);
      w.hidden = allocate<uint32_t>(kCells / 32);
      w.token_slots = allocate<int32_t>(kMaxTokens);
      w.marks = allocate<uint32_t>(kMaxTokens);
      std::vector<uint16_t> rows(size_t(kKvHeads) * kRows * kDim);
      for (uint16_t& x : rows) x = uint16_t(0x3000 + engine() % 0x1000);
      uint16_t* keys = copied(rows);
      w.keys = keys;
      w.queries = const_cast<float*>(normals(size_t(kMaxTokens) * kHeads * kDim));
      layers[i].window = {keys, keys, nullptr, kRows};
    }
    std::vector<int64_t> step_cells(kSteps);
    for (int i = 0; i < kSteps; i++) step_cells[i] = i;
    WindowArgs update;
    update.n_layers = kLayers;
    update.layers = copied(windows);
    update.cells_per_stream = update.mask_cells = kCells;
    update.n_tokens = 1;
    update.mask = a.mask;
    update.slots = kRows - kMaxTokens;
    update.capacity = kRows;
    update.n_judges = kMaxTokens;
    update.hidden_stream_stride = kCells / 32;
    LeaveArgs step_leave = leave;
    step_leave.layers = copied(layers);
    step_leave.windows = update.layers;
    const int64_t* all_cells = copied(step_cells);
    for (const bool coded : {false, true}) {
      for (const bool judged : {false, true}) {
        for (int i = 0; i < kLayers; i++) {
          LayerWindow w = windows[i];
          if (!judged) w.queries = nullptr;
          require(cudaMemcpy(const_cast<LayerWindow*>(update.layers) + i, &w, sizeof(w), cudaMemcpyHostToDevice));
        }
        std::snprintf(name, sizeof(name), "a token in the windows of 32 layers%s%s, %s", judged ? ", judged" : "",
                      coded ? ", what leaves coded" : "", dense ? "dense" : "Hadamard");
        time(name, kSteps, 0, [&](int i, cudaStream_t s) {
          update.cells = all_cells + i;
          require(update_window(device, update, s));
          if (coded) require(code_leaving(device, step_leave, kDim, s));
        });
      }
    }
    const auto attend_short = [&](int i, int n_cells, bool window, cudaStream_t s) {
      AttendArgs x = attend_at(i);
      x.n_cells = n_cells;
      x.exact[0] = window ? a.exact[0] : ExactRows{};
      if (window) x.fresh = fresh;
      require(attend(device, x, workspace, workspace_bytes, s));
    };
    for (const int n_cells : {256, 4096, kCells}) {
      for (const bool window : {false, true}) {
        std::snprintf(name, sizeof(name), "attend 1x%d, mask%s, %s", n_cells,
                      window ? ", window of 137, one row new" : "", dense ? "dense" : "Hadamard");
        time(name, 24, n_cells == kCells ? 2.0 * double(cache) : 0,
             [&](int i, cudaStream_t s) { attend_short(i, n_cells, window, s); });
      }
    }
    const uint16_t* open = a.mask;  // nothing but the window: all other cells are masked
    a.mask = copied(std::vector<uint16_t>(kCells, 0xfc00));
    std::snprintf(name, sizeof(name), "attend 1x256, window alone, %s", dense ? "dense" : "Hadamard");
    time(name, 24, 0, [&](int i, cudaStream_t s) { attend_short(i, 256, true, s); });
    a.mask = open;
    if (dense) break;

    DecodeArgs t;
    t.n_kv_heads = kKvHeads;
    t.n_cells = 32768;
    t.codec = a.key_codec;
    t.rows = allocate<uint16_t>(size_t(kKvHeads) * t.n_cells * kDim);
    time("decode 32768 cells' keys to f16", 6, kKvHeads * 32768.0 * (kDim * 2 + 34), [&](int i, cudaStream_t s) {
      t.cache = key_caches[i % kBuffers];
      require(decode_cells(device, t, s));
    });

    uint16_t* store = nullptr;
    const size_t store_half = size_t(kKvHeads) * kCells * kDim;
    require(cudaHostAlloc(reinterpret_cast<void**>(&store), store_half * 4, cudaHostAllocMapped));
    std::memset(store, 0, store_half * 4);
    RetrieveArgs r;
    r.n_kv_heads = kKvHeads;
    r.n_cells = kCells;
    r.top = kTop;
    r.store_keys = store;
    r.store_values = store + store_half;
    r.store_cells = kCells;
    place_retrieval(allocate<char>(retrieval_bytes(r)), &r);
    const double rows = 2.0 * kKvHeads * kTop * kDim * 2;  // bytes
    time("score 131072 cells", 24, double(cache), [&](int i, cudaStream_t s) {
      require(score_cells(device, {attend_at(i), r.scores, r.block_maxima, r.all_hidden}, s));
    });
    time("choose 64 of 131072 cells for 8 heads", 24, 0,
         [&](int, cudaStream_t s) { require(choose_cells(device, r, s)); });
    time("gather 64 cells for 8 heads from pinned memory", 24, rows,
         [&](int, cudaStream_t s) { require(gather_cells(device, r, s)); });
    const size_t more_bytes = attend_workspace_bytes(device, with_retrieved(a, r, false));
    void* more = allocate<char>(more_bytes);
    time("step 1x131072 with retrieval", 24, 3.0 * cache, [&](int i, cudaStream_t s) {
      EncodeArgs x = encode_at(i, 1);
      x.store = {store, store + store_half, 0, 1, kCells};
      require(encode(device, x, s));
      require(retrieve_step(device, attend_at(i), r, false, more, more_bytes, s));
    });
  }
}
