#include "eval/reference_cache.h"

#include <ggml.h>

#include <algorithm>
#include <stdexcept>

#include "codec/half.h"

namespace thimble {

const std::vector<HeadCodec>& ReferenceCache::codecs(Side side, int row_size) {
  auto& made = codecs_[side];
  if (!made.empty()) return made;
  const auto [layer, kind] = side;
  const double bits = bits_[kind == Kind::value];
  for (int h = 0; h < profile_.shape.layers.at(layer).n_kv_heads; h++) {
    if (bits == 16) {
      made.push_back(make_uncalibrated_codec(kind, make_format(profile_.shape.layers[layer].dim(kind), 16)));
    } else {
      made.push_back(profile_.codec(layer, h, kind, bits));
    }
  }
  if (made.empty() || int(made.size()) * made.front().format.head_dim != row_size) {
    throw std::runtime_error("the profile does not fit the model");
  }
  return made;
}

void ReferenceCache::stored(const ggml_tensor* cache, int layer, Kind kind, int first_written, int) {
  if (!layers_.at(layer)) return;
  const auto& heads = codecs({layer, kind}, int(cache->ne[0]));
  if (heads.front().format.f16) return;
  const int dim = heads.front().format.head_dim;
  std::vector<float> x(dim), y(dim);
  std::vector<uint8_t> codes(heads.front().format.n_subspaces());
  int& coded = coded_[{layer, kind}];
  const int first = std::max(coded, first_), n = first_written - last_ - first;
  if (n <= 0) return;
  std::vector<uint16_t> rows = get_rows(cache, first, n);
  for (int cell = 0; cell < n; cell++) {
    for (size_t h = 0; h < heads.size(); h++) {
      uint16_t* part = &rows[(size_t(cell) * heads.size() + h) * dim];
      for (int d = 0; d < dim; d++) x[d] = half_to_float(part[d]);
      heads[h].transform.forward(x.data(), y.data());
      const uint16_t scale = encode_vector(heads[h], y.data(), codes.data());
      decode_vector(heads[h], codes.data(), scale, y.data());
      heads[h].transform.inverse(y.data(), x.data());
      for (int d = 0; d < dim; d++) part[d] = float_to_half(x[d]);
    }
  }
  set_rows(cache, first, rows);
  coded = first + n;
}

}  // namespace thimble
