// A coded cache emulated inside the f16 cache of a plain llama.cpp context, by its eval callback: what the cells would
// hold once coded is written over them, and attention may be computed anew. Slow and no smaller than f16; it is for
// checking figures and for comparing recipes. One sequence, written in order, in memory that the CPU reaches.
#pragma once

#include <string>

#include "codec/format.h"

struct ggml_tensor;

namespace thimble {

class EmulatedCache {
public:
  virtual ~EmulatedCache() = default;

  /// For `cb_eval`, with the EmulatedCache as its user data.
  static bool callback(ggml_tensor* node, bool ask, void* cache);

  /// Tells that the cache was cleared.
  virtual void clear() = 0;
  /// Throws what went wrong inside the callback, which must not throw through llama.cpp.
  void check() const;

protected:
  /// Rows were written to a layer's keys or values, at `first_written` and behind it: `cache` is all of the side,
  /// [n_cells] rows of f16.
  virtual void stored(const ggml_tensor* cache, int layer, Kind kind, int first_written, int n_written) = 0;
  /// A layer attended; `attention` is the node, its output may be written over.
  virtual void attended(ggml_tensor* attention, int layer) = 0;
  /// Whether to be told of a layer's attention.
  virtual bool attends(int layer) const = 0;

private:
  std::string error_;
};

}  // namespace thimble
