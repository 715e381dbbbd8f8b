// Reads and writes a profile's file. Reading checks everything; writing goes through a temporary file, so that a reader
// never sees half a file.
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <set>
#include <stdexcept>

#include "codec/half.h"
#include "profile/gguf.h"
#include "profile/profile.h"

namespace thimble {
namespace {

constexpr uint32_t kVersion = 2, kFirstVersion = 1;
// More than any model has; a larger number means that the file is damaged.
constexpr int kMaxLayers = 1024;
constexpr int kMaxHeads = 1024;

[[noreturn]] void damaged(const std::string& what) {
  throw std::runtime_error(what);  // read_profile makes a sentence of it
}

std::string rate_name(double bits) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", bits);
  return text;
}

/// Of the codebooks of a format: <widths> in profile.h.
std::string name_of(const Format& format) {
  return std::to_string(format.n_width2) + "-" + std::to_string(format.n_width4) + "-" +
         std::to_string(format.n_width8);
}

std::string tensor_name(int layer, Kind kind, const std::string& part) {
  return "l" + std::to_string(layer) + (kind == Kind::key ? ".k." : ".v.") + part;
}

/// Reads the file's values; throws where a float is not finite.
class Reader {
public:
  Reader(const uint8_t* data, size_t size) : in_(data, size) {}

  std::string text(const char* key) const { return in_.text(key); }
  uint32_t u32(const char* key) const { return in_.value<uint32_t>(key); }
  int32_t i32(const char* key) const { return in_.value<int32_t>(key); }
  float f32(const char* key) const {
    const auto value = in_.value<float>(key);
    if (!std::isfinite(value)) damaged(std::string(key) + " is not finite");
    return value;
  }
  template <typename T>
  std::vector<T> array(const std::string& key, size_t max_count) const {
    return checked(key, in_.array<T>(key, max_count));
  }
  bool has_tensor(const std::string& name) const { return in_.has_tensor(name); }
  template <typename T>
  std::vector<T> tensor(const std::string& name, size_t count) const {
    return checked(name, in_.tensor<T>(name, count));
  }

  std::vector<float> halves(const std::string& name, size_t count) const {
    std::vector<float> values;
    for (uint16_t half : in_.tensor<uint16_t>(name, count)) values.push_back(half_to_float(half));
    return checked(name, std::move(values));
  }

private:
  template <typename T>
  static std::vector<T> checked(const std::string& name, std::vector<T> values) {
    if constexpr (std::is_floating_point_v<T>) {
      for (T value : values) {
        if (!std::isfinite(value)) damaged(name + " holds a number that is not finite");
      }
    }
    return values;
  }

