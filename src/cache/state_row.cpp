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
    "this state was saved with other cache settings (bits or profile), or by another version of Thimble; load it with "
    "the THIMBLE_KV that it was saved with";

RowLayout row_layout(const Format& format, std::span<const uint64_t> hashes, bool takes_codes) {
  return {size_t(format.head_dim) * sizeof(uint16_t), size_t(format.vector_bytes()), hashes, takes_codes};
}

RowKind row_kind(const uint8_t* row, const RowLayout& layout) {
  int n_coded = 0;
  for (const uint64_t& hash : layout.hashes) {
    const uint8_t* head = row + (&hash - layout.hashes.data()) * layout.head_bytes;
    if (layout.head_bytes < kHeaderBytes || !has_tag(head)) continue;
    if (!layout.takes_codes || std::memcmp(head + sizeof(kTag), &hash, sizeof(hash)) != 0) return RowKind::refused;
    n_coded++;
  }
  return n_coded == 0 ? RowKind::exact : n_coded == layout.n_heads() ? RowKind::coded : RowKind::mixed;
}

void write_coded_row(const uint8_t* vectors, const RowLayout& layout, uint8_t* row) {
  for (const uint64_t& hash : layout.hashes) {
    std::memcpy(row, kTag, sizeof(kTag));
    std::memcpy(row + sizeof(kTag), &hash, sizeof(hash));
    std::memcpy(row + kHeaderBytes, vectors, layout.vector_bytes);
    const size_t end = kHeaderBytes + layout.vector_bytes;
    std::memset(row + end, 0, layout.head_bytes - end);
    row += layout.head_bytes;
    vectors += layout.vector_bytes;
  }
}

void read_coded_row(const uint8_t* row, const RowLayout& layout, uint8_t* vectors) {
  for (int head = 0; head < layout.n_heads(); head++) {
    std::memcpy(vectors + head * layout.vector_bytes, row + head * layout.head_bytes + kHeaderBytes,
                layout.vector_bytes);
  }
}

void take_decoded_heads(const uint8_t* row, const uint8_t* decoded, const RowLayout& layout, uint8_t* exact) {
  for (size_t at = 0; at < layout.row_bytes(); at += layout.head_bytes) {
    std::memcpy(exact + at, (has_tag(row + at) ? decoded : row) + at, layout.head_bytes);
  }
}

bool state_row_fits(const Format& format) {
  return format.f16 || kHeaderBytes + size_t(format.vector_bytes()) <= size_t(format.head_dim) * sizeof(uint16_t);
}

void save_cell(const CacheLayer& layer, Kind kind, int64_t cell, std::span<const uint64_t> hashes, uint8_t* row) {
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
  const RowLayout layout = row_layout(format, hashes, true);
  std::vector<uint8_t> vectors(layout.vectors_bytes());
  for (int head = 0; head < side.shape().n_kv_heads; head++) {
    copy_cell_out(format, kind, side.block(head, cell), side.in_block(cell), vectors.data() + head * vector_bytes);
  }
  if (format.f16) {
    std::copy(vectors.begin(), vectors.end(), row);
  } else {
    write_coded_row(vectors.data(), layout, row);
  }
}

void write_refused_row(uint8_t* row, size_t row_bytes) {
  std::memset(row, 0, row_bytes);  // a hash of 0
  std::memcpy(row, kTag, std::min(row_bytes, sizeof(kTag)));
}

void load_cell(CacheLayer& layer, Kind kind, int64_t cell, std::span<const uint64_t> hashes, const uint8_t* row) {
  CacheSide& side = layer.side(kind);
  const Format& format = side.format();
  const RowLayout layout = row_layout(format, hashes, !format.f16 && side.coded());
  const RowKind what = row_kind(row, layout);
  uint16_t* kept = side.rows().keep(cell);  // may throw: the layer is then as it was
  if (kind == Kind::key) layer.window().forget(cell);
  if (what == RowKind::refused) throw std::runtime_error(kOtherSettings);
  std::vector<uint16_t> exact(side.row_size());
  std::memcpy(exact.data(), row, layout.row_bytes());
  if (what != RowKind::exact) {
    std::vector<uint8_t> vectors(layout.vectors_bytes());
    read_coded_row(row, layout, vectors.data());
    for (int head = 0; head < side.shape().n_kv_heads; head++) {
      copy_cell_in(format, kind, &vectors[head * layout.vector_bytes], side.block(head, cell), side.in_block(cell));
    }
    if (what == RowKind::coded && !kept) return;
    std::vector<float> decoded(side.row_size());
    side.decode_row(cell, decoded.data());
    std::vector<uint16_t> halves(decoded.size());
    std::transform(decoded.begin(), decoded.end(), halves.begin(), float_to_half);
    if (what == RowKind::coded) {  // the row itself was not saved, so the store gets what its codes decode to
      std::copy(halves.begin(), halves.end(), kept);
      return;
    }
    take_decoded_heads(row, reinterpret_cast<const uint8_t*>(halves.data()), layout,
                       reinterpret_cast<uint8_t*>(exact.data()));
  }
  layer.take_row(kind, cell, exact.data());
}

}  // namespace thimble
