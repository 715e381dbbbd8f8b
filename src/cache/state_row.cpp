#include "cache/state_row.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "codec/half.h"

namespace thimble {
namespace {

constexpr uint16_t kTag[4] = {0x7e54, 0x7e48, 0x7e4d, 0x7e42};
constexpr size_t kHeaderBytes = sizeof(kTag) + sizeof(uint64_t);

bool has_tag(const uint8_t* at) {
  return std::memcmp(at, kTag, sizeof(kTag)) == 0;
}

}  // namespace

const char* const kOtherSettings =
    "this state was saved with other cache settings (bits or profile), or with tensors split over other devices; load "
    "it "
    "with the THIMBLE_KV and --split-mode that it was saved with";

RowKind row_kind(const uint8_t* row, const RowBytes& bytes, uint64_t hash, bool takes_codes) {
  const bool is_coded = has_tag(row);
  if (is_coded && (!takes_codes || std::memcmp(row + sizeof(kTag), &hash, sizeof(hash)) != 0)) return RowKind::refused;
  // Several devices' rows have a tag where a device's heads begin. In a piece of one device's row, what follows the
  // codes of the heads that are here are those of others.
  const size_t end = is_coded ? kHeaderBytes + bytes.vectors : 1;
  for (size_t head = bytes.head; head + sizeof(kTag) <= bytes.row; head += bytes.head) {
    if (head >= end && has_tag(row + head)) return RowKind::refused;
  }
  constexpr uint8_t kZeros[16] = {};
  const size_t n_behind = std::min(sizeof(kZeros), bytes.row - std::min(end, bytes.row));
  if (is_coded && std::memcmp(row + end, kZeros, n_behind) != 0) return RowKind::refused;
  return is_coded ? RowKind::coded : RowKind::exact;
}

size_t row_vectors_bytes(const CacheShape& shape, const Format& format) {
  return size_t(shape.n_kv_heads) * size_t(format.vector_bytes());
}

const uint8_t* row_vectors(const uint8_t* row) {
  return row + kHeaderBytes;
}

void write_coded_row(const uint8_t* vectors, size_t n, uint64_t hash, uint8_t* row, size_t row_bytes) {
  std::memcpy(row, kTag, sizeof(kTag));
  std::memcpy(row + sizeof(kTag), &hash, sizeof(hash));
  std::memcpy(row + kHeaderBytes, vectors, n);
  std::memset(row + kHeaderBytes + n, 0, row_bytes - kHeaderBytes - n);
}

bool state_row_fits(const CacheShape& shape, const Format& format) {
  if (format.f16) return true;
  return kHeaderBytes + row_vectors_bytes(shape, format) <= size_t(shape.n_kv_heads) * format.head_dim * 2;
}

void save_cell(const CacheLayer& layer, Kind kind, int64_t cell, uint64_t hash, uint8_t* row) {
  const CacheSide& side = layer.side(kind);
  const size_t row_bytes = size_t(side.row_size()) * 2;
  if (const uint16_t* exact = layer.exact_row(kind, cell)) {
    std::memcpy(row, exact, row_bytes);
    return;
  }
  const Format& format = side.format();
  const size_t vector_bytes = size_t(format.vector_bytes());
  std::memset(row, 0, row_bytes);
  if (!side.coded()) return;  // never written
  std::vector<uint8_t> vectors(row_vectors_bytes(side.shape(), format));
  for (int head = 0; head < side.shape().n_kv_heads; head++) {
    copy_cell_out(format, kind, side.block(head, cell), side.in_block(cell), vectors.data() + head * vector_bytes);
  }
  if (format.f16) {
    std::copy(vectors.begin(), vectors.end(), row);
  } else {
    write_coded_row(vectors.data(), vectors.size(), hash, row, row_bytes);
  }
}

void write_refused_row(uint8_t* row, size_t row_bytes) {
  std::memset(row, 0, row_bytes);  // a hash of 0
  std::memcpy(row, kTag, std::min(row_bytes, sizeof(kTag)));
}

void load_cell(CacheLayer& layer, Kind kind, int64_t cell, uint64_t hash, const uint8_t* row) {
  CacheSide& side = layer.side(kind);
  const Format& format = side.format();
  const RowBytes bytes = {size_t(side.row_size()) * 2, size_t(side.row_size() / side.shape().n_kv_heads) * 2,
                          row_vectors_bytes(side.shape(), format)};
  const RowKind what = row_kind(row, bytes, hash, !format.f16 && side.coded());
  uint16_t* kept = side.rows().keep(cell);  // may throw: the layer is then as it was
  if (kind == Kind::key) layer.window().forget(cell);
  if (what == RowKind::refused) throw std::runtime_error(kOtherSettings);
  if (what == RowKind::coded) {
    const size_t vector_bytes = size_t(format.vector_bytes());
    for (int head = 0; head < side.shape().n_kv_heads; head++) {
      copy_cell_in(format, kind, row_vectors(row) + head * vector_bytes, side.block(head, cell), side.in_block(cell));
    }
    if (kept) {  // the row itself was not saved, so the store gets what its codes decode to
      std::vector<float> decoded(side.row_size());
      side.decode_row(cell, decoded.data());
      std::transform(decoded.begin(), decoded.end(), kept, float_to_half);
    }
    return;
  }
  std::vector<uint16_t> exact(side.row_size());
  std::memcpy(exact.data(), row, exact.size() * 2);
  layer.take_row(kind, cell, exact.data());
}

}  // namespace thimble
