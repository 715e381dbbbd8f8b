#include "plugin/row_parts.h"

#include <algorithm>
#include <utility>

namespace thimble {

PartOfRow place_part(const Device& device, const CacheName& name, int64_t width, int64_t width_of_row) {
  thread_local std::map<std::pair<int, Kind>, std::weak_ptr<DividedRow>> rows;
  std::weak_ptr<DividedRow>& last = rows[{name.layer, name.kind}];
  std::shared_ptr<DividedRow> row = last.lock();
  const auto goes_on = [&] {
    return row->width == width_of_row && row->known + width <= width_of_row &&
           std::find(row->devices.begin(), row->devices.end(), &device) == row->devices.end();
  };
  if (!row || !goes_on()) last = row = std::make_shared<DividedRow>(DividedRow{width_of_row, 0, {}});
  PartOfRow part{row->known, row};
  row->known += width;
  row->devices.push_back(&device);
  return part;
}

}  // namespace thimble
