// Emulates a coded cache inside the f16 cache of a plain llama.cpp context, in the context's eval callback: it encodes
// cells, writes the decoded numbers over them, and may compute attention anew. It is slow and no smaller than f16; it
// serves to check figures and to compare methods. It takes one sequence, written in order. The cache may be on a GPU:
// what is coded is fetched from there and put back.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "codec/format.h"

struct ggml_tensor;

namespace thimble {

class EmulatedCache {
public:
  virtual ~EmulatedCache() = default;

  /// For `cb_eval`, with the EmulatedCache as its user data.
  static bool callback(ggml_tensor* node, bool ask, void* cache);

  /// To be called when the cache is cleared.
  virtual void clear() = 0;
  /// Throws the first error of the callback, which must not throw through llama.cpp.
  void check() const;

protected:
  /// Called when cells first_written to first_written + n_written - 1 of a layer's keys or values were written. `cache`
  /// has all cells of the side, [n_cells] rows of f16.
  virtual void stored(const ggml_tensor* cache, int layer, Kind kind, int first_written, int n_written) = 0;
  /// Called when a layer has attended; `attention` is the node, whose output may be overwritten.
  virtual void attended(ggml_tensor* attention, int layer) = 0;
  /// Whether `attended` is to be called for a layer.
  virtual bool attends(int layer) const = 0;

  /// The numbers of cells in a cache that `stored` gets, [n][numbers of a cell] of f16.
  static std::vector<uint16_t> get_rows(const ggml_tensor* cache, int first_cell, int n);
  static void set_rows(const ggml_tensor* cache, int first_cell, const std::vector<uint16_t>& rows);
  /// The numbers of a cell where the cache lies in memory that the CPU reads; throws elsewhere.
  static uint16_t* row_of(const ggml_tensor* cache, int cell);

private:
  std::string error_;
};

}  // namespace thimble
