// The linear map that makes vectors easy to quantize, y = (x - mean) A, and its inverse on the other side of the
// product. calibrate/transforms.h fits A and mean. With B = A^-1:
//   keys:    q.k = (q B^T).y + q.mean                `query` maps queries, and q.mean is `query_bias`
//   values:  sum p v = (sum p y) B + (sum p) mean    `output` maps each output vector once
#pragma once

#include <vector>

namespace thimble {

/// The loops inside a transform. Sums run in index order without fused multiply-adds, so that every instruction set
/// produces the same bits.
struct TransformOps {
  /// out[r] = x[r] m, for rows of dim numbers and m [dim][dim].
  void (*times_matrix)(const float* x, int n_rows, const float* m, int dim, float* out);
  /// Walsh-Hadamard butterflies in place, in blocks of `block` numbers, then all times `norm`.
  void (*hadamard)(float* x, int n, int block, float norm);
};
extern const TransformOps kPlainTransformOps;

class Transform {
public:
  /// y = x.
  static Transform identity(int head_dim);
  /// Orthonormal Walsh-Hadamard, in blocks of the largest power of two that divides head_dim. Needs no calibration.
  static Transform hadamard(int head_dim);
  /// Each number times one of `stretch` [head_dim], then the same. A general map, so that it takes as long as `dense`.
  /// Throws std::invalid_argument where a number of `stretch` is 0 or not finite.
  static Transform stretched_hadamard(const std::vector<float>& stretch);
  /// A general map: `mean` [head_dim], `matrix` = A [head_dim][head_dim] row-major. Throws std::invalid_argument where
  /// A is singular or anything is not finite.
  static Transform dense(std::vector<float> mean, std::vector<float> matrix);

  /// This map for vectors that somebody has rotated by an orthonormal Walsh-Hadamard matrix before, in blocks of
  /// `block` numbers. Where this is such a rotation itself, the one is as good as the other: theirs stays alone.
  Transform behind_hadamard(int block) const;

  int head_dim() const { return head_dim_; }

  // Each reads and writes n_rows rows of [head_dim]; input and output must not overlap.
  void forward(const float* x, float* y, int n_rows = 1, const TransformOps& ops = kPlainTransformOps) const;
  void query(const float* q, float* y, int n_rows = 1, const TransformOps& ops = kPlainTransformOps) const;
  /// `weights` [n_rows] are the sums of the attention weights behind y: 1, or less where learned sinks take a share.
  void output(const float* y, const float* weights, float* out, int n_rows, const TransformOps& ops) const;
  void output(const float* y, float weight, float* out) const { output(y, &weight, out, 1, kPlainTransformOps); }
  /// Computes x from y, both [head_dim].
  void inverse(const float* y, float* x) const { output(y, 1.0f, x); }
  float query_bias(const float* q) const;

  bool is_dense() const { return kind_ == Kind::dense; }
  /// Numbers that a Walsh-Hadamard rotation takes together; 1 where this is none.
  int hadamard_block() const { return hadamard_block_; }
  const std::vector<float>& mean() const { return mean_; }
  const std::vector<float>& matrix() const { return a_; }
  const std::vector<float>& inverse_matrix() const { return b_; }
  const std::vector<float>& query_matrix() const { return b_transposed_; }

private:
  enum class Kind { identity, hadamard, dense };
  Kind kind_ = Kind::identity;
  int head_dim_ = 0;
  int hadamard_block_ = 1;
  std::vector<float> mean_, a_, b_, b_transposed_;  // dense only
};

}  // namespace thimble
