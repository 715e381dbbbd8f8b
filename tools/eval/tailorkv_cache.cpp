#include "eval/tailorkv_cache.h"

#include <ggml.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "codec/half.h"
#include "eval/cache.h"

namespace thimble {
namespace {

constexpr int kGroup = 64;  // numbers that are coded with one pair of least and greatest

/// Replaces each of `n` numbers, `stride` apart, by the least or the greatest of them, whichever is nearer.
void code_group(uint16_t* numbers, int n, size_t stride) {
  float least = INFINITY, greatest = -INFINITY;
  for (int i = 0; i < n; i++) {
    const float x = half_to_float(numbers[i * stride]);
    least = std::min(least, x);
    greatest = std::max(greatest, x);
  }
  const float middle = (least + greatest) / 2;
  for (int i = 0; i < n; i++) {
    uint16_t& x = numbers[i * stride];
    x = float_to_half(half_to_float(x) < middle ? least : greatest);
  }
}

}  // namespace

void TailorKvCache::stored(const ggml_tensor* cache, int layer, Kind kind, int first_written, int n_written) {
  Side& side = sides_[{layer, kind}];
  side.n_cells = first_written + n_written;
  side.n_written = n_written;
  const int row = int(cache->ne[0]), row_stride = int(cache->nb[1] / sizeof(uint16_t));
  if (profile_.quantization_friendly(layer)) {
    side.coded = std::max(side.coded, first_);
    for (; side.coded + kGroup <= first_written - last_; side.coded += kGroup) {
      if (kind == Kind::key) {
        for (int c = 0; c < row; c++) code_group(row_of(cache, side.coded) + c, kGroup, row_stride);
      } else {
        for (int cell = side.coded; cell < side.coded + kGroup; cell++) {
          for (int c = 0; c < row; c += kGroup) code_group(row_of(cache, cell) + c, std::min(kGroup, row - c), 1);
        }
      }
    }
  } else if (kind == Kind::key) {
    side.greatest.resize(row, 0.0f);
    for (int cell = first_written; cell < side.n_cells; cell++) {
      const uint16_t* keys = row_of(cache, cell);
      for (int c = 0; c < row; c++) side.greatest[c] = std::max(side.greatest[c], std::fabs(half_to_float(keys[c])));
    }
  }
}

std::vector<int> TailorKvCache::retrieve(const std::vector<const float*>& queries, const char* keys, size_t stride,
                                         const float* greatest, int dim, int end) const {
  std::vector<float> weight(dim, 0.0f);
  for (const float* q : queries) {
    for (int c = 0; c < dim; c++) weight[c] += std::fabs(q[c]) * greatest[c];
  }
  std::vector<int> channels(dim);
  std::iota(channels.begin(), channels.end(), 0);
  std::partial_sort(channels.begin(), channels.begin() + sketch_channels(dim), channels.end(),
                    [&](int a, int b) { return weight[a] > weight[b]; });
  channels.resize(sketch_channels(dim));

  std::vector<float> estimate(std::max(0, end - first_));
  for (size_t i = 0; i < estimate.size(); i++) {
    const auto* key = reinterpret_cast<const uint16_t*>(keys + (first_ + i) * stride);
    std::vector<float> scores(queries.size(), 0.0f);
    for (int c : channels) {
      const float k = half_to_float(key[c]);
      for (size_t g = 0; g < queries.size(); g++) scores[g] += queries[g][c] * k;
    }
    estimate[i] = *std::max_element(scores.begin(), scores.end());
  }
  std::vector<int> cells(estimate.size());
  std::iota(cells.begin(), cells.end(), first_);
  const size_t n = std::min<size_t>(top_, cells.size());
  std::nth_element(cells.begin(), cells.begin() + n, cells.end(),
                   [&](int a, int b) { return estimate[a - first_] > estimate[b - first_]; });
  cells.resize(n);
  return cells;
}

void TailorKvCache::attended(ggml_tensor* node, int layer) {
  const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2];
  const Side& side = sides_[{layer, Kind::key}];
  if (side.n_written > 1) return;  // a prompt
  float scale, max_bias, softcap;
  std::memcpy(&scale, node->op_params, sizeof scale);
  std::memcpy(&max_bias, node->op_params + 1, sizeof max_bias);
  std::memcpy(&softcap, node->op_params + 2, sizeof softcap);
  if (max_bias != 0 || softcap != 0 || node->src[4]) {
    throw std::runtime_error("TailorKV is emulated for plain attention only: no ALiBi, softcap or sinks");
  }
  const int key_dim = int(k->ne[0]), value_dim = int(v->ne[0]), n_kv_heads = int(k->ne[2]);
  const int group = int(q->ne[2]) / n_kv_heads, n = side.n_cells;
  const int recent = std::max(first_, n - 1 - last_);  // the window: cells before first_ and from here on
  for (int h = 0; h < n_kv_heads; h++) {
    const char* keys = static_cast<const char*>(k->data) + h * k->nb[2];
    const char* values = static_cast<const char*>(v->data) + h * v->nb[2];
    std::vector<const float*> queries;
    for (int g = 0; g < group; g++) {
      queries.push_back(
          reinterpret_cast<const float*>(static_cast<const char*>(q->data) + (size_t(h) * group + g) * q->nb[2]));
    }
    std::vector<int> cells = retrieve(queries, keys, k->nb[1], &side.greatest[size_t(h) * key_dim], key_dim, recent);
    for (int cell = 0; cell < std::min(first_, n); cell++) cells.push_back(cell);
    for (int cell = recent; cell < n; cell++) cells.push_back(cell);
    for (int g = 0; g < group; g++) {
      std::vector<float> weights;
      float greatest = -INFINITY;
      for (int cell : cells) {
        const auto* key = reinterpret_cast<const uint16_t*>(keys + size_t(cell) * k->nb[1]);
        float score = 0;
        for (int d = 0; d < key_dim; d++) score += queries[g][d] * half_to_float(key[d]);
        weights.push_back(score * scale);
        greatest = std::max(greatest, weights.back());
      }
      float* out = reinterpret_cast<float*>(static_cast<char*>(node->data) + (size_t(h) * group + g) * node->nb[1]);
      std::fill_n(out, value_dim, 0.0f);
      float sum = 0;
      for (float& w : weights) sum += w = std::exp(w - greatest);
      for (size_t i = 0; i < cells.size(); i++) {
        const auto* value = reinterpret_cast<const uint16_t*>(values + size_t(cells[i]) * v->nb[1]);
        for (int d = 0; d < value_dim; d++) out[d] += weights[i] / sum * half_to_float(value[d]);
      }
    }
  }
}

}  // namespace thimble
