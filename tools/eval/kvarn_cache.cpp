#include "eval/kvarn_cache.h"

#include <ggml.h>

#include <algorithm>
#include <cmath>

#include "codec/half.h"
#include "codec/transform.h"

namespace thimble {
namespace kvarn {
namespace {

// The published limits of deviations and of the logarithms of scales.
constexpr float kLeastDeviation = 1e-3f, kGreatestDeviation = 1e3f;
constexpr float kLeastLogScale = -0.3f, kGreatestLogScale = 10.0f;

struct Deviations {
  std::vector<float> row, column;
};

/// Of the matrix divided by the scales.
Deviations deviations_of(const std::vector<float>& matrix, const Scales& scales) {
  const size_t n_rows = scales.row.size(), n_columns = scales.column.size();
  std::vector<double> row_sum(n_rows), row_square(n_rows), column_sum(n_columns), column_square(n_columns);
  for (size_t r = 0; r < n_rows; r++) {
    for (size_t c = 0; c < n_columns; c++) {
      const double x = matrix[r * n_columns + c] / scales.row[r] / scales.column[c];
      row_sum[r] += x, row_square[r] += x * x;
      column_sum[c] += x, column_square[c] += x * x;
    }
  }
  const auto deviations = [](const std::vector<double>& sum, const std::vector<double>& square, size_t n) {
    std::vector<float> out;
    for (size_t i = 0; i < sum.size(); i++) {
      const double variance = (square[i] - sum[i] * sum[i] / double(n)) / double(n - 1);
      out.push_back(float(std::sqrt(std::max(variance, 0.0))));
    }
    return out;
  };
  return {deviations(row_sum, row_square, n_columns), deviations(column_sum, column_square, n_rows)};
}

float imbalance(const Deviations& deviations) {
  const auto ratio = [](const std::vector<float>& x) {
    const auto [least, greatest] = std::minmax_element(x.begin(), x.end());
    return *greatest / std::max(*least, 1e-8f);
  };
  return ratio(deviations.row) + ratio(deviations.column);
}

void widen(std::vector<float>& scales, const std::vector<float>& deviations) {
  for (size_t i = 0; i < scales.size(); i++) {
    const float log_scale =
        std::log(scales[i]) + std::log(std::clamp(deviations[i], kLeastDeviation, kGreatestDeviation));
    scales[i] = std::exp(std::clamp(log_scale, kLeastLogScale, kGreatestLogScale));
  }
}

float as_half(float x) {
  return half_to_float(float_to_half(x));
}

}  // namespace

double bits(Kind kind, int head_dim, int bits) {
  const int rows = kind == Kind::key ? head_dim : kTile, columns = kind == Kind::key ? kTile : head_dim;
  return bits + 16.0 * (2 * rows + columns) / (double(kTile) * head_dim);
}

Scales balance(const std::vector<float>& matrix, int n_rows, int n_columns) {
  Scales scales{std::vector<float>(n_rows, 1.0f), std::vector<float>(n_columns, 1.0f)};
  Deviations deviations = deviations_of(matrix, scales);
  Scales best = scales;
  float least = imbalance(deviations);
  for (int turn = 0; turn < kTurns; turn++) {
    widen(scales.column, deviations.column);
    widen(scales.row, deviations_of(matrix, scales).row);
    deviations = deviations_of(matrix, scales);
    if (const float now = imbalance(deviations); now <= least) {
      least = now;
      best = scales;
    }
  }
  return best;
}

void code_tile(float* tile, int head_dim, Kind kind, int bits) {
  const Transform hadamard = Transform::hadamard(head_dim);
  std::vector<float> rotated(size_t(kTile) * head_dim);
  hadamard.forward(tile, rotated.data(), kTile);
  // Rows are what is rounded together.
  const bool keys = kind == Kind::key;
  const int n_rows = keys ? head_dim : kTile, n_columns = keys ? kTile : head_dim;
  const auto at = [&](int r, int c) -> float& {
    return rotated[keys ? size_t(c) * head_dim + r : size_t(r) * head_dim + c];
  };
  std::vector<float> matrix(rotated.size());
  for (int r = 0; r < n_rows; r++) {
    for (int c = 0; c < n_columns; c++) matrix[size_t(r) * n_columns + c] = at(r, c);
  }
  const Scales scales = balance(matrix, n_rows, n_columns);
  const float top = float((1 << bits) - 1);
  for (int r = 0; r < n_rows; r++) {
    float least = INFINITY, greatest = -INFINITY;
    const auto balanced = [&](int c) { return at(r, c) / scales.row[r] / scales.column[c]; };
    for (int c = 0; c < n_columns; c++) {
      least = std::min(least, balanced(c));
      greatest = std::max(greatest, balanced(c));
    }
    const float step = std::max((greatest - least) / top, 1e-10f);
    for (int c = 0; c < n_columns; c++) {
      const float level = std::clamp(std::nearbyint((balanced(c) - least) / step), 0.0f, top);
      at(r, c) = (level * as_half(step * scales.row[r]) + as_half(least * scales.row[r])) * as_half(scales.column[c]);
    }
  }
  for (int cell = 0; cell < kTile; cell++) {
    hadamard.inverse(&rotated[size_t(cell) * head_dim], tile + size_t(cell) * head_dim);
  }
}

}  // namespace kvarn

void KvarnCache::stored(const ggml_tensor* cache, int layer, Kind kind, int first_written, int) {
  if (!layers_.at(layer)) return;
  const int dim = kind == Kind::key ? head_dims_[layer].first : head_dims_[layer].second;
  std::vector<float> tile(size_t(kvarn::kTile) * dim);
  int& n_coded = n_coded_[{layer, kind}];
  for (n_coded = std::max(n_coded, 1); (n_coded + 1) * kvarn::kTile <= first_written; n_coded++) {
    std::vector<uint16_t> rows = get_rows(cache, n_coded * kvarn::kTile, kvarn::kTile);
    for (int first = 0; first < int(cache->ne[0]); first += dim) {  // of a KV head
      const auto numbers = [&](int cell) { return &rows[size_t(cell) * size_t(cache->ne[0]) + first]; };
      for (int cell = 0; cell < kvarn::kTile; cell++) {
        std::transform(numbers(cell), numbers(cell) + dim, &tile[size_t(cell) * dim], half_to_float);
      }
      kvarn::code_tile(tile.data(), dim, kind, bits_[int(kind)]);
      for (int cell = 0; cell < kvarn::kTile; cell++) {
        std::transform(&tile[size_t(cell) * dim], &tile[size_t(cell) * dim] + dim, numbers(cell), float_to_half);
      }
    }
    set_rows(cache, n_coded * kvarn::kTile, rows);
  }
}

}  // namespace thimble
