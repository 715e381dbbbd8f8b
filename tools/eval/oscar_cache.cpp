#include "eval/oscar_cache.h"

#include <ggml.h>

#include <algorithm>
#include <cmath>

#include "codec/half.h"

namespace thimble {
namespace oscar {

double bits(int head_dim) {
  return 2 + 2 * 16.0 / std::min(head_dim, kGroup);
}

void code_vector(float* y, int head_dim, Kind kind) {
  std::vector<float> size(y, y + head_dim);
  for (float& x : size) x = std::fabs(x);
  const auto limit = size.begin() + int((kind == Kind::key ? 0.96 : 0.92) * head_dim);
  std::nth_element(size.begin(), limit, size.end());
  for (int first = 0; first < head_dim; first += kGroup) {
    const int end = std::min(head_dim, first + kGroup);
    for (int d = first; d < end; d++) y[d] = std::clamp(y[d], -*limit, *limit);
    const auto [least, greatest] = std::minmax_element(y + first, y + end);
    const float scale = std::max(*greatest - *least, 1e-8f) / 3, zero = -*least / scale;
    for (int d = first; d < end; d++)
      y[d] = (std::clamp(std::floor(y[d] / scale + zero + 0.5f), 0.0f, 3.0f) - zero) * scale;
  }
}

}  // namespace oscar

const std::vector<Transform>& OscarCache::rotations(Side side) {
  std::vector<Transform>& made = rotations_[side];
  for (int h = int(made.size()); h < profile_.shape.layers.at(side.first).n_kv_heads; h++) {
    made.push_back(profile_.codec(side.first, h, side.second, 2).transform);
  }
  return made;
}

void OscarCache::stored(const ggml_tensor* cache, int layer, Kind kind, int first_written, int) {
  if (!layers_.at(layer)) return;
  const std::vector<Transform>& heads = rotations({layer, kind});
  const int dim = profile_.shape.layers[layer].dim(kind);
  std::vector<float> x(dim), y(dim);
  int& n_coded = n_coded_[{layer, kind}];
  const int first = std::max(n_coded, oscar::kFirst), n = first_written - oscar::kLast - first;
  if (n <= 0) return;
  std::vector<uint16_t> rows = get_rows(cache, first, n);
  for (int cell = 0; cell < n; cell++) {
    for (size_t h = 0; h < heads.size(); h++) {
      uint16_t* numbers = &rows[(size_t(cell) * heads.size() + h) * dim];
      std::transform(numbers, numbers + dim, x.begin(), half_to_float);
      heads[h].forward(x.data(), y.data());
      oscar::code_vector(y.data(), dim, kind);
      heads[h].inverse(y.data(), x.data());
      std::transform(x.begin(), x.end(), numbers, float_to_half);
    }
  }
  set_rows(cache, first, rows);
  n_coded = first + n;
}

}  // namespace thimble
