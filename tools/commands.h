// The subcommands of `thimble`, one source file each.
#pragma once

namespace CLI {
class App;
}

namespace thimble {

void add_launch_commands(CLI::App& app);  // run, serve
void add_doctor_command(CLI::App& app);
void add_calibrate_command(CLI::App& app);
void add_eval_command(CLI::App& app);
void add_bench_command(CLI::App& app);
void add_report_command(CLI::App& app);

}  // namespace thimble