  gguf::Reader in_;
};

ModelShape read_shape(const Reader& in) {
  ModelShape shape;
  shape.architecture = in.text("thimble.architecture");
  const auto heads = in.array<int32_t>("thimble.heads", size_t(kMaxLayers) * 4);
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

LayerProfile read_layer(const Reader& in, uint32_t version, int layer, Kind kind, const LayerShape& shape,
                        const std::map<double, Format>& formats) {
  const auto name = [&](const std::string& part) { return tensor_name(layer, kind, part); };
  const size_t heads = shape.n_kv_heads, dim = shape.dim(kind);
  LayerProfile profile;
  profile.mean = in.tensor<float>(name("mean"), heads * dim);
  profile.matrix = version == kFirstVersion ? in.tensor<float>(name("matrix"), heads * dim * dim)
                                            : in.halves(name("matrix"), heads * dim * dim);
  for (const auto& [bits, format] : formats) {
    const std::string rate = "." + (version == kFirstVersion ? rate_name(bits) : name_of(format));
    LayerCodebooks& books = profile.by_bits[bits];
    books.format = format;
    books.order = in.tensor<int16_t>(name("order" + rate), heads * dim);
    books.words = in.tensor<int8_t>(name("words" + rate), heads * dim * kCodewords);
    books.scale = in.tensor<float>(name("scale" + rate), heads * format.n_subspaces());
    if (kind == Kind::key && in.has_tensor(name("error" + rate))) {
      books.error = in.tensor<float>(name("error" + rate), heads * dim);
    }
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
    for (float error : books.error) {
      if (!(error >= 0 && error < 1e12f)) damaged(name("error" + rate) + " holds an absurd number");
    }
  }
  return profile;
}

Profile read(const Reader& in) {
  const uint32_t version = in.u32("thimble.version");
  if (version < kFirstVersion || version > kVersion) {
    damaged("its version is " + std::to_string(version) + ", not " + std::to_string(kVersion));
  }
  Profile profile;
  profile.shape = read_shape(in);
  const size_t n_layers = profile.shape.layers.size();
  profile.transform = in.text("thimble.transform");
  profile.source = in.text("thimble.source");
  profile.density = in.array<float>("thimble.density", n_layers);
  if (profile.density.size() != n_layers) damaged("thimble.density does not list layers");

  std::map<double, std::vector<int32_t>> widths;
  for (float bits : in.array<float>("thimble.bits", kMaxRates)) {
    profile.bits.push_back(bits);
    widths[bits] = in.array<int32_t>("thimble.widths." + rate_name(bits), n_layers * 6);
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
      into.push_back(read_layer(in, version, int(i), kind, shape, formats));
    }
  }
  return profile;
}

void write_keys(const Profile& profile, gguf::Writer& out) {
  const ModelShape& shape = profile.shape;
  out.text("general.architecture", "thimble");
  out.text("general.type", "kv-cache-profile");
  out.value("thimble.version", kVersion);
  out.text("thimble.transform", profile.transform);
  out.text("thimble.source", profile.source);
  out.text("thimble.architecture", shape.architecture);
  std::vector<int32_t> heads;
  for (const LayerShape& l : shape.layers) {
    heads.insert(heads.end(), {l.n_kv_heads, l.n_heads, l.key_dim, l.value_dim});
  }
  out.array("thimble.heads", heads);
  out.value("thimble.rope.mode", int32_t{shape.rope.mode});
  out.value("thimble.rope.n_dims", int32_t{shape.rope.n_dims});
  out.value("thimble.rope.freq_base", shape.rope.freq_base);
  out.value("thimble.rope.freq_scale", shape.rope.freq_scale);
  out.array("thimble.density", profile.density);
  out.array("thimble.bits", std::vector<float>(profile.bits.begin(), profile.bits.end()));
  for (double rate : profile.bits) {
    std::vector<int32_t> widths;
    for (size_t i = 0; i < shape.layers.size(); i++) {
      for (Kind kind : {Kind::key, Kind::value}) {
        const Format f = shape.layers[i].n_kv_heads ? profile.format(int(i), kind, rate) : Format{};
        widths.insert(widths.end(), {f.n_width2, f.n_width4, f.n_width8});
      }
    }
    out.array("thimble.widths." + rate_name(rate), widths);
  }
}

void write_layer(const Profile& profile, int layer, gguf::Writer& out) {
  const size_t n_heads = profile.shape.layers[layer].n_kv_heads;
  if (n_heads == 0) return;
  for (Kind kind : {Kind::key, Kind::value}) {
    const LayerProfile& from = profile.layer(layer, kind);
    out.tensor(tensor_name(layer, kind, "mean"), from.mean, n_heads);
    std::vector<uint16_t> halves;
    for (float x : from.matrix) halves.push_back(float_to_half(x));
    out.tensor(tensor_name(layer, kind, "matrix"), halves, n_heads);
    std::map<std::string, const LayerCodebooks*> written;
    for (double rate : profile.bits) {
      const LayerCodebooks& books = from.by_bits.at(rate);
      const std::string format = name_of(books.format);
      const auto [same, is_new] = written.try_emplace(format, &books);
      if (!is_new && !(*same->second == books)) {
        throw std::runtime_error("layer " + std::to_string(layer) + " has several codebooks of one format");
      }
      if (!is_new) continue;
      out.tensor(tensor_name(layer, kind, "order." + format), books.order, n_heads);
      out.tensor(tensor_name(layer, kind, "words." + format), books.words, n_heads);
      out.tensor(tensor_name(layer, kind, "scale." + format), books.scale, n_heads);
      if (!books.error.empty()) out.tensor(tensor_name(layer, kind, "error." + format), books.error, n_heads);
    }
  }
}

}  // namespace

Profile read_profile(const uint8_t* data, size_t size) {
  try {
    return read(Reader(data, size));
  } catch (const std::runtime_error& e) {
    throw std::runtime_error("not a usable profile (" + std::string(e.what()) +
                             "): make it again with `thimble calibrate`");
  }
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
  const ModelShape& shape = profile.shape;
  const size_t n_layers = shape.layers.size();
  if (profile.keys.size() != n_layers || profile.values.size() != n_layers || profile.density.size() != n_layers) {
    throw std::runtime_error("the profile does not describe every layer");
  }
  gguf::Writer out;
  write_keys(profile, out);
  for (size_t i = 0; i < n_layers; i++) write_layer(profile, int(i), out);
  const std::vector<uint8_t> bytes = out.file();
  // The name has the process's id, so that two processes that calibrate one model at once do not write into one file.
  const std::string temporary = path + "." + std::to_string(getpid()) + ".part";
  std::ofstream file(temporary, std::ios::binary);
  file.write(reinterpret_cast<const char*>(bytes.data()), std::streamsize(bytes.size()));
  file.close();
  std::error_code error;
  if (file) std::filesystem::rename(temporary, path, error);
  if (!file || error) {
    std::filesystem::remove(temporary, error);
    throw std::runtime_error("cannot write " + path + ": check that the folder exists and has room");
  }
}

}  // namespace thimble
