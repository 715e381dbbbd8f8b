#include "profile/profile.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

namespace thimble {
namespace {

std::string list_of(const std::vector<double>& rates) {
  std::ostringstream text;
  for (size_t i = 0; i < rates.size(); i++) text << (i ? ", " : "") << rates[i];
  return text.str();
}

[[noreturn]] void misfit(const std::string& what) {
  throw std::runtime_error("the profile was made for another model (" + what +
                           "): run `thimble calibrate` on this model");
}

template <typename T>
void compare(const char* what, const T& profile, const T& model) {
  if (model == T{} || model == profile) return;
  std::ostringstream text;
  text << what << " " << profile << ", the model has " << model;
  misfit(text.str());
}

}  // namespace

Format Profile::format(int layer_index, Kind kind, double rate) const {
  if (layer_index < 0 || size_t(layer_index) >= shape.layers.size() || shape.layers[layer_index].n_kv_heads == 0) {
    misfit("it holds nothing for layer " + std::to_string(layer_index));
  }
  const auto& by_bits = layer(layer_index, kind).by_bits;
  const auto found = by_bits.find(rate);
  if (found == by_bits.end()) {
    std::ostringstream text;
    text << "the profile holds " << list_of(bits) << " bits, not " << rate
         << ": choose one of these or calibrate again";
    throw std::runtime_error(text.str());
  }
  return found->second.format;
}

HeadCodec Profile::codec(int layer_index, int kv_head, Kind kind, double rate) const {
  HeadCodec codec;
  codec.kind = kind;
  codec.format = format(layer_index, kind, rate);
  if (kv_head < 0 || kv_head >= shape.layers[layer_index].n_kv_heads) {
    misfit("it holds nothing for KV head " + std::to_string(kv_head));
  }
  const LayerProfile& from = layer(layer_index, kind);
  const LayerCodebooks& books = from.by_bits.at(rate);
  const size_t dim = codec.format.head_dim, head = kv_head, n_subspaces = codec.format.n_subspaces();

  const float* a = &from.matrix[head * dim * dim];
  const int16_t* order = &books.order[head * dim];
  std::vector<float> ordered(dim * dim);
  for (size_t i = 0; i < dim; i++) {
    for (size_t j = 0; j < dim; j++) ordered[i * dim + j] = a[i * dim + order[j]];
  }
  const float* mean = &from.mean[head * dim];
  try {
    codec.transform = Transform::dense({mean, mean + dim}, std::move(ordered));
  } catch (const std::invalid_argument& e) {
    throw std::runtime_error("not a usable profile (" + std::string(e.what()) +
                             "): make it again with `thimble calibrate`");
  }
  const int8_t* words = &books.words[head * dim * kCodewords];
  codec.codebook.words.assign(words, words + dim * kCodewords);
  const float* scale = &books.scale[head * n_subspaces];
  codec.codebook.scale.assign(scale, scale + n_subspaces);
  if (!books.error.empty()) codec.error.assign(&books.error[head * dim], &books.error[head * dim] + dim);
  codec.derive_tables();
  return codec;
}

void Profile::check_fits(const ModelShape& model) const {
  compare("architecture", shape.architecture, model.architecture);
  if (model.layers.size() > shape.layers.size()) {
    misfit(std::to_string(shape.layers.size()) + " layers, the model has " + std::to_string(model.layers.size()));
  }
  for (size_t i = 0; i < model.layers.size(); i++) {
    const std::string in_layer = " in layer " + std::to_string(i);
    compare(("KV heads" + in_layer).c_str(), shape.layers[i].n_kv_heads, model.layers[i].n_kv_heads);
    compare(("heads" + in_layer).c_str(), shape.layers[i].n_heads, model.layers[i].n_heads);
    compare(("key head size" + in_layer).c_str(), shape.layers[i].key_dim, model.layers[i].key_dim);
    compare(("value head size" + in_layer).c_str(), shape.layers[i].value_dim, model.layers[i].value_dim);
  }
  if (model.rope == RopeShape{}) return;
  compare("RoPE mode", shape.rope.mode, model.rope.mode);
  compare("RoPE dimensions", shape.rope.n_dims, model.rope.n_dims);
  compare("RoPE base", shape.rope.freq_base, model.rope.freq_base);
  compare("RoPE scaling", shape.rope.freq_scale, model.rope.freq_scale);
}

}  // namespace thimble
