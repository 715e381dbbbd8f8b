// `thimble doctor`: prints which parts were found and how they would keep a model's cache.
#include <ggml-backend.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <sstream>
#include <string>

#include "commands.h"
#include "context_options.h"
#include "engine/settings.h"
#include "kernels/kernels.h"
#include "launch_settings.h"
#include "layout.h"
#include "model.h"
#include "calibrate/model_file.h"
#include "paths.h"
#include "profile/profile.h"
#include "service_line.h"

namespace thimble {
namespace {

/// The settings of `thimble run --kv BITS`.
Settings settings_of_bits(const std::string& bits, const std::string& profile) {
  LaunchFlags flags;
  flags.kv = bits;
  const char* environment = std::getenv("THIMBLE_KV");
  LaunchSettings settings = merge_settings(flags, environment ? environment : "");
  if (!settings.has("profile") && !profile.empty()) settings.text += ",profile=" + profile;
  return Settings::parse(settings.text);
}

void print_plan(const PlanTotals& totals) {
  std::printf("%s: %d layers coded, %s", mebibytes(totals.coded_bytes + totals.f16_bytes).c_str(), totals.n_coded,
              mebibytes(totals.coded_bytes).c_str());
  if (totals.n_f16 > 0) {
    std::printf("; %d stay f16, %s: %s", totals.n_f16, mebibytes(totals.f16_bytes).c_str(), totals.why_f16.c_str());
  }
  if (totals.more_bytes > 0) std::printf("; up to %s more as sequences come", mebibytes(totals.more_bytes).c_str());
  if (totals.store_bytes > 0) std::printf("; exact store up to %s", mebibytes(totals.store_bytes).c_str());
  std::printf("\n");
}

/// Prints the bytes of the model's caches at each rate, in a context as llama-server makes it. Other settings than the
/// bits are those of THIMBLE_KV.
void print_model(const std::string& path, const std::string& profile, ContextShape context) {
  if (context.n_cells == 0) context.n_cells = ModelFile(path).context_length();
  if (context.n_cells == 0) throw std::runtime_error(path + " does not say its context length: give one with -c");
  const CacheLayout layout = read_layout(path, context);
  std::map<int64_t, int> plain, windows;  // layers by cells
  for (const CacheLayout::Layer& layer : layout.layers) {
    if (layer.cells_per_stream > 0) (layer.is_window ? windows : plain)[layer.cells_per_stream]++;
  }
  std::printf("model            %s, trained for %d tokens\n", path.c_str(), layout.context_length);
  std::printf("cache            of %d sequences %s:", context.n_sequences,
              context.unified ? "that share one stream" : "with a stream each");
  const char* separator = "";
  for (const auto& [layers, what] : {std::pair{&plain, ""}, std::pair{&windows, " of a sliding window"}}) {
    for (const auto& [cells, n] : *layers) {
      std::printf("%s %d layers of %lld cells%s", separator, n, static_cast<long long>(cells), what);
      separator = ",";
    }
  }
  std::printf("\n");
  std::printf("  f16            %s\n",
              mebibytes(plan_totals(Settings::parse("bits=16,small=0"), layout).coded_f16_bytes).c_str());
  for (const char* bits : {"4", "2", "1"}) {
    std::printf("  %s bits         ", bits);
    try {
      print_plan(plan_totals(settings_of_bits(bits, profile), layout));
    } catch (const std::exception& error) {
      std::printf("cannot be: %s\n", error.what());
    }
  }
}

/// Prints how a rate's bits are spent: on average for keys and for values, and layer by layer.
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
  static ContextShape context;
  context.n_cells = 0;
  CLI::App* command = app.add_subcommand("doctor", "Say what was found: llama.cpp, devices, kernels, a model's bytes");
  command->add_option("-m,--model", model, "Model whose cache to size");
  command->add_option("-c,--ctx-size", context.n_cells, "Cells of a sequence (default: what the model was trained for)")
      ->check(CLI::Range(1, 1 << 30));
  add_context_options(*command, context);
  command->add_option("--profile", profile, "Profile to describe (default: <model>.thimble.gguf beside the model)");
  command->add_option("--llama", llama, "llama-server to check the service line with, as in thimble serve");
  command->callback([] {
    start_llama();
    std::printf("ggml             %s\n", ggml_version());
    std::printf("plugin           %s\n", plugin_path().c_str());
    if (!ggml_backend_reg_by_name("THIMBLE") && !ggml_backend_load(plugin_path().c_str())) {
      throw std::runtime_error("the plugin does not load: see the line above");
    }
    std::string coded;  // the plugin's devices
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
      ggml_backend_dev_t device = ggml_backend_dev_get(i);
      const std::string name = ggml_backend_dev_name(device);
      if (name.starts_with("THIMBLE")) coded += (coded.empty() ? "" : ",") + name;
      std::printf("device           %s: %s\n", ggml_backend_dev_name(device), ggml_backend_dev_description(device));
    }
    std::string names;
    for (const Kernels* k : available_kernels()) names += std::string(names.empty() ? "" : ", ") + k->name;
    std::printf("kernels          %s (of %s)\n", kernels().name, names.c_str());
    std::printf("THIMBLE_KV       %s\n", Settings::from_environment().to_string().c_str());
    if (profile.empty()) profile = profile_beside(model);
    if (!model.empty()) print_model(model, profile, context);
    if (!profile.empty()) print_profile(profile);
    print_service_line(profile, llama, coded);
  });
}

}  // namespace thimble
