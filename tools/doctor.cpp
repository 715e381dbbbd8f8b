// `thimble doctor`: what is here and what it would do.
#include <ggml-backend.h>
#include <gguf.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <sstream>
#include <string>

#include "commands.h"
#include "engine/settings.h"
#include "kernels/kernels.h"
#include "model.h"
#include "paths.h"
#include "plan.h"
#include "profile/profile.h"
#include "service_line.h"

namespace thimble {
namespace {

// A model's shape, from its file's metadata alone: nothing is loaded.
class Metadata {
public:
  explicit Metadata(const std::string& path) : gguf_(gguf_init_from_file(path.c_str(), {true, nullptr}), gguf_free) {
    if (!gguf_) throw std::runtime_error(path + " is no GGUF file");
    const int64_t key = gguf_find_key(gguf_.get(), "general.architecture");
    if (key < 0 || gguf_get_kv_type(gguf_.get(), key) != GGUF_TYPE_STRING) {
      throw std::runtime_error(path + " names no architecture: it is no model");
    }
    architecture_ = gguf_get_val_str(gguf_.get(), key);
  }
  /// A number that all layers share or, where it is an array, that of one layer.
  int number(const std::string& name, int layer, int fallback) const {
    const int64_t key = gguf_find_key(gguf_.get(), (architecture_ + "." + name).c_str());
    if (key < 0) return fallback;
    if (gguf_get_kv_type(gguf_.get(), key) == GGUF_TYPE_UINT32) return int(gguf_get_val_u32(gguf_.get(), key));
    if (gguf_get_kv_type(gguf_.get(), key) == GGUF_TYPE_ARRAY && size_t(layer) < gguf_get_arr_n(gguf_.get(), key) &&
        (gguf_get_arr_type(gguf_.get(), key) == GGUF_TYPE_UINT32 ||
         gguf_get_arr_type(gguf_.get(), key) == GGUF_TYPE_INT32)) {
      return static_cast<const int32_t*>(gguf_get_arr_data(gguf_.get(), key))[layer];
    }
    return fallback;
  }

private:
  std::unique_ptr<gguf_context, void (*)(gguf_context*)> gguf_;
  std::string architecture_;
};

ModelShape shape_of(const Metadata& model) {
  ModelShape shape;
  const int n_layers = model.number("block_count", 0, 0), width = model.number("embedding_length", 0, 0);
  for (int layer = 0; layer < n_layers; layer++) {
    const int n_heads = std::max(1, model.number("attention.head_count", layer, 1));
    shape.layers.push_back({model.number("attention.head_count_kv", layer, n_heads), n_heads,
                            model.number("attention.key_length", layer, width / n_heads),
                            model.number("attention.value_length", layer, width / n_heads)});
  }
  return shape;
}

void print_model(const std::string& path, const std::string& profile, int64_t n_cells) {
  const ModelShape shape = shape_of(Metadata(path));
  std::printf("model            %s, %zu layers; a cache of %lld cells, all layers of that length\n", path.c_str(),
              shape.layers.size(), static_cast<long long>(n_cells));
  for (const char* bits : {"16", "4", "2", "1"}) {
    const std::string settings = std::string("small=0,bits=") + bits + (profile.empty() ? "" : ",profile=" + profile);
    const PlanTotals totals = plan_model(Settings::parse(settings), shape, n_cells);
    std::printf("  %4s bits       %9.2f MiB\n", bits, double(totals.coded_bytes) / (1 << 20));
  }
}

/// How a rate's bits are spent: on average for keys and for values, and layer by layer.
void print_allotment(const Profile& profile, double bits) {
  double sums[2] = {};
  int n_layers = 0;
  std::ostringstream lists[2];
  for (size_t il = 0; il < profile.shape.layers.size(); il++) {
    if (profile.shape.layers[il].n_kv_heads == 0) continue;
    for (Kind kind : {Kind::key, Kind::value}) {
      const double of_layer = profile.format(int(il), kind, bits).bits();
      sums[int(kind)] += of_layer;
      lists[int(kind)] << " " << of_layer;
    }
    n_layers++;
  }
  for (Kind kind : {Kind::key, Kind::value}) {
    std::printf("  bits=%-5g      %s %.2f on average; by layer%s\n", bits, kind == Kind::key ? "keys  " : "values",
                n_layers ? sums[int(kind)] / n_layers : 0, lists[int(kind)].str().c_str());
  }
}

void print_profile(const std::string& path) {
  const Profile profile = read_profile(path);
  std::printf("profile          %s\n                 %s transform, architecture %s, %zu layers\n", path.c_str(),
              profile.transform.c_str(), profile.shape.architecture.c_str(), profile.shape.layers.size());
  std::printf("                 from %s\n", profile.source.c_str());
  for (double bits : profile.bits) print_allotment(profile, bits);
  int friendly = 0;
  for (size_t il = 0; il < profile.density.size(); il++) friendly += profile.quantization_friendly(int(il));
  std::printf("                 %d layers attend broadly (quantization-friendly), %zu to few cells\n", friendly,
              profile.density.size() - friendly);
}

}  // namespace

void add_doctor_command(CLI::App& app) {
  static std::string model, profile, llama;
  static int64_t n_cells = 131072;
  CLI::App* command = app.add_subcommand("doctor", "Say what was found: llama.cpp, devices, kernels, a model's bytes");
  command->add_option("-m,--model", model, "Model whose cache to size");
  command->add_option("-c,--ctx-size", n_cells, "Cells of that cache")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 30));
  command->add_option("--profile", profile, "Profile to describe (default: <model>.thimble.gguf beside the model)");
  command->add_option("--llama", llama, "llama-server to check the service line with, as in thimble serve");
  command->callback([] {
    start_llama();
    std::printf("ggml             %s\n", ggml_version());
    std::printf("plugin           %s\n", plugin_path().c_str());
    if (!ggml_backend_reg_by_name("THIMBLE") && !ggml_backend_load(plugin_path().c_str())) {
      throw std::runtime_error("the plugin does not load: see the line above");
    }
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
      ggml_backend_dev_t device = ggml_backend_dev_get(i);
      std::printf("device           %s: %s\n", ggml_backend_dev_name(device), ggml_backend_dev_description(device));
    }
    std::string names;
    for (const Kernels* k : available_kernels()) names += std::string(names.empty() ? "" : ", ") + k->name;
    std::printf("kernels          %s (of %s)\n", kernels().name, names.c_str());
    std::printf("THIMBLE_KV       %s\n", Settings::from_environment().to_string().c_str());
    if (profile.empty()) profile = profile_beside(model);
    if (!model.empty()) print_model(model, profile, n_cells);
    if (!profile.empty()) print_profile(profile);
    print_service_line(profile, llama);
  });
}

}  // namespace thimble
