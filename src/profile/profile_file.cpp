// The profile's file: reading trusts nothing, writing goes through a temporary file so that a reader never sees half.
#include <ggml.h>
#include <gguf.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <set>
#include <stdexcept>

#include "profile/profile.h"

namespace thimble {
namespace {

constexpr uint32_t kVersion = 1;
// More than any model has; what is larger is damage.
constexpr int kMaxLayers = 1024;
constexpr int kMaxHeads = 1024;

struct FreeGguf {
  void operator()(gguf_context* g) const { gguf_free(g); }
};
struct FreeGgml {
  void operator()(ggml_context* g) const { ggml_free(g); }
};

[[noreturn]] void damaged(const std::string& what) {
  throw std::runtime_error("not a usable profile (" + what + "): make it again with `thimble calibrate`");
}

std::string rate_name(double bits) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", bits);
  return text;
}

std::string tensor_name(int layer, Kind kind, const std::string& part) {
  return "l" + std::to_string(layer) + (kind == Kind::key ? ".k." : ".v.") + part;
}

class Reader {
public:
  Reader(const uint8_t* data, size_t size) : data_(data), size_(size) {
    // Metadata only: tensors are copied below, with their bounds checked first.
    gguf_.reset(gguf_init_from_buffer(data, size, {/*no_alloc=*/true, /*ctx=*/nullptr}));
    if (!gguf_) damaged("it is no GGUF file, or cut short");
  }

  std::string text(const char* key) const {
    const int64_t id = find(key, GGUF_TYPE_STRING);
    return gguf_get_val_str(gguf_.get(), id);
  }
  uint32_t u32(const char* key) const { return gguf_get_val_u32(gguf_.get(), find(key, GGUF_TYPE_UINT32)); }
  int32_t i32(const char* key) const { return gguf_get_val_i32(gguf_.get(), find(key, GGUF_TYPE_INT32)); }
  float f32(const char* key) const {
    const float value = gguf_get_val_f32(gguf_.get(), find(key, GGUF_TYPE_FLOAT32));
    if (!std::isfinite(value)) damaged(std::string(key) + " is not finite");
    return value;
  }

  template <typename T>
  std::vector<T> array(const std::string& key, gguf_type type, size_t max_count) const {
    const int64_t id = find(key.c_str(), GGUF_TYPE_ARRAY);
    if (gguf_get_arr_type(gguf_.get(), id) != type) damaged(key + " has the wrong type");
    const size_t n = gguf_get_arr_n(gguf_.get(), id);
    if (n > max_count) damaged(key + " is too long");
    std::vector<T> values(n);
    if (n > 0) std::memcpy(values.data(), gguf_get_arr_data(gguf_.get(), id), n * sizeof(T));
    if constexpr (std::is_floating_point_v<T>) check_finite(key, values);
    return values;
  }

  template <typename T>
  std::vector<T> tensor(const std::string& name, ggml_type type, size_t count) const {
    const int64_t id = gguf_find_tensor(gguf_.get(), name.c_str());
    if (id < 0) damaged(name + " is missing");
    if (gguf_get_tensor_type(gguf_.get(), id) != type) damaged(name + " has the wrong type");
    const size_t bytes = gguf_get_tensor_size(gguf_.get(), id);
    if (bytes != count * sizeof(T)) damaged(name + " has the wrong size");
    const size_t start = gguf_get_data_offset(gguf_.get()), offset = gguf_get_tensor_offset(gguf_.get(), id);
    if (start > size_ || offset > size_ - start || bytes > size_ - start - offset) damaged("it is cut short");
    std::vector<T> values(count);
    if (bytes > 0) std::memcpy(values.data(), data_ + start + offset, bytes);
    if constexpr (std::is_floating_point_v<T>) check_finite(name, values);
    return values;
  }

private:
  int64_t find(const char* key, gguf_type type) const {
    const int64_t id = gguf_find_key(gguf_.get(), key);
    if (id < 0) damaged(std::string(key) + " is missing");
    if (gguf_get_kv_type(gguf_.get(), id) != type) damaged(std::string(key) + " has the wrong type");
    return id;
  }

  template <typename T>
  static void check_finite(const std::string& name, const std::vector<T>& values) {
    for (T value : values) {
      if (!std::isfinite(value)) damaged(name + " holds a number that is not finite");
    }
  }

