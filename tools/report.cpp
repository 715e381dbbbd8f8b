// `thimble report`: what eval and bench measured of a model's caches as one HTML page, with words on which to take.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <fstream>
#include <stdexcept>

#include "commands.h"
#include "model.h"
#include "report/page.h"

namespace thimble {
namespace {

struct Options {
  std::vector<std::string> files;
  std::string output;
  Bounds bounds;
};

void run(const Options& options) {
  Results results;
  for (const std::string& path : options.files) {
    const auto file = nlohmann::json::parse(read_text(path), nullptr, /*allow_exceptions=*/false);
    if (file.is_discarded()) throw std::runtime_error(path + " is no JSON");
    results.add(file, path);
  }
  const Recommendation recommendation = recommend(results, options.bounds);
  for (const std::string& sentence : recommendation.words) std::printf("%s\n", sentence.c_str());
  if (options.output.empty()) return;
  std::ofstream page(options.output);
  page << write_page(results, recommendation);
  if (!page.flush()) throw std::runtime_error("cannot write " + options.output);
}

}  // namespace

void add_report_command(CLI::App& app) {
  auto* command = app.add_subcommand("report", "Say which cache to take, from what eval and bench wrote");
  auto options = std::make_shared<Options>();
  command->add_option("files", options->files, "JSON files of thimble eval --json and thimble bench --json")
      ->required();
  command->add_option("-o,--output", options->output, "Write an HTML page here, with tables and charts");
  command->add_option("--max-kld", options->bounds.kld, "Greatest mean KL divergence from f16, in nats")
      ->capture_default_str();
  command->add_option("--min-score", options->bounds.score, "Least score of every task, over f16's")
      ->capture_default_str();
  command->callback([options] { run(*options); });
}

}  // namespace thimble
