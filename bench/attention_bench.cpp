// Times attention of one decode step over one layer: from codes, and by ggml's FLASH_ATTN_EXT over f16, q8_0 and q4_0
// caches, in one process. Benchmarks are named <cache>/<head size>x<group>/<cells>/<threads>. 576 is MLA: a latent row,
// whose first 512 numbers are the value; the other 64 have more bits (make_position_format).
//
//   attention_bench --benchmark_enable_random_interleaving=true --benchmark_repetitions=9
//       --benchmark_report_aggregates_only=true --benchmark_filter='128x4/32768'
//
// Each step reads the cache of the same layer and nothing else, so a short context stays in the processor's caches, for
// all benchmarks alike.
#include <benchmark/benchmark.h>
#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml.h>

#include "random_layer.h"

namespace {

using namespace thimble;

// -- ggml --

class Ggml {
public:
  Ggml(const Shape& s, ggml_type type, int n_threads)
      : backend_(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr)) {
    ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend_));
    const auto set_n_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(registry, "ggml_backend_set_n_threads"));
    set_n_threads(backend_, n_threads);
    context_ = ggml_init({ggml_tensor_overhead() * 16 + ggml_graph_overhead(), nullptr, true});
    // The cache as llama.cpp allocates it, [cells][KV heads * head size], and the views that its attention reads.
    ggml_tensor* k = ggml_new_tensor_2d(context_, type, int64_t(s.head_dim) * s.n_kv_heads, s.n_cells);
    // Of a latent row, values are a view of the keys.
    ggml_tensor* v =
        s.latent > 0 ? k : ggml_new_tensor_2d(context_, type, int64_t(s.head_dim) * s.n_kv_heads, s.n_cells);
    const auto view = [&](ggml_tensor* t, int dim) {
      return ggml_view_3d(context_, t, dim, s.n_cells, s.n_kv_heads, t->nb[1], ggml_row_size(type, s.head_dim), 0);
    };
    ggml_tensor* q = ggml_new_tensor_3d(context_, GGML_TYPE_F32, s.head_dim, s.n_tokens, s.n_heads());
    ggml_tensor* mask = ggml_new_tensor_2d(context_, GGML_TYPE_F16, s.n_cells, s.n_tokens);
    ggml_tensor* out = ggml_flash_attn_ext(context_, q, view(k, s.head_dim), view(v, s.value_dim()), mask,
                                           1 / std::sqrt(float(s.head_dim)), 0.0f, 0.0f);
    ggml_flash_attn_ext_set_prec(out, GGML_PREC_F32);
    graph_ = ggml_new_graph(context_);
    ggml_build_forward_expand(graph_, out);
    buffer_ = ggml_backend_alloc_ctx_tensors(context_, backend_);
    std::vector<float> row(size_t(s.head_dim) * s.n_kv_heads);
    std::vector<uint8_t> packed(ggml_row_size(type, int64_t(row.size())));
    for (ggml_tensor* t : {k, v}) {
      for (int64_t i = 0; i < s.n_cells; i++) {
        for (size_t d = 0; d < row.size(); d++) row[d] = noise()[(i * 977 + d) % noise().size()];
        ggml_quantize_chunk(type, row.data(), packed.data(), 0, 1, int64_t(row.size()), nullptr);
        ggml_backend_tensor_set(t, packed.data(), i * packed.size(), packed.size());
      }
    }
    const auto queries = gaussian(size_t(s.n_heads()) * s.n_tokens * s.head_dim, 2);
    ggml_backend_tensor_set(q, queries.data(), 0, queries.size() * sizeof(float));
    std::vector<uint16_t> mask_data(size_t(s.n_cells) * s.n_tokens);
    for (int t = 0; t < s.n_tokens; t++) {
      for (int64_t i = s.n_cells - s.n_tokens + t + 1; i < s.n_cells; i++) mask_data[t * s.n_cells + i] = 0xfc00;
    }
    ggml_backend_tensor_set(mask, mask_data.data(), 0, mask_data.size() * 2);
  }
  ~Ggml() {
    ggml_backend_buffer_free(buffer_);
    ggml_free(context_);
    ggml_backend_free(backend_);
  }
  void step() { ggml_backend_graph_compute(backend_, graph_); }

private:
  ggml_backend_t backend_;
  ggml_context* context_;
  ggml_cgraph* graph_;
  ggml_backend_buffer_t buffer_;
};

