#include "calibrate/norm_weights.h"

#include <ggml-backend.h>
#include <ggml.h>

#include <string_view>

namespace thimble {
namespace {

bool keeps_numbers(ggml_op op) {
  switch (op) {
    case GGML_OP_NONE:
    case GGML_OP_VIEW:
    case GGML_OP_RESHAPE:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE:
    case GGML_OP_ROPE:
    case GGML_OP_SCALE:
    case GGML_OP_CONT:
    case GGML_OP_CPY:
      return true;
    default:
      return false;
  }
}

}  // namespace

int rotated_by(const ggml_tensor* rows) {
  for (int depth = 0; rows && depth < 8; depth++, rows = rows->src[0]) {
    if (rows->op != GGML_OP_MUL_MAT) continue;
    const ggml_tensor* matrix = rows->src[0];
    const std::string_view name = matrix->name;
    const bool is_rotation = name.find("attn_inp_k_rot") != name.npos || name.find("attn_inp_v_rot") != name.npos;
    return is_rotation ? int(matrix->ne[0]) : 0;
  }
  return 0;
}

std::vector<float> norm_weights(const ggml_tensor* x, bool* unread) {
  for (int depth = 0; x && depth < 12; depth++) {
    if (x->op == GGML_OP_MUL && (x->src[0]->op == GGML_OP_RMS_NORM || x->src[0]->op == GGML_OP_NORM)) {
      const ggml_tensor* weights = x->src[1];
      if (!weights->buffer || !weights->data) return {};
      if (weights->type != GGML_TYPE_F32 || !ggml_is_contiguous(weights)) {
        *unread = true;
        return {};
      }
      std::vector<float> numbers(ggml_nelements(weights));
      ggml_backend_tensor_get(weights, numbers.data(), 0, ggml_nbytes(weights));
      return numbers;
    }
    if (!keeps_numbers(x->op) && x->op != GGML_OP_MUL_MAT) return {};
    if (x->op == GGML_OP_MUL_MAT && rotated_by(x) == 0) return {};
    x = x->src[x->op == GGML_OP_MUL_MAT ? 1 : 0];
  }
  return {};
}

}  // namespace thimble
