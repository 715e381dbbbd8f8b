// The flags of `eval`, `bench` and `doctor` that shape the context.
#pragma once

#include <CLI/CLI.hpp>

#include "layout.h"

namespace thimble {

/// Adds -np, --streams and --ubatch. Each command has its own flag for the number of cells.
inline void add_context_options(CLI::App& command, ContextShape& shape) {
  command
      .add_option("--parallel", shape.n_sequences,
                  "Sequences that the context is made for, as llama-server's -np")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  command.add_flag("!--streams", shape.unified,
                   "A stream for each sequence (llama-server's -no-kvu) instead of one for all");
  command.add_option("--ubatch", shape.n_ubatch, "Tokens that the model reads at once")
      ->check(CLI::Range(1, 2048))
      ->capture_default_str();
}

/// Adds --device (devices.h).
inline void add_device_option(CLI::App& command, std::string& names) {
  command
      .add_option("--device", names,
                  "ggml's devices to measure on (CPU, CUDA0, CUDA0,CUDA1), with coded caches on the plugin's devices "
                  "around them; or the plugin's (THIMBLE0)")
      ->capture_default_str();
}

/// Adds --window, --pool and --small, the keys of THIMBLE_KV that say which cells stay exact.
inline void add_exact_options(CLI::App& command, int& window, int& pool, int& small_cells) {
  command.add_option("--last,--window", window, "Exact cells at the end")->capture_default_str();
  command.add_option("--pool", pool, "Exact cells besides, those that matter most")->capture_default_str();
  command
      .add_option("--small", small_cells,
                  "Caches of at most so many cells stay f16; 0: all is coded, sliding windows too")
      ->capture_default_str();
}

}  // namespace thimble