// Caches are large, so only one of each kind lives at a time; it is made anew when a benchmark asks for another.
template <typename Make>
void add(const std::string& name, const Shape& s, double bytes_per_cell, Make make) {
  benchmark::RegisterBenchmark(name.c_str(),
                               [=](benchmark::State& state) {
                                 auto attention = make();
                                 attention->step();
                                 for (auto _ : state) attention->step();
                                 state.counters["ns/cell"] = benchmark::Counter(
                                     double(s.n_cells) * s.n_kv_heads * s.n_tokens * 1e-9,
                                     benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
                                 state.counters["GB/s"] =
                                     benchmark::Counter(bytes_per_cell * double(s.n_cells) * s.n_kv_heads * 1e-9,
                                                        benchmark::Counter::kIsIterationInvariantRate);
                               })
      ->UseRealTime()
      ->ComputeStatistics("min", [](const std::vector<double>& v) { return *std::min_element(v.begin(), v.end()); })
      ->Unit(benchmark::kMicrosecond);
}

void add_all(const Shape& s, int n_threads) {
  const std::string suffix = "/" + std::to_string(s.head_dim) + "x" + std::to_string(s.group) + "/" +
                             (s.n_tokens > 1 ? "prefill" + std::to_string(s.n_tokens) + "/" : "") +
                             std::to_string(s.n_cells) + "/" + std::to_string(n_threads);
  for (const Kernels* kernels : available_kernels()) {
    if (kernels->name == std::string("scalar") && s.n_cells > 8192) continue;
    for (double bits : {1.0, 2.0, 3.0, 4.0, 16.0}) {
      char rate[16];
      std::snprintf(rate, sizeof(rate), "%g", bits);
      const double bytes =
          format_of(Kind::key, s, bits).vector_bytes() + format_of(Kind::value, s, bits).vector_bytes();
      add(std::string(kernels->name) + "_" + rate + "bit" + suffix, s, bytes,
          [=] { return std::make_unique<Ours>(s, bits, n_threads, *kernels); });
    }
    if (s.n_tokens == 1 && s.latent == 0) {
      add(std::string(kernels->name) + "_2+64" + suffix, s, 2 * make_format(s.head_dim, 2).vector_bytes(),
          [=] { return std::make_unique<Ours>(s, 2, n_threads, *kernels, 64); });
    }
  }
  for (ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
    const double rows = s.latent > 0 ? 1 : 2;
    add(std::string("ggml_") + ggml_type_name(type) + suffix, s, rows * double(ggml_row_size(type, s.head_dim)),
        [=] { return std::make_unique<Ggml>(s, type, n_threads); });
  }
}

// Times encoding one token of a layer: K and V of four heads, by the uncalibrated transform or a dense one.
void add_encoding(int head_dim, double bits, bool dense, const Kernels& kernels) {
  const std::string name = std::string("encode_") + kernels.name + (dense ? "_dense" : "_hadamard") + "/" +
                           std::to_string(head_dim) + "/" + std::to_string(int(bits));
  benchmark::RegisterBenchmark(name.c_str(), [=, &kernels](benchmark::State& state) {
    HeadCodec codec = make_uncalibrated_codec(Kind::key, make_format(head_dim, bits));
    if (dense) {
      std::vector<float> matrix = gaussian(size_t(head_dim) * head_dim, 3);
      codec.transform = Transform::dense(std::vector<float>(head_dim, 0.5f), std::move(matrix));
    }
    const auto x = gaussian(head_dim, 4);
    std::vector<float> y(head_dim);
    std::vector<uint8_t> codes(head_dim);
    for (auto _ : state) {
      for (int i = 0; i < 2 * 4; i++) {
        codec.transform.forward(x.data(), y.data(), 1, kernels.transform);
        benchmark::DoNotOptimize(kernels.encode(codec, y.data(), codes.data()));
      }
    }
  })->Unit(benchmark::kMicrosecond);
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  // The shapes of SmolLM2-135M, Llama-3.1-8B, Qwen3-30B-A3B, Gemma 3, Qwen3.5 with 12 heads to a KV head, two of Gemma
  // 4's global layers, Phi-3, StableLM, and MLA as DeepSeek 2 Lite and DeepSeek 3 have it.
  for (Shape s : {Shape{64, 3, 3},
                  {128, 4, 8},
                  {128, 8, 4},
                  {256, 8, 2},
                  {256, 12, 2},
                  {512, 4, 2},
                  {512, 8, 2},
                  {96, 1, 32},
                  {80, 1, 32},
                  {576, 16, 1, 0, 1, 512},
                  {576, 128, 1, 0, 1, 512}}) {
    for (int threads : {1, 2, 8}) {
      if (unsigned(threads) > std::thread::hardware_concurrency()) continue;
      for (int64_t cells : {1024, 8192, 32768, 131072}) {
        s.n_cells = cells;
        s.n_tokens = 1;
        add_all(s, threads);
      }
      s.n_cells = 4608;
      s.n_tokens = 512;
      add_all(s, threads);
    }
  }
  for (const Kernels* kernels : available_kernels()) {
    for (int dim : {64, 128}) {
      for (double bits : {1.0, 2.0, 4.0}) {
        for (bool dense : {false, true}) add_encoding(dim, bits, dense, *kernels);
      }
    }
  }
  benchmark::RunSpecifiedBenchmarks();
}
