#include "cuda/host/tables.h"

#include <stdexcept>

#include "cuda/layout.h"

namespace thimble::cuda {
namespace {

// Order of a codeword's bytes: subspace by subspace, but where values have width 2 (packed_pair).
int packed_position(const Format& format, Kind kind, int component) {
  if (kind == Kind::key || format.width(0) != 2) return component;
  return packed_pair(component / 2) * 2 + component % 2;
}

std::vector<uint32_t> pack_words(const HeadCodec& codec, bool tiles) {
  const Format& format = codec.format;
  std::vector<uint32_t> packed(size_t(kCodewords) * format.head_dim / 4);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(packed.data());
  for (int d = 0; d < format.head_dim; d++) {
    const int m = code_order(format, tiles).subspace_of(d), width = format.width(m), first = format.offset(m);
    for (int c = 0; c < kCodewords; c++) {
      const uint8_t number = uint8_t(codec.codebook.word(d, c));
      if (tiles) {
        bytes[first * kCodewords + c * width + d - first] = number ^ 0x80;
      } else {
        bytes[size_t(c) * format.head_dim + packed_position(format, codec.kind, d)] = number;
      }
    }
  }
  return packed;
}

bool is_hadamard(const Transform& transform) {
  std::vector<float> x(transform.head_dim()), y(x.size());
  x[0] = 1;
  transform.forward(x.data(), y.data());
  return !transform.is_dense() && y.back() != 0;  // the identity's is zero
}

template <typename T>
void append(std::vector<T>& to, const std::vector<T>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

}  // namespace

HostTables pack_tables(const std::vector<HeadCodec>& heads, bool tiles) {
  if (heads.empty()) throw std::invalid_argument("no heads");
  const Format& format = heads[0].format;
  const Kind kind = heads[0].kind;
  const bool dense = heads[0].transform.is_dense();
  if (!(tiles ? tiles_support(format) : cuda_supports(format))) {
    throw std::invalid_argument("the CUDA kernels do not support this format");
  }
  HostTables tables;
  tables.order = code_order(format, tiles);
  tables.n_kv_heads = int(heads.size());
  for (const HeadCodec& codec : heads) {
    if (codec.format != format || codec.kind != kind || codec.transform.is_dense() != dense) {
      throw std::invalid_argument("the heads of a layer differ in format or kind of transform");
    }
    if (!dense && !is_hadamard(codec.transform)) throw std::invalid_argument("transform is neither Hadamard nor dense");
    append(tables.packed, pack_words(codec, tiles));
    append(tables.scale, codec.codebook.scale);
    append(tables.words, codec.words);
    append(tables.half_norms, codec.half_norms);
    append(tables.error, codec.error);
    if (dense) {
      append(tables.mean, codec.transform.mean());
      append(tables.forward, codec.transform.matrix());
      append(tables.undo, kind == Kind::key ? codec.transform.query_matrix() : codec.transform.inverse_matrix());
    }
  }
  return tables;
}

std::vector<float> transformed_means(const std::vector<HeadCodec>& heads) {
  if (!heads.front().transform.is_dense()) return {};
  const size_t dim = size_t(heads.front().format.head_dim);
  const std::vector<float> zero(dim);
  std::vector<float> means(heads.size() * dim);
  for (size_t head = 0; head < heads.size(); head++) {
    heads[head].transform.forward(zero.data(), &means[head * dim]);  // -mean A
  }
  for (float& x : means) x = -x;
  return means;
}

CodecTables HostTables::view() const {
  CodecTables t;
  t.head_dim = order.head_dim;
  t.width = order.width;
  t.n_kv_heads = n_kv_heads;
  t.n_width2 = uint16_t(order.n_width2);
  t.n_width4 = uint16_t(order.n_width4);
  t.packed = packed.data();
  t.scale = scale.data();
  t.words = words.data();
  t.half_norms = half_norms.data();
  if (error.size() == size_t(n_kv_heads) * order.head_dim) t.error = error.data();
  if (!forward.empty()) {
    t.mean = mean.data();
    t.forward = forward.data();
    t.undo = undo.data();
  }
  return t;
}

}  // namespace thimble::cuda
