#include "calibrate/model_file.h"

#include <gguf.h>

#include <algorithm>
#include <stdexcept>

namespace thimble {

ModelFile::ModelFile(const std::string& path) : gguf_(gguf_init_from_file(path.c_str(), {true, nullptr}), gguf_free) {
  if (!gguf_) throw std::runtime_error(path + " is no GGUF file");
  const int64_t key = gguf_find_key(gguf_.get(), "general.architecture");
  if (key < 0 || gguf_get_kv_type(gguf_.get(), key) != GGUF_TYPE_STRING) {
    throw std::runtime_error(path + " names no architecture: it is no model");
  }
  architecture_ = gguf_get_val_str(gguf_.get(), key);
}

int ModelFile::number(const std::string& name, int layer, int fallback) const {
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

LayerShape ModelFile::layer(int index, bool is_window) const {
  const int n_heads = std::max(1, number("attention.head_count", index, 1));
  const int dim = number("embedding_length", 0, 0) / n_heads;
  const auto size = [&](const std::string& name) {
    const int of_all = number(name, index, dim);
    return is_window ? number(name + "_swa", index, of_all) : of_all;
  };
  return {number("attention.head_count_kv", index, n_heads), n_heads, size("attention.key_length"),
          size("attention.value_length")};
}

}  // namespace thimble
