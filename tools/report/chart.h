// Charts as SVG, to stand in an HTML page.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace thimble {

struct Axis {
  std::string label;
  bool log = false;  // points that are not above 0 are left out then
};

struct Series {
  std::string name;
  std::vector<std::pair<double, double>> points;
};

/// An <svg> element; lines between the points of a series, or points with their series' names. Empty where nothing is
/// to be drawn.
std::string draw_chart(const Axis& x, const Axis& y, const std::vector<Series>& series, bool lines);

/// A text with the characters that HTML gives a meaning replaced.
std::string escape_html(const std::string& text);

}  // namespace thimble
