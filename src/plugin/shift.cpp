#include "plugin/shift.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "codec/transform.h"
#include "plugin/kv_buffer.h"

namespace thimble {
namespace {

// A tensor for the inner backend in memory of the engine's. `row`: bytes from one head to the next.
ggml_tensor stand_in(ggml_backend_buffer_t buffer, ggml_type type, void* data, std::array<int64_t, 3> ne, size_t row) {
  ggml_tensor tensor{};
  tensor.type = type;
  tensor.buffer = buffer;
  tensor.data = data;
  std::copy(ne.begin(), ne.end(), tensor.ne);
  tensor.ne[3] = 1;
  tensor.nb[0] = ggml_type_size(type);
  tensor.nb[1] = row;
  tensor.nb[2] = ne[1] * row;
  tensor.nb[3] = ne[2] * tensor.nb[2];
  return tensor;
}

}  // namespace

void shift_keys(const ggml_tensor* node, const std::function<void(ggml_tensor*)>& run) {
  const ManagedLayer& layer = *KvBuffer::layer_of(node);
  if (!layer.plan) return;  // nothing was ever written
  KvBuffer& buffer = *KvBuffer::of(node);
  KvCache& cache = buffer.cache();
  const ggml_tensor *view = node->src[0], *by = node->src[1];
  std::vector<int32_t> shift_of(by->ne[0]);
  ggml_backend_tensor_get(by, shift_of.data(), 0, shift_of.size() * sizeof(int32_t));
  std::vector<int64_t> moved;
  for (int64_t cell = 0; cell < view->ne[2]; cell++) {
    if (shift_of[cell] != 0) moved.push_back(cell);
  }

  // Of a latent row, the keys' side has what is rotated.
  const int64_t latent = layer.plan->latent, row_size = root_of(view)->ne[0] - latent, n_heads = view->ne[1];
  const int64_t first_number =
      int64_t(view->view_offs % root_of(view)->nb[1] / sizeof(uint16_t)) - latent;  // rotated part of a head
  if (first_number < 0)
    throw std::runtime_error("this model rotates numbers of its cache that Thimble keeps as values");
  const size_t row = size_t(row_size / n_heads) * sizeof(float);
  for (size_t first = 0; first < moved.size(); first += size_t(cache.keys_at_once())) {
    const size_t n = std::min(moved.size() - first, size_t(cache.keys_at_once()));
    const std::span<const int64_t> cells(moved.data() + first, n);
    std::vector<int32_t> shifts;
    for (int64_t cell : cells) shifts.push_back(shift_of[cell]);
    const KeyRows rows = cache.read_keys(layer.index, cells, shifts);

    ggml_tensor keys =
        stand_in(buffer.inner(), GGML_TYPE_F32, rows.keys + first_number, {view->ne[0], n_heads, int64_t(n)}, row);
    ggml_tensor positions = stand_in(buffer.inner(), GGML_TYPE_I32, const_cast<int32_t*>(rows.shifts),
                                     {int64_t(n), 1, 1}, n * sizeof(int32_t));
    ggml_tensor rotate = keys;
    rotate.op = GGML_OP_ROPE;
    rotate.flags = node->flags;
    std::copy(std::begin(node->op_params), std::end(node->op_params), rotate.op_params);
    rotate.src[0] = &keys;
    rotate.src[1] = &positions;
    rotate.src[2] = node->src[2];
    // llama.cpp takes the rotation of a quantized cache back before it shifts, and the cache says that it is f16.
    const auto rotate_heads = [&] {
      const int block = layer.plan->rotated[int(Kind::key)];
      if (block == 0) return;
      std::vector<float> numbers(n * size_t(row_size));
      const int64_t size = int64_t(numbers.size());
      ggml_tensor all =
          stand_in(buffer.inner(), GGML_TYPE_F32, rows.keys, {size, 1, 1}, numbers.size() * sizeof(float));
      ggml_backend_tensor_get(&all, numbers.data(), 0, numbers.size() * sizeof(float));
      kPlainTransformOps.hadamard(numbers.data(), int(size), block, 1.0F / std::sqrt(float(block)));
      ggml_backend_tensor_set(&all, numbers.data(), 0, numbers.size() * sizeof(float));
    };
    rotate_heads();
    run(&rotate);
    rotate_heads();
    cache.write_keys(layer.index, cells);
  }
}

}  // namespace thimble
