#include "calibrate/output_metrics.h"

#include <ggml.h>
#include <gguf.h>

#include <cstring>
#include <fstream>
#include <memory>
#include <stdexcept>

#include "calibrate/transforms.h"

namespace thimble {

std::vector<Eigen::MatrixXd> output_metric(const ggml_tensor* wo, const char* bytes, const LayerShape& layer) {
  std::vector<Eigen::MatrixXd> metric(layer.n_kv_heads);
  const auto to_float = ggml_get_type_traits(wo->type)->to_float;
  if (wo->ne[0] != int64_t(layer.n_heads) * layer.value_dim || (wo->type != GGML_TYPE_F32 && !to_float)) return metric;
  Matrix w(wo->ne[1], wo->ne[0]);
  if (wo->type == GGML_TYPE_F32) {
    std::memcpy(w.data(), bytes, ggml_nbytes(wo));
  } else {
    to_float(bytes, w.data(), w.size());
  }
  const int group = layer.n_heads / layer.n_kv_heads, dim = layer.value_dim;
  for (int h = 0; h < layer.n_heads; h++) {
    Eigen::MatrixXd& of_head = metric[h / group];
    if (of_head.size() == 0) of_head.setZero(dim, dim);
    const auto part = w.middleCols(Eigen::Index(h) * dim, dim);
    of_head += (part.transpose() * part).cast<double>();
  }
  return metric;
}

std::vector<std::vector<Eigen::MatrixXd>> read_output_metrics(const std::string& path, const ModelShape& shape) {
  ggml_context* tensors = nullptr;
  const std::unique_ptr<gguf_context, void (*)(gguf_context*)> file(
      gguf_init_from_file(path.c_str(), {/*no_alloc=*/true, &tensors}), gguf_free);
  const std::unique_ptr<ggml_context, void (*)(ggml_context*)> owner(tensors, ggml_free);
  std::ifstream bytes(path, std::ios::binary);
  std::vector<std::vector<Eigen::MatrixXd>> metrics;
  for (size_t i = 0; i < shape.layers.size(); i++) {
    const LayerShape& layer = shape.layers[i];
    metrics.emplace_back(layer.n_kv_heads);
    const std::string name = "blk." + std::to_string(i) + ".attn_output.weight";
    const int64_t id = file ? gguf_find_tensor(file.get(), name.c_str()) : -1;
    if (id < 0 || layer.n_kv_heads == 0) continue;
    const ggml_tensor* wo = ggml_get_tensor(tensors, name.c_str());
    std::vector<char> raw(ggml_nbytes(wo));
    bytes.seekg(std::streamoff(gguf_get_data_offset(file.get()) + gguf_get_tensor_offset(file.get(), id)));
    if (!bytes.read(raw.data(), std::streamsize(raw.size()))) throw std::runtime_error("cannot read " + path);
    metrics.back() = output_metric(wo, raw.data(), layer);
  }
  return metrics;
}

}  // namespace thimble
