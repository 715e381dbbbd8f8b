// calibrate=PATH: while a context runs, the statistics of its keys, values and queries are read off its graphs, and
// when it ends, a profile is fitted to them and written. The caches stay f16, in memory of the inner device.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "calibrate/collector.h"
#include "calibrate/graph_reader.h"
#include "engine/settings.h"
#include "ggml-backend-impl.h"
#include "plugin/device.h"

namespace thimble {

/// Why the settings' profile cannot be written, as a sentence, or "". Asked when a context is made.
std::string calibration_problem(const Settings& settings);

/// Of one context.
class Calibration {
public:
  /// `caches`: all buffers of the context that hold caches, in the order in which llama.cpp made them. `graph`: the
  /// first one over them. What is wrong goes to the log; the calibration then reads nothing.
  Calibration(const Settings& settings, const std::vector<KvBuffer*>& caches, ggml_cgraph* graph);
  ~Calibration();
  Calibration(const Calibration&) = delete;
  Calibration& operator=(const Calibration&) = delete;

  /// Whether more tokens are to be read.
  bool is_reading() const { return is_reading_; }
  /// Runs a graph on the inner backend and reads it.
  ggml_status compute(ggml_backend_t inner, ggml_cgraph* graph);
  /// The context ends: fits the profile and writes it, or says in the log why not.
  void finish() noexcept;

private:
  void give_up(const std::string& why);
  void read(const ggml_tensor* node);
  void fit();

  Settings::Calibrate settings_;
  std::string model_;  // the model's file; "" where it is not known
  std::string architecture_;
  int n_layers_ = 0;
  std::vector<int> budgets_;  // of each layer: layers of one KV cache share one
  StatisticsOptions statistics_;
  std::unique_ptr<Collector> collector_;
  std::unique_ptr<GraphReader> reader_;
  std::map<int, std::vector<Eigen::MatrixXd>> value_metrics_;  // by layer, as far as weights could be read
  bool has_path_ = false;                                      // no other calibration of this process writes there
  bool is_reading_ = false;
};

/// The calibration that must run a graph, or null.
Calibration* calibration_of(Device& device, ggml_cgraph* graph);

}  // namespace thimble
