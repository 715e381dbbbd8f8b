// The metric of values for each layer and KV head, the sum of Wo^T Wo over the heads of its group (transforms.h), from
// a model's output projections Wo. Compiled for each backend API version of ggml, as graph_reader.h is.
#pragma once

#include <Eigen/Core>
#include <string>
#include <vector>

#include "profile/profile.h"

struct ggml_tensor;

namespace thimble {

/// One matrix [value_dim][value_dim] a KV head, or one that is empty where Wo has an unusual shape or type. `bytes`: of
/// the tensor, as a file has them.
std::vector<Eigen::MatrixXd> output_metric(const ggml_tensor* wo, const char* bytes, const LayerShape& layer);

/// The metrics of all layers by the model's file; those of a layer are empty where it has no Wo of the usual name.
/// Throws std::runtime_error where the file ends early.
std::vector<std::vector<Eigen::MatrixXd>> read_output_metrics(const std::string& path, const ModelShape& shape);

}  // namespace thimble
