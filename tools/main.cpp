// The `thimble` command.
#include <CLI/CLI.hpp>
#include <cstdio>

#include "commands.h"

int main(int argc, char** argv) {
  CLI::App app("Thimble: the KV cache of llama.cpp models at 1, 2 or 4 bits");
  app.require_subcommand(1);
  thimble::add_launch_commands(app);
  thimble::add_doctor_command(app);
  thimble::add_calibrate_command(app);
  thimble::add_eval_command(app);
  thimble::add_bench_command(app);
  thimble::add_report_command(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "thimble: %s\n", e.what());
    return 1;
  }
}
