// Cells as llama.cpp saves and loads them: rows of n_kv_heads * head_dim f16 numbers.
//
// A cell whose row is kept exactly (window, exact store) is saved as that row. A coded cell does not need the room.
// Each head's part of its row holds the head's codes, after a tag that no finite f16 row can begin with:
//   4 x f16 NaN (0x7e54 0x7e48 0x7e4d 0x7e42), 8 bytes of the head's hash, its codes and scale, zeros
// So save and load are bit-exact, plain f16 states load into a coded cache, and codes of other settings are refused.
//
// Where heads are divided over devices, llama.cpp joins the rows of all devices, and cuts a row at heads where it loads
// one. Since each head stands for itself, a state loads wherever its heads are. Devices choose the cells that stay
// exact by the heads that they have, so a row may hold some heads exactly and codes of others: it is `mixed`.
#pragma once

#include <span>

#include "cache/layer.h"

namespace thimble {

/// Whether a head's codes, tag included, fit into its f16 numbers. Where they do not (tiny heads), the cache must stay
/// f16.
bool state_row_fits(const Format& format);

/// How the heads of one side lie in its saved rows.
struct RowLayout {
  size_t head_bytes = 0;             // of a head's f16 numbers
  size_t vector_bytes = 0;           // of a head's codes and scale
  std::span<const uint64_t> hashes;  // by head, of all that its codes depend on
  bool takes_codes = true;           // false: the side has none

  int n_heads() const { return int(hashes.size()); }
  size_t row_bytes() const { return hashes.size() * head_bytes; }
  size_t vectors_bytes() const { return hashes.size() * vector_bytes; }
};
RowLayout row_layout(const Format& format, std::span<const uint64_t> hashes, bool takes_codes);

/// What a saved row holds. `refused`: codes of another hash, or codes for a side that has none.
enum class RowKind : uint8_t { exact, coded, mixed, refused };
RowKind row_kind(const uint8_t* row, const RowLayout& layout);
/// What the error about a refused row says.
extern const char* const kOtherSettings;

/// Makes a coded row of the codes and scales of all heads, and reads them from one.
void write_coded_row(const uint8_t* vectors, const RowLayout& layout, uint8_t* row);
void read_coded_row(const uint8_t* row, const RowLayout& layout, uint8_t* vectors);
/// Makes an exact row of a mixed one: heads of which `row` holds codes are taken from `decoded`, what the codes stand
/// for, the others from `row`.
void take_decoded_heads(const uint8_t* row, const uint8_t* decoded, const RowLayout& layout, uint8_t* exact);

/// Writes the saved row of a cell to `row`, row_size() * 2 bytes. `hashes`: RowLayout's.
void save_cell(const CacheLayer& layer, Kind kind, int64_t cell, std::span<const uint64_t> hashes, uint8_t* row);
/// Writes a saved row into the cache: codes into the cell's blocks, an exact row into the window where that has a slot
/// for it (Window::place), a mixed row as an exact one. A cell's keys are loaded before its values. Throws
/// std::runtime_error where the row is refused.
void load_cell(CacheLayer& layer, Kind kind, int64_t cell, std::span<const uint64_t> hashes, const uint8_t* row);

/// Makes a row that load_cell refuses, for a cell that could not be saved.
void write_refused_row(uint8_t* row, size_t row_bytes);

}  // namespace thimble
