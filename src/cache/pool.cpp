#include "cache/pool.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/kernels.h"

namespace thimble {
namespace {

constexpr size_t kMostQueries = 64;

using Four = float __attribute__((vector_size(16)));

constexpr int kAtOnce = 4;  // products: a sum waits for the one before it, so several go on side by side

Four four(const float* x) {
  Four result;
  std::memcpy(&result, x, sizeof result);
  return result;
}

// Products of `a` with kAtOnce vectors. Each adds in four sums, so that the result is the same on every processor.
void products(const float* a, const float* const* b, int n, float* out) {
  Four sums[kAtOnce] = {};
  int d = 0;
  for (; d + 4 <= n; d += 4) {
    for (int k = 0; k < kAtOnce; k++) sums[k] += four(a + d) * four(b[k] + d);
  }
  for (int k = 0; k < kAtOnce; k++) {
    for (int rest = d; rest < n; rest++) sums[k][0] += a[rest] * b[k][rest];
    out[k] = (sums[k][0] + sums[k][1]) + (sums[k][2] + sums[k][3]);
  }
}

// products[head of the group][cell]
void multiply(const float* query, int group, int kv_head, int dim, std::span<const uint16_t* const> keys,
              std::vector<float>& tile, float* out) {
  const uint8_t* rows[kBlockCells];
  for (size_t first = 0; first < keys.size(); first += kBlockCells) {
    const int n = int(std::min<size_t>(kBlockCells, keys.size() - first));
    for (int i = 0; i < n; i++) rows[i] = reinterpret_cast<const uint8_t*>(keys[first + i] + size_t(kv_head) * dim);
    kernels().load_rows(Kind::value, rows, n, dim, tile.data());  // as values: tile [cell][dim], not transposed
    for (int i = 0; i < n; i += kAtOnce) {
      const float* cells[kAtOnce];
      for (int k = 0; k < kAtOnce; k++) cells[k] = &tile[size_t(std::min(i + k, n - 1)) * dim];
      for (int g = 0; g < group; g++) {
        float of_cells[kAtOnce];
        products(query + size_t(g) * dim, cells, dim, of_cells);
        std::copy_n(of_cells, std::min(kAtOnce, n - i), &out[g * keys.size() + first + i]);
      }
    }
  }
}

}  // namespace

std::vector<float> mean_query(const BatchQueries& queries, std::span<const int> rows) {
  std::vector<float> mean(size_t(queries.n_heads) * queries.dim, 0.0f);
  const size_t n = std::min(rows.size(), kMostQueries);
  for (size_t i = 0; i < n; i++) {
    const int row = rows[i * rows.size() / n];
    for (int h = 0; h < queries.n_heads; h++) {
      const float* q = queries.row(row, h);
      for (int d = 0; d < queries.dim; d++) mean[size_t(h) * queries.dim + d] += q[d];
    }
  }
  for (float& x : mean) x /= float(std::max<size_t>(n, 1));
  return mean;
}

void score_cells(std::span<const float> query, int n_heads, int n_kv_heads, int dim,
                 std::span<const uint16_t* const> cells, std::span<const uint16_t* const> recent,
                 std::span<float> scores) {
  const int group = n_heads / n_kv_heads;
  std::vector<float> tile(size_t(kBlockCells) * dim);
  std::vector<float> of_cells(group * cells.size()), of_recent(group * recent.size());
  std::fill(scores.begin(), scores.end(), -std::numeric_limits<float>::infinity());
  for (int kv_head = 0; kv_head < n_kv_heads; kv_head++) {
    const float* q = query.data() + size_t(kv_head) * group * dim;
    multiply(q, group, kv_head, dim, cells, tile, of_cells.data());
    multiply(q, group, kv_head, dim, recent, tile, of_recent.data());
    for (int g = 0; g < group; g++) {
      double sum = 0, squares = 0;
      for (size_t i = 0; i < recent.size(); i++) {
        const double x = of_recent[g * recent.size() + i];
        sum += x;
        squares += x * x;
      }
      const double n = double(std::max<size_t>(recent.size(), 1)), mean = sum / n;
      const double deviation = std::sqrt(std::max(squares / n - mean * mean, 1e-12));
      for (size_t i = 0; i < cells.size(); i++) {
        const float z = float((of_cells[g * cells.size() + i] - mean) / deviation);
        if (z > scores[i]) scores[i] = z;
      }
    }
  }
}

}  // namespace thimble