  const uint8_t* data_;
  size_t size_;
  std::unique_ptr<gguf_context, FreeGguf> gguf_;
};

ModelShape read_shape(const Reader& in) {
  ModelShape shape;
  shape.architecture = in.text("thimble.architecture");
  const auto heads = in.array<int32_t>("thimble.heads", GGUF_TYPE_INT32, size_t(kMaxLayers) * 4);
  if (heads.empty() || heads.size() % 4 != 0) damaged("thimble.heads does not list layers");
  for (size_t i = 0; i < heads.size(); i += 4) {
    const LayerShape layer = {heads[i], heads[i + 1], heads[i + 2], heads[i + 3]};
    const auto bad_dim = [](int dim) { return dim < 2 || dim > kMaxHeadDim || dim % 2 != 0; };
    if (layer.n_kv_heads < 0 || layer.n_kv_heads > kMaxHeads || layer.n_heads < 0 || layer.n_heads > kMaxHeads ||
        (layer.n_kv_heads > 0 && (bad_dim(layer.key_dim) || bad_dim(layer.value_dim)))) {
      damaged("layer " + std::to_string(i / 4) + " has an absurd shape");
    }
    shape.layers.push_back(layer);
  }
  shape.rope = {in.i32("thimble.rope.mode"), in.i32("thimble.rope.n_dims"), in.f32("thimble.rope.freq_base"),
                in.f32("thimble.rope.freq_scale")};
  return shape;
}

Format read_format(const std::vector<int32_t>& widths, size_t at, int head_dim) {
  const int64_t n2 = widths[at], n4 = widths[at + 1], n8 = widths[at + 2];
  if (n2 < 0 || n4 < 0 || n8 < 0 || 2 * n2 + 4 * n4 + 8 * n8 != head_dim) damaged("subspaces do not cover a vector");
  return {head_dim, false, int(n2), int(n4), int(n8)};
}

LayerProfile read_layer(const Reader& in, int layer, Kind kind, const LayerShape& shape,
                        const std::map<double, Format>& formats) {
  const auto name = [&](const std::string& part) { return tensor_name(layer, kind, part); };
  const size_t heads = shape.n_kv_heads, dim = shape.dim(kind);
  LayerProfile profile;
  profile.mean = in.tensor<float>(name("mean"), GGML_TYPE_F32, heads * dim);
  profile.matrix = in.tensor<float>(name("matrix"), GGML_TYPE_F32, heads * dim * dim);
  for (const auto& [bits, format] : formats) {
    const std::string rate = "." + rate_name(bits);
    LayerCodebooks& books = profile.by_bits[bits];
    books.format = format;
    books.order = in.tensor<int16_t>(name("order" + rate), GGML_TYPE_I16, heads * dim);
    books.words = in.tensor<int8_t>(name("words" + rate), GGML_TYPE_I8, heads * dim * kCodewords);
    books.scale = in.tensor<float>(name("scale" + rate), GGML_TYPE_F32, heads * format.n_subspaces());
    for (size_t h = 0; h < heads; h++) {
      const std::set<int16_t> columns(&books.order[h * dim], &books.order[h * dim] + dim);
      if (columns.size() != dim || *columns.begin() != 0 || *columns.rbegin() != int(dim) - 1) {
        damaged(name("order" + rate) + " is no permutation");
      }
    }
    for (float scale : books.scale) {
      // Normalized vectors have components of about 1; the bounds keep every product of codewords finite.
      if (!(scale >= 0 && scale < 1e6f)) damaged(name("scale" + rate) + " holds an absurd number");
    }
  }
  return profile;
}

}  // namespace

Profile read_profile(const uint8_t* data, size_t size) {
  const Reader in(data, size);
  if (in.u32("thimble.version") != kVersion) damaged("its version is not " + std::to_string(kVersion));
  Profile profile;
  profile.shape = read_shape(in);
  const size_t n_layers = profile.shape.layers.size();
  profile.transform = in.text("thimble.transform");
  profile.source = in.text("thimble.source");
  profile.density = in.array<float>("thimble.density", GGUF_TYPE_FLOAT32, n_layers);
  if (profile.density.size() != n_layers) damaged("thimble.density does not list layers");

  std::map<double, std::vector<int32_t>> widths;
  for (float bits : in.array<float>("thimble.bits", GGUF_TYPE_FLOAT32, 16)) {
    profile.bits.push_back(bits);
    widths[bits] = in.array<int32_t>("thimble.widths." + rate_name(bits), GGUF_TYPE_INT32, n_layers * 6);
    if (widths[bits].size() != n_layers * 6) damaged("subspaces are not listed for every layer");
  }
  if (profile.bits.empty() || widths.size() != profile.bits.size()) damaged("it holds no bit rate, or one twice");

  for (size_t i = 0; i < n_layers; i++) {
    const LayerShape& shape = profile.shape.layers[i];
    for (Kind kind : {Kind::key, Kind::value}) {
      auto& into = kind == Kind::key ? profile.keys : profile.values;
      if (shape.n_kv_heads == 0) {
        into.emplace_back();
        continue;
      }
      std::map<double, Format> formats;
      for (double bits : profile.bits) {
        formats[bits] = read_format(widths[bits], i * 6 + (kind == Kind::value ? 3 : 0), shape.dim(kind));
      }
      into.push_back(read_layer(in, int(i), kind, shape, formats));
    }
  }
  return profile;
}

Profile read_profile(const std::string& path) {
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  std::ifstream file(path, std::ios::binary);
  if (error || !file) throw std::runtime_error("cannot read the profile " + path + ": check the path");
  std::vector<uint8_t> data(size);
  if (size > 0 && !file.read(reinterpret_cast<char*>(data.data()), std::streamsize(size))) {
    throw std::runtime_error("cannot read the profile " + path + ": reading failed");
  }
  try {
    return read_profile(data.data(), data.size());
  } catch (const std::runtime_error& e) {
    throw std::runtime_error(path + ": " + e.what());
  }
}

