#include "cuda/host/tables.h"

#include <algorithm>
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

// The identity as a matrix.
Transform as_matrix(const Transform& identity) {
  const size_t n = size_t(identity.head_dim());
  std::vector<float> matrix(n * n);
  for (size_t i = 0; i < n; i++) matrix[i * n + i] = 1;
  return Transform::dense(std::vector<float>(n), std::move(matrix));
}

template <typename T>
void append(std::vector<T>& to, const std::vector<T>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

// The two components whose numbers are smallest: those of the codewords, and what these miss.
std::vector<int32_t> carriers(const HeadCodec& codec) {
  if (codec.error.size() < 2) return {};
  std::vector<float> square = codec.error;
  std::vector<int32_t> components(square.size());
  for (size_t d = 0; d < square.size(); d++) {
    for (int c = 0; c < kCodewords; c++) {
      const float word = codec.words[d * kCodewords + c];
      square[d] += word * word / kCodewords;
    }
    components[d] = int32_t(d);
  }
  std::partial_sort(components.begin(), components.begin() + 2, components.end(),
                    [&](int a, int b) { return square[size_t(a)] < square[size_t(b)]; });
  components.resize(2);
  return components;
}

// What all kernels read of the heads' codecs.
HostTables common_tables(const std::vector<HeadCodec>& heads, const CodeOrder& order) {
  const HeadCodec& first = heads.front();
  HostTables tables;
  tables.order = order;
  tables.n_kv_heads = int(heads.size());
  tables.hadamard_block = first.transform.hadamard_block();
  for (const HeadCodec& codec : heads) {
    if (codec.format != first.format || codec.kind != first.kind ||
        codec.transform.is_dense() != first.transform.is_dense() ||
        codec.transform.hadamard_block() != first.transform.hadamard_block()) {
      throw std::invalid_argument("the heads of a layer differ in format or kind of transform");
    }
    append(tables.words, codec.words);
    append(tables.half_norms, codec.half_norms);
    append(tables.error, codec.error);
    append(tables.carriers, carriers(codec));
    if (!codec.transform.is_dense()) continue;
    append(tables.mean, codec.transform.mean());
    append(tables.forward, codec.transform.matrix());
    append(tables.undo, codec.kind == Kind::key ? codec.transform.query_matrix() : codec.transform.inverse_matrix());
  }
  return tables;
}

}  // namespace

HostTables pack_tables(const std::vector<HeadCodec>& heads, bool tiles) {
  if (heads.empty()) throw std::invalid_argument("no heads");
  const Format& format = heads[0].format;
  if (!(tiles ? tiles_support(format) : cuda_supports(format))) {
    throw std::invalid_argument("the CUDA kernels do not support this format");
  }
  // These kernels know a rotation of all numbers, and matrices.
  std::vector<HeadCodec> known = heads;
  for (HeadCodec& codec : known) {
    const int block = codec.transform.hadamard_block();
    if (!codec.transform.is_dense() && block == 1) codec.transform = as_matrix(codec.transform);
    if (block != 1 && block != format.head_dim) throw std::invalid_argument("transform is neither Hadamard nor dense");
  }
  HostTables tables = common_tables(known, code_order(format, tiles));
  for (const HeadCodec& codec : known) {
    append(tables.packed, pack_words(codec, tiles));
    append(tables.scale, codec.codebook.scale);
  }
  return tables;
}

HostTables pack_row_tables(const std::vector<HeadCodec>& heads) {
  if (heads.empty()) throw std::invalid_argument("no heads");
  return common_tables(heads, plain_order(heads[0].format));
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
  t.hadamard_block = hadamard_block;
  t.packed = packed.data();
  t.scale = scale.data();
  t.words = words.data();
  t.half_norms = half_norms.data();
  if (order.head_dim > 1 && error.size() == size_t(n_kv_heads) * order.head_dim) {
    t.error = error.data();
    t.carriers = carriers.data();
  }
  if (!forward.empty()) {
    t.mean = mean.data();
    t.forward = forward.data();
    t.undo = undo.data();
  }
  return t;
}

}  // namespace thimble::cuda
