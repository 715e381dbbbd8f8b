#include "reference_cache.h"

#include <ggml-backend.h>
#include <ggml.h>

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "codec/half.h"

namespace thimble {

bool ReferenceCache::callback(ggml_tensor* node, bool ask, void* user_data) {
  ReferenceCache& self = *static_cast<ReferenceCache*>(user_data);
  const ggml_tensor* root = node;
  while (root->view_src) root = root->view_src;
  char letter = 0;
  int layer = -1;
  if (node->op != GGML_OP_SET_ROWS || std::sscanf(root->name, "cache_%c_l%d", &letter, &layer) != 2) return !ask;
  if (ask) return true;
  try {
    self.code_leaving(node, {layer, letter == 'k' ? Kind::key : Kind::value});
  } catch (const std::exception& e) {
    self.error_ = e.what();
    return false;
  }
  return true;
}

void ReferenceCache::check() const {
  if (!error_.empty()) throw std::runtime_error(error_);
}

const std::vector<HeadCodec>& ReferenceCache::codecs(Side side, int row_size) {
  auto& made = codecs_[side];
  if (!made.empty()) return made;
  const auto [layer, kind] = side;
  const double bits = bits_[kind == Kind::value];
  if (!profile_) throw std::runtime_error("the reference cache needs a profile: give one with --profile");
  for (int h = 0; h < profile_->shape.layers.at(layer).n_kv_heads; h++) {
    if (bits == 16) {
      made.push_back(make_uncalibrated_codec(kind, make_format(profile_->shape.layers[layer].dim(kind), 16)));
    } else {
      made.push_back(profile_->codec(layer, h, kind, bits));
    }
  }
  if (made.empty() || int(made.size()) * made.front().format.head_dim != row_size) {
    throw std::runtime_error("the profile does not fit the model");
  }
  return made;
}

void ReferenceCache::code_leaving(const ggml_tensor* node, Side side) {
  if (node->type != GGML_TYPE_F16) throw std::runtime_error("the reference cache works on cache type f16");
  int64_t first_written = 0;
  ggml_backend_tensor_get(node->src[1], &first_written, 0, sizeof first_written);
  const int row_size = int(node->ne[0]);
  const auto& heads = codecs(side, row_size);
  if (heads.front().format.f16) return;
  const int dim = heads.front().format.head_dim, n_subspaces = heads.front().format.n_subspaces();
  std::vector<float> x(dim), y(dim);
  std::vector<uint8_t> codes(n_subspaces);
  std::vector<uint16_t> row(row_size);
  int64_t& coded = coded_[side];
  for (coded = std::max<int64_t>(coded, first_); coded < first_written - last_; coded++) {
    const size_t at = size_t(coded) * node->nb[1], bytes = row.size() * sizeof(uint16_t);
    ggml_backend_tensor_get(node, row.data(), at, bytes);
    for (size_t h = 0; h < heads.size(); h++) {
      uint16_t* part = &row[h * dim];
      for (int d = 0; d < dim; d++) x[d] = half_to_float(part[d]);
      heads[h].transform.forward(x.data(), y.data());
      const uint16_t scale = encode_vector(heads[h], y.data(), codes.data());
      decode_vector(heads[h], codes.data(), scale, y.data());
      heads[h].transform.inverse(y.data(), x.data());
      for (int d = 0; d < dim; d++) part[d] = float_to_half(x[d]);
    }
    ggml_backend_tensor_set(const_cast<ggml_tensor*>(node), row.data(), at, bytes);
  }
}

}  // namespace thimble