void write_profile(const Profile& profile, const std::string& path) {
  std::unique_ptr<gguf_context, FreeGguf> out(gguf_init_empty());
  gguf_context* g = out.get();
  const ModelShape& shape = profile.shape;
  const size_t n_layers = shape.layers.size();
  if (profile.keys.size() != n_layers || profile.values.size() != n_layers || profile.density.size() != n_layers) {
    throw std::runtime_error("the profile does not describe every layer");
  }
  gguf_set_val_str(g, "general.architecture", "thimble");
  gguf_set_val_str(g, "general.type", "kv-cache-profile");
  gguf_set_val_u32(g, "thimble.version", kVersion);
  gguf_set_val_str(g, "thimble.transform", profile.transform.c_str());
  gguf_set_val_str(g, "thimble.source", profile.source.c_str());
  gguf_set_val_str(g, "thimble.architecture", shape.architecture.c_str());
  std::vector<int32_t> heads;
  for (const LayerShape& l : shape.layers) {
    heads.insert(heads.end(), {l.n_kv_heads, l.n_heads, l.key_dim, l.value_dim});
  }
  gguf_set_arr_data(g, "thimble.heads", GGUF_TYPE_INT32, heads.data(), heads.size());
  gguf_set_val_i32(g, "thimble.rope.mode", shape.rope.mode);
  gguf_set_val_i32(g, "thimble.rope.n_dims", shape.rope.n_dims);
  gguf_set_val_f32(g, "thimble.rope.freq_base", shape.rope.freq_base);
  gguf_set_val_f32(g, "thimble.rope.freq_scale", shape.rope.freq_scale);
  gguf_set_arr_data(g, "thimble.density", GGUF_TYPE_FLOAT32, profile.density.data(), n_layers);
  const std::vector<float> bits(profile.bits.begin(), profile.bits.end());
  gguf_set_arr_data(g, "thimble.bits", GGUF_TYPE_FLOAT32, bits.data(), bits.size());
  for (double rate : profile.bits) {
    std::vector<int32_t> widths;
    for (size_t i = 0; i < n_layers; i++) {
      for (Kind kind : {Kind::key, Kind::value}) {
        const Format f = shape.layers[i].n_kv_heads ? profile.format(int(i), kind, rate) : Format{};
        widths.insert(widths.end(), {f.n_width2, f.n_width4, f.n_width8});
      }
    }
    gguf_set_arr_data(g, ("thimble.widths." + rate_name(rate)).c_str(), GGUF_TYPE_INT32, widths.data(), widths.size());
  }

  // Tensor descriptions only; their data stays where it is.
  const size_t n_tensors = n_layers * 2 * (2 + 3 * profile.bits.size());
  std::unique_ptr<ggml_context, FreeGgml> tensors(
      ggml_init({(n_tensors + 1) * ggml_tensor_overhead(), nullptr, /*no_alloc=*/true}));
  const auto add = [&](const std::string& name, ggml_type type, const auto& values, int64_t heads_here) {
    ggml_tensor* t = ggml_new_tensor_2d(tensors.get(), type, int64_t(values.size()) / heads_here, heads_here);
    ggml_set_name(t, name.c_str());
    gguf_add_tensor(g, t);
    gguf_set_tensor_data(g, name.c_str(), values.data());
  };
  for (size_t i = 0; i < n_layers; i++) {
    const int n_heads = shape.layers[i].n_kv_heads;
    if (n_heads == 0) continue;
    for (Kind kind : {Kind::key, Kind::value}) {
      const LayerProfile& from = profile.layer(int(i), kind);
      add(tensor_name(int(i), kind, "mean"), GGML_TYPE_F32, from.mean, n_heads);
      add(tensor_name(int(i), kind, "matrix"), GGML_TYPE_F32, from.matrix, n_heads);
      for (double rate : profile.bits) {
        const LayerCodebooks& books = from.by_bits.at(rate);
        add(tensor_name(int(i), kind, "order." + rate_name(rate)), GGML_TYPE_I16, books.order, n_heads);
        add(tensor_name(int(i), kind, "words." + rate_name(rate)), GGML_TYPE_I8, books.words, n_heads);
        add(tensor_name(int(i), kind, "scale." + rate_name(rate)), GGML_TYPE_F32, books.scale, n_heads);
      }
    }
  }
  // Named for this process: two that calibrate one model at once each put a whole file in place.
  const std::string temporary = path + "." + std::to_string(getpid()) + ".part";
  std::error_code error;
  const bool written = gguf_write_to_file(g, temporary.c_str(), /*only_meta=*/false);
  if (written) std::filesystem::rename(temporary, path, error);
  if (!written || error) {
    std::filesystem::remove(temporary, error);
    throw std::runtime_error("cannot write " + path + ": check that the folder exists and has room");
  }
}

}  // namespace thimble
