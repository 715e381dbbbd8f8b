// Which numbers of a layer's rows a device has, where llama.cpp divides tensors among devices (--split-mode tensor).
//
// ggml's Meta device tells its devices neither that they have parts nor which ones. But it allocates all cache tensors
// of a context in one call, on one device after another, and the parts of a row lie in the order of these devices. So a
// cache tensor that is narrower than the profile says is a part, and begins where the part before it ends, which was
// allocated on another device by the same thread. A row is known once its parts are as wide as it is together; where
// some of them are on devices of other plugins, or of another process, it never is.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "cache/cache_name.h"

namespace thimble {

class Device;

/// The parts of one side of a layer that were allocated so far.
struct DividedRow {
  int64_t width = 0;  // of the whole row
  int64_t known = 0;  // of the parts so far, together
  std::vector<const Device*> devices;
};

/// One device's part of a row.
struct PartOfRow {
  int64_t first = 0;
  std::shared_ptr<const DividedRow> row;

  bool is_whole_known() const { return row && row->known == row->width; }
};

/// To be called for each cache tensor that is narrower than the whole row, as it is allocated: the place of its `width`
/// numbers. The row is forgotten with the last of its parts.
PartOfRow place_part(const Device& device, const CacheName& name, int64_t width, int64_t width_of_row);

}  // namespace thimble
