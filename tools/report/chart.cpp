#include "report/chart.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace thimble {
namespace {

constexpr double kWidth = 640, kHeight = 360, kLeft = 70, kRight = 130, kTop = 12, kBottom = 48;
const char* const kColours[] = {"#444444", "#1f77b4", "#d62728", "#2ca02c", "#9467bd",
                                "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f"};

template <typename... T>
std::string format(const char* pattern, T... values) {
  char text[1024];
  std::snprintf(text, sizeof text, pattern, values...);
  return text;
}

/// Where values lie on an axis, and its marks.
class Scale {
public:
  Scale(const std::vector<double>& values, bool log, double from, double to) : log_(log), from_(from), to_(to) {
    low_ = high_ = place(values.front());
    for (double v : values) {
      low_ = std::min(low_, place(v));
      high_ = std::max(high_, place(v));
    }
    if (!log) low_ = std::min(low_, 0.0);
    if (high_ - low_ < 1e-9) high_ = low_ + 1;
    const double room = 0.06 * (high_ - low_);
    high_ += room;
    if (log) low_ -= room;
  }

  double at(double value) const { return from_ + (to_ - from_) * (place(value) - low_) / (high_ - low_); }

  /// Values at which the axis has a mark, some five.
  std::vector<double> marks() const {
    std::vector<double> all;
    if (log_) {
      const bool many = high_ - low_ < 2;
      for (int power = int(std::floor(low_)); power <= high_; power++) {
        for (double digit : many ? std::vector<double>{1, 2, 5} : std::vector<double>{1}) {
          const double value = digit * std::pow(10, power);
          if (place(value) >= low_ && place(value) <= high_) all.push_back(value);
        }
      }
      return all;
    }
    const double rough = (high_ - low_) / 5, power = std::pow(10, std::floor(std::log10(rough)));
    const double step = (rough / power < 1.5 ? 1 : rough / power < 3.5 ? 2 : rough / power < 7.5 ? 5 : 10) * power;
    for (int i = int(std::ceil(low_ / step)); i * step <= high_; i++) all.push_back(i * step);
    return all;
  }

private:
  double place(double value) const { return log_ ? std::log10(value) : value; }

  bool log_;
  double from_, to_, low_ = 0, high_ = 1;
};

}  // namespace

std::string escape_html(const std::string& text) {
  std::string out;
  for (char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string draw_chart(const Axis& x, const Axis& y, const std::vector<Series>& series, bool lines) {
  std::vector<Series> drawn;
  std::vector<double> xs, ys;
  for (const Series& s : series) {
    Series kept{s.name, {}};
    for (const auto& [px, py] : s.points) {
      if ((x.log && !(px > 0)) || (y.log && !(py > 0)) || !std::isfinite(px) || !std::isfinite(py)) continue;
      kept.points.emplace_back(px, py);
      xs.push_back(px);
      ys.push_back(py);
    }
    drawn.push_back(std::move(kept));  // an empty one, too: colours stay those of the caches
  }
  if (xs.empty()) return {};
  const Scale across(xs, x.log, kLeft, kWidth - kRight), up(ys, y.log, kHeight - kBottom, kTop);

  std::string svg =
      format("<svg viewBox=\"0 0 %g %g\" width=\"%g\" role=\"img\" font-size=\"12\">\n", kWidth, kHeight, kWidth);
  for (double mark : across.marks()) {
    svg +=
        format("<path class=\"grid\" d=\"M%.1f %gV%g\"/><text x=\"%.1f\" y=\"%g\" text-anchor=\"middle\">%g</text>\n",
               across.at(mark), kTop, kHeight - kBottom, across.at(mark), kHeight - kBottom + 16, mark);
  }
  for (double mark : up.marks()) {
    svg += format("<path class=\"grid\" d=\"M%g %.1fH%g\"/><text x=\"%g\" y=\"%.1f\" text-anchor=\"end\">%g</text>\n",
                  kLeft, up.at(mark), kWidth - kRight, kLeft - 6, up.at(mark) + 4, mark);
  }
  svg += format("<text x=\"%g\" y=\"%g\" text-anchor=\"middle\">", (kLeft + kWidth - kRight) / 2, kHeight - 10) +
         escape_html(x.label) + "</text>\n";
  svg += format("<text transform=\"translate(14 %g) rotate(-90)\" text-anchor=\"middle\">",
                (kTop + kHeight - kBottom) / 2) +
         escape_html(y.label) + "</text>\n";
  int n_legend = 0;
  for (size_t i = 0; i < drawn.size(); i++) {
    const Series& s = drawn[i];
    if (s.points.empty()) continue;
    const char* colour = kColours[i % std::size(kColours)];
    if (lines) {
      svg += format("<polyline fill=\"none\" stroke-width=\"1.8\" stroke=\"%s\" points=\"", colour);
      for (const auto& [px, py] : s.points) svg += format("%.1f,%.1f ", across.at(px), up.at(py));
      svg += "\"/>\n";
    }
    for (const auto& [px, py] : s.points) {
      if (lines && s.points.size() > 12) break;
      svg += format("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n", across.at(px), up.at(py), colour);
    }
    const double text_x = lines ? kWidth - kRight + 10 : across.at(s.points[0].first) + 6;
    const double text_y = lines ? kTop + 14 + 17 * n_legend++ : up.at(s.points[0].second) - 5;
    svg +=
        format("<text x=\"%.1f\" y=\"%.1f\" fill=\"%s\">", text_x, text_y, colour) + escape_html(s.name) + "</text>\n";
  }
  return svg + "</svg>\n";
}

}  // namespace thimble
