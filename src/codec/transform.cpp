#include "codec/transform.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <stdexcept>
#include <string>

#include "codec/format.h"

namespace thimble {
namespace {

void times_matrix(const float* x, int n_rows, const float* m, int dim, float* out) {
  for (int r = 0; r < n_rows; r++, x += dim, out += dim) {
    std::fill_n(out, dim, 0.0f);
    for (int i = 0; i < dim; i++) {
      for (int j = 0; j < dim; j++) out[j] += x[i] * m[size_t(i) * dim + j];
    }
  }
}

void hadamard_in_place(float* x, int n, int block, float norm) {
  for (int half = 1; half < block; half *= 2) {
    for (int i = 0; i < n; i += 2 * half) {
      for (int j = i; j < i + half; j++) {
        const float a = x[j], b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
    }
  }
  for (int i = 0; i < n; i++) x[i] *= norm;
}

// Gauss-Jordan with partial pivoting, in double.
std::vector<float> inverse_of(const std::vector<float>& matrix, int n) {
  std::vector<double> a(matrix.begin(), matrix.end());
  std::vector<double> b(size_t(n) * n, 0.0);
  for (int i = 0; i < n; i++) b[size_t(i) * n + i] = 1.0;
  double largest = 0;
  for (double v : a) largest = std::max(largest, std::fabs(v));
  for (int col = 0; col < n; col++) {
    int pivot = col;
    for (int r = col + 1; r < n; r++) {
      if (std::fabs(a[size_t(r) * n + col]) > std::fabs(a[size_t(pivot) * n + col])) pivot = r;
    }
    if (!(std::fabs(a[size_t(pivot) * n + col]) > largest * 1e-12)) {
      throw std::invalid_argument("transform matrix is singular at column " + std::to_string(col));
    }
    if (pivot != col) {
      std::swap_ranges(&a[size_t(col) * n], &a[size_t(col) * n] + n, &a[size_t(pivot) * n]);
      std::swap_ranges(&b[size_t(col) * n], &b[size_t(col) * n] + n, &b[size_t(pivot) * n]);
    }
    const double inv = 1.0 / a[size_t(col) * n + col];
    for (int j = 0; j < n; j++) {
      a[size_t(col) * n + j] *= inv;
      b[size_t(col) * n + j] *= inv;
    }
    for (int r = 0; r < n; r++) {
      const double f = a[size_t(r) * n + col];
      if (r == col || f == 0) continue;
      for (int j = 0; j < n; j++) {
        a[size_t(r) * n + j] -= f * a[size_t(col) * n + j];
        b[size_t(r) * n + j] -= f * b[size_t(col) * n + j];
      }
    }
  }
  return {b.begin(), b.end()};
}

}  // namespace

const TransformOps kPlainTransformOps{times_matrix, hadamard_in_place};

Transform Transform::identity(int head_dim) {
  Transform t;
  t.head_dim_ = head_dim;
  return t;
}

Transform Transform::hadamard(int head_dim) {
  Transform t;
  t.kind_ = Kind::hadamard;
  t.head_dim_ = head_dim;
  t.hadamard_block_ = head_dim & -head_dim;
  return t;
}

Transform Transform::dense(std::vector<float> mean, std::vector<float> matrix) {
  const size_t n = mean.size();
  if (n == 0 || n > size_t(kMaxHeadDim) || matrix.size() != n * n) {
    throw std::invalid_argument("transform: mean and matrix sizes disagree");
  }
  const auto finite = [](const std::vector<float>& v) {
    return std::all_of(v.begin(), v.end(), [](float f) { return std::isfinite(f); });
  };
  if (!finite(mean) || !finite(matrix)) throw std::invalid_argument("transform holds a number that is not finite");
  Transform t;
  t.kind_ = Kind::dense;
  t.head_dim_ = int(n);
  t.b_ = inverse_of(matrix, int(n));
  if (!finite(t.b_)) throw std::invalid_argument("transform matrix has no finite inverse");
  t.b_transposed_.resize(n * n);
  for (size_t i = 0; i < n; i++) {
    for (size_t j = 0; j < n; j++) t.b_transposed_[i * n + j] = t.b_[j * n + i];
  }
  t.mean_ = std::move(mean);
  t.a_ = std::move(matrix);
  return t;
}

Transform Transform::stretched_hadamard(const std::vector<float>& stretch) {
  const size_t n = stretch.size();
  const Transform rotation = hadamard(int(n));
  std::vector<float> matrix(n * n, 0.0f), unit(n, 0.0f);
  for (size_t i = 0; i < n; i++) {
    unit[i] = stretch[i];
    rotation.forward(unit.data(), &matrix[i * n]);
    unit[i] = 0;
  }
  return dense(std::vector<float>(n, 0.0f), std::move(matrix));
}

// x' = x R, so y = (x' R - mean) A = (x' - mean R) (R A), since R R = 1 and R is symmetric.
Transform Transform::behind_hadamard(int block) const {
  if (kind_ != Kind::dense) return identity(head_dim_);
  const size_t n = size_t(head_dim_);
  const float norm = 1.0f / std::sqrt(float(block));
  std::vector<float> mean = mean_, matrix(n * n), column(n);
  kPlainTransformOps.hadamard(mean.data(), head_dim_, block, norm);
  for (size_t c = 0; c < n; c++) {
    for (size_t r = 0; r < n; r++) column[r] = a_[r * n + c];
    kPlainTransformOps.hadamard(column.data(), head_dim_, block, norm);
    for (size_t r = 0; r < n; r++) matrix[r * n + c] = column[r];
  }
  return dense(std::move(mean), std::move(matrix));
}

void Transform::forward(const float* x, float* y, int n_rows, const TransformOps& ops) const {
  const int n = head_dim_;
  for (int r = 0; r < n_rows; r++, x += n, y += n) {
    if (kind_ == Kind::dense) {
      float centred[kMaxHeadDim];
      for (int i = 0; i < n; i++) centred[i] = x[i] - mean_[i];
      ops.times_matrix(centred, 1, a_.data(), n, y);
    } else {
      std::copy_n(x, n, y);
      if (kind_ == Kind::hadamard) ops.hadamard(y, n, hadamard_block_, 1.0f / std::sqrt(float(hadamard_block_)));
    }
  }
}

void Transform::query(const float* q, float* y, int n_rows, const TransformOps& ops) const {
  if (kind_ == Kind::dense) return ops.times_matrix(q, n_rows, b_transposed_.data(), head_dim_, y);
  forward(q, y, n_rows, ops);
}

void Transform::output(const float* y, const float* weights, float* out, int n_rows, const TransformOps& ops) const {
  if (kind_ != Kind::dense) return forward(y, out, n_rows, ops);
  ops.times_matrix(y, n_rows, b_.data(), head_dim_, out);
  for (int r = 0; r < n_rows; r++, out += head_dim_) {
    for (int i = 0; i < head_dim_; i++) out[i] += weights[r] * mean_[i];
  }
}

float Transform::query_bias(const float* q) const {
  float bias = 0;
  if (kind_ == Kind::dense) {
    for (int i = 0; i < head_dim_; i++) bias += q[i] * mean_[i];
  }
  return bias;
}

}  // namespace thimble
