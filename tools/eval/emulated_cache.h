// Emulates a coded cache inside the f16 cache of a plain llama.cpp context, in the context's eval callback: it encodes
// cells, writes the decoded numbers over them, and may compute attention anew. It is slow and no smaller than f16; it
// serves to check figures and to compare methods. It takes one sequence, written in order, in memory that the CPU
// reads.
#pragma once

#include <cstdint>
#include <string>

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

  /// The numbers of a cell in a cache that `stored` gets.
  static uint16_t* row_of(const ggml_tensor* cache, int cell);

private:
  std::string error_;
};

}  // namespace thimble
