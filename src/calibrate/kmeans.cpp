#include "calibrate/kmeans.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <stdexcept>

#include "codec/format.h"

namespace thimble {
namespace {

constexpr size_t kFewPoints = 4096;
constexpr int kMaxWidth = 8;
constexpr int kLanes = 16;  // points at a time
using Floats = float __attribute__((vector_size(kLanes * 4)));
using Ints = int32_t __attribute__((vector_size(kLanes * 4)));

// Finds the best of 128 centres for each point, 16 points at a time. `weights` [128][width], `count` a multiple of 16.
template <int width>
[[gnu::always_inline]] inline void best_centres(const Points& points, size_t count, const float* weights,
                                                const float* half_norms, uint8_t* nearest) {
  for (size_t begin = 0; begin < count; begin += kLanes) {
    Floats x[width];
    for (int j = 0; j < width; j++) std::memcpy(&x[j], points.row(j) + begin, sizeof(Floats));
    Floats best_gain = Floats{} - INFINITY;
    Ints best = {};
    for (int c = 0; c < kCodewords; c++) {
      Floats dot = x[0] * weights[c * width];
      for (int j = 1; j < width; j++) dot += x[j] * weights[c * width + j];
      // |x - s c|^2 = |x|^2 - 2 (s x.c - |c|^2 / 2), smallest for s = sign(x.c)
      const Floats gain = (Floats)((Ints)dot & 0x7fffffff) - half_norms[c];
      const Ints better = gain > best_gain;
      best = better ? Ints{} + c : best;
      best_gain = better ? gain : best_gain;
    }
    for (int i = 0; i < kLanes; i++) nearest[begin + i] = uint8_t(best[i]);
  }
}

// Calibration spends most of its time here, so the compiler makes a clone for each instruction set. Not under
// ThreadSanitizer, whose runtime is not ready yet when the loader chooses a clone.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
#define THIMBLE_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define THIMBLE_CLONES
#endif
THIMBLE_CLONES void best_centres_of(const Points& points, size_t count, const float* weights, const float* half_norms,
                                    uint8_t* nearest) {
  if (points.width == 2) best_centres<2>(points, count, weights, half_norms, nearest);
  if (points.width == 4) best_centres<4>(points, count, weights, half_norms, nearest);
  if (points.width == 8) best_centres<8>(points, count, weights, half_norms, nearest);
}

/// Takes every `step`-th point; their number is rounded down to a multiple of 16.
Points every(const Points& points, size_t step) {
  Points few{points.width, points.count / step / kLanes * kLanes, {}};
  for (int j = 0; j < points.width; j++) {
    for (size_t i = 0; i < few.count; i++) few.values.push_back(points.row(j)[i * step]);
  }
  return few;
}

/// Runs Lloyd's iterations on `points`, beginning with `centres`.
void refine(const Points& points, int iterations, std::mt19937_64& random, Centres& centres) {
  std::vector<uint8_t> nearest(points.count);
  for (int iteration = 0; iteration < iterations; iteration++) {
    assign(points, centres, nearest.data());
    double sums[kCodewords][kMaxWidth] = {};
    size_t counts[kCodewords] = {};
    for (size_t i = 0; i < points.count; i++) {
      const int c = nearest[i];
      float dot = 0;
      for (int j = 0; j < points.width; j++) dot += points.row(j)[i] * centres.values[size_t(j) * kCodewords + c];
      const float sign = dot < 0 ? -1.0f : 1.0f;
      for (int j = 0; j < points.width; j++) sums[c][j] += double(sign * points.row(j)[i]);
      counts[c]++;
    }
    for (int c = 0; c < kCodewords; c++) {
      // A centre that no point is nearest to moves to a random point.
      const size_t stray = random() % points.count;
      for (int j = 0; j < points.width; j++) {
        centres.values[size_t(j) * kCodewords + c] =
            counts[c] ? float(sums[c][j] / double(counts[c])) : points.row(j)[stray];
      }
    }
  }
}

}  // namespace

void assign(const Points& points, const Centres& centres, uint8_t* nearest) {
  std::vector<float> weights(centres.values.size());
  float half_norms[kCodewords] = {};
  for (int j = 0; j < centres.width; j++) {
    for (int c = 0; c < kCodewords; c++) {
      const float w = centres.values[size_t(j) * kCodewords + c];
      weights[size_t(c) * centres.width + j] = w;
      half_norms[c] += 0.5f * w * w;
    }
  }
  best_centres_of(points, points.count, weights.data(), half_norms, nearest);
}

Centres kmeans(const Points& points, int iterations, uint64_t seed) {
  std::mt19937_64 random(seed);
  // Most iterations run on a few points, which is fast; the last ones run on all, which is exact.
  const Points few = every(points, std::max<size_t>(1, points.count / kFewPoints)), all = every(points, 1);
  if (all.count == 0) throw std::runtime_error("too few samples to calibrate on: give a longer text");
  Centres centres{points.width, std::vector<float>(size_t(points.width) * kCodewords)};
  for (int c = 0; c < kCodewords; c++) {
    const size_t i = random() % few.count;
    for (int j = 0; j < points.width; j++) centres.values[size_t(j) * kCodewords + c] = few.row(j)[i];
  }
  refine(few, iterations, random, centres);
  refine(all, (iterations + 2) / 3, random, centres);
  return centres;
}

}  // namespace thimble
