// Cells as llama.cpp saves and loads them: rows of n_kv_heads * head_dim f16 numbers.
//
// A cell whose row is kept exactly (window, exact store) is saved as that row. A coded cell does not need the room and
// is saved as its codes, after a tag that no finite f16 row can begin with:
//   4 x f16 NaN (0x7e54 0x7e48 0x7e4d 0x7e42), 8 bytes of settings hash, the codes and scales of all heads, zeros
// So save and load are bit-exact, plain f16 states load into a coded cache, and codes of other settings are refused.
//
// Where heads are divided over devices, llama.cpp saves a cell as the rows of all devices, one behind another, and a
// row of one device is cut in pieces when it is loaded. Such rows are refused as well.
#pragma once

#include "cache/layer.h"

namespace thimble {

/// Whether a coded cell, tag included, fits into its f16 row. Where it does not (tiny heads), the cache must stay f16.
bool state_row_fits(const CacheShape& shape, const Format& format);

/// Bytes of a row, of one head in it, and of the codes and scales of all heads.
struct RowBytes {
  size_t row = 0, head = 0, vectors = 0;
};

/// What a saved row holds, for a side whose codes depend on `hash`. `refused`: codes made with other settings or for
/// another number of heads, or codes for a side that keeps none (`takes_codes` false).
enum class RowKind : uint8_t { exact, coded, refused };
RowKind row_kind(const uint8_t* row, const RowBytes& bytes, uint64_t hash, bool takes_codes);
/// What the error about a refused row says.
extern const char* const kOtherSettings;

/// Bytes that the codes and scales of all heads take in a coded row.
size_t row_vectors_bytes(const CacheShape& shape, const Format& format);
/// Where the codes and scales of a coded row begin.
const uint8_t* row_vectors(const uint8_t* row);
/// Makes a coded row of `n` bytes of codes and scales: tag, hash, these bytes, zeros.
void write_coded_row(const uint8_t* vectors, size_t n, uint64_t hash, uint8_t* row, size_t row_bytes);

/// Writes the saved row of a cell to `row`, row_size() * 2 bytes. `hash` is that of all settings that codes depend on.
void save_cell(const CacheLayer& layer, Kind kind, int64_t cell, uint64_t hash, uint8_t* row);
/// Writes a saved row into the cache: codes into the cell's blocks, an exact row into the window where that has a slot
/// for it (Window::place). A cell's keys are loaded before its values. Throws std::runtime_error where the row holds
/// codes of another hash.
void load_cell(CacheLayer& layer, Kind kind, int64_t cell, uint64_t hash, const uint8_t* row);

/// Makes a row that load_cell refuses, for a cell that could not be saved.
void write_refused_row(uint8_t* row, size_t row_bytes);

}  // namespace thimble
