#include "attention/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "codec/half.h"

namespace thimble {
namespace {

constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr uint16_t kHiddenHalf = 0xfc00;
constexpr int kPrefillTokens = 64;  // query tokens to an item

bool any_visible(const Mask& mask, int n_tokens, int n_cells) {
  if (!mask.data) return true;
  for (int t = 0; t < n_tokens; t++) {
    for (int i = 0; i < n_cells; i++) {
      if (mask.data[t * mask.stride + i] != kHiddenHalf) return true;
    }
  }
  return false;
}

}  // namespace

float alibi_slope(float max_bias, int n_heads, int head) {
  if (max_bias <= 0) return 1.0f;
  const int n = 1 << int(std::floor(std::log2(float(n_heads))));
  const float m0 = std::pow(2.0f, -max_bias / float(n));
  const float m1 = std::pow(2.0f, -(max_bias / 2.0f) / float(n));
  return head < n ? std::pow(m0, float(head + 1)) : std::pow(m1, float(2 * (head - n) + 1));
}

Softmax Attention::softmax_in(std::vector<float>& storage, int n_rows) const {
  storage.resize(size_t(n_rows) * (2 + p_.value_dim));
  return {p_.value_dim, storage.data(), storage.data() + n_rows, storage.data() + 2 * n_rows};
}

void Attention::prepare(const AttentionProblem& problem, int n_threads, const Kernels& kernels) {
  p_ = problem;
  kernels_ = &kernels;
  n_threads_ = n_threads;
  const CacheShape& shape = p_.layer->keys().shape();
  group_ = p_.n_heads / shape.n_kv_heads;
  memory_.resize(n_threads);

  const int n_blocks = int((p_.n_cells + kBlockCells - 1) / kBlockCells);
  hidden_.assign(p_.n_streams, std::vector<uint64_t>(n_blocks, 0));
  exact_rows_.assign(p_.n_streams, {});
  for (const Window::Row& row : p_.layer->window().rows()) {
    const int64_t stream = row.cell / shape.cells_per_stream - p_.first_stream;
    const int64_t cell = row.cell % shape.cells_per_stream;
    if (stream < 0 || stream >= p_.n_streams || cell >= p_.n_cells) continue;
    hidden_[stream][cell / kBlockCells] |= uint64_t{1} << (cell % kBlockCells);
    exact_rows_[stream].push_back(row);
  }

  const bool decode = p_.n_tokens <= kMaxCodeTokens;
  const int tokens_per_item = decode ? std::max(p_.n_tokens, 1) : kPrefillTokens;
  items_.clear();
  for (int stream = 0; stream < p_.n_streams; stream++) {
    for (int head = 0; head < shape.n_kv_heads; head++) {
      for (int t = 0; t < p_.n_tokens; t += tokens_per_item) {
        items_.push_back({stream, head, t, std::min(tokens_per_item, p_.n_tokens - t)});
      }
    }
  }
  // Decode: all cells of all items, laid end to end, are cut into one stretch a thread, so that one long sequence uses
  // every thread whatever its number of heads. Prefill has items enough to deal out whole.
  parts_.assign(n_threads, {});
  of_item_.assign(items_.size(), {});
  const int64_t per_item = n_blocks, total = per_item * int64_t(items_.size());
  for (int thread = 0; thread < n_threads; thread++) {
    if (!decode) {
      for (size_t i = thread; i < items_.size(); i += n_threads) {
        parts_[thread].push_back({int(i), 0, n_blocks, true, {}, {}});
      }
      continue;
    }
    int64_t begin = total * thread / n_threads;
    const int64_t end = total * (thread + 1) / n_threads;
    while (begin < end) {
      const int item = int(begin / per_item);
      const int first = int(begin % per_item);
      const int last = int(std::min<int64_t>(per_item, first + (end - begin)));
      parts_[thread].push_back({item, first, last, last == per_item, {}, {}});
      begin += last - first;
    }
  }
  for (auto& parts : parts_) {
    for (Part& part : parts) of_item_[part.item].push_back(&part);
  }
}

void Attention::load_queries(const Item& item, ThreadMemory& memory, Queries& plain, Queries& coded) const {
  const HeadCodec& codec = p_.layer->keys().codec(item.kv_head);
  const int dim = codec.format.head_dim, n_rows = item.n_tokens * group_;
  memory.q.resize(size_t(n_rows) * dim);
  memory.q_coded.resize(size_t(n_rows) * dim);
  memory.bias.resize(n_rows);
  memory.slope.resize(n_rows);
  for (int row = 0; row < n_rows; row++) {
    const int head = item.kv_head * group_ + row % group_;
    const float* q = p_.q + size_t(item.stream) * p_.q_stream + size_t(item.first_token + row / group_) * p_.q_token +
                     size_t(head) * p_.q_head;
    float* scaled = &memory.q[size_t(row) * dim];
    for (int d = 0; d < dim; d++) scaled[d] = q[d] * p_.scale;
    codec.transform.query(scaled, &memory.q_coded[size_t(row) * dim]);
    memory.bias[row] = codec.transform.query_bias(scaled);
    memory.slope[row] = alibi_slope(p_.max_bias, p_.n_heads, head);
  }
  plain = {n_rows, group_, dim, memory.q.data(), nullptr, memory.slope.data(), p_.softcap};
  coded = {n_rows, group_, dim, memory.q_coded.data(), memory.bias.data(), memory.slope.data(), p_.softcap};
}

void Attention::attend_coded(const Item& item, const Part& part, const Queries& queries, ThreadMemory& memory,
                             Softmax& softmax) {
  const CacheSide &keys = p_.layer->keys(), &values = p_.layer->values();
  const int64_t cell0 = (p_.first_stream + item.stream) * keys.shape().cells_per_stream;
  const uint64_t* hidden = hidden_[item.stream].data();
  Mask mask;
  if (p_.mask) {
    mask = {p_.mask + size_t(item.stream) * p_.mask_stream + size_t(item.first_token) * p_.mask_token,
            ptrdiff_t(p_.mask_token)};
  }
  if (p_.n_tokens <= kMaxCodeTokens) {
    const CodedCells cells{&keys.codec(item.kv_head),
                           &values.codec(item.kv_head),
                           keys.block(item.kv_head, cell0),
                           values.block(item.kv_head, cell0),
                           hidden,
                           part.first_block,
                           part.last_block,
                           int(p_.n_cells)};
    kernels_->attend_codes(queries, cells, mask, softmax, memory.scratch);
    return;
  }
  memory.k_tile.resize(size_t(kBlockCells) * keys.format().head_dim);
  memory.v_tile.resize(size_t(kBlockCells) * values.format().head_dim);
  for (int b = part.first_block; b < part.last_block; b++) {
    const int64_t cell = int64_t(b) * kBlockCells;
    const int n_cells = int(std::min<int64_t>(kBlockCells, p_.n_cells - cell));
    const uint64_t present = n_cells == 64 ? ~uint64_t{0} : (uint64_t{1} << n_cells) - 1;
    if ((hidden[b] & present) == present) continue;
    if (!any_visible(mask.at(cell), item.n_tokens, n_cells)) continue;
    kernels_->decode_block(keys.codec(item.kv_head), keys.block(item.kv_head, cell0 + cell), memory.k_tile.data());
    kernels_->decode_block(values.codec(item.kv_head), values.block(item.kv_head, cell0 + cell), memory.v_tile.data());
    const Tile tile{n_cells, memory.k_tile.data(), memory.v_tile.data(), hidden[b]};
    kernels_->attend_tile(queries, tile, mask.at(cell), softmax, memory.scratch);
  }
}

void Attention::attend_exact(const Item& item, const Queries& queries, ThreadMemory& memory, Softmax& softmax) {
  const CacheSide &keys = p_.layer->keys(), &values = p_.layer->values();
  const auto& rows = exact_rows_[item.stream];
  const int64_t cells_per_stream = keys.shape().cells_per_stream;
  const int k_dim = keys.format().head_dim, v_dim = values.format().head_dim;
  memory.k_tile.assign(size_t(kBlockCells) * k_dim, 0.0f);
  memory.v_tile.resize(size_t(kBlockCells) * v_dim);
  memory.exact_mask.resize(size_t(item.n_tokens) * kBlockCells);
  for (size_t begin = 0; begin < rows.size(); begin += kBlockCells) {
    const int n_cells = int(std::min(rows.size() - begin, size_t(kBlockCells)));
    Mask mask;
    if (p_.mask) {
      for (int t = 0; t < item.n_tokens; t++) {
        const uint16_t* row_mask =
            p_.mask + size_t(item.stream) * p_.mask_stream + size_t(item.first_token + t) * p_.mask_token;
        for (int i = 0; i < n_cells; i++) {
          memory.exact_mask[t * kBlockCells + i] = row_mask[rows[begin + i].cell % cells_per_stream];
        }
      }
      mask = {memory.exact_mask.data(), kBlockCells};
      if (!any_visible(mask, item.n_tokens, n_cells)) continue;
    }
    for (int i = 0; i < n_cells; i++) {
      const uint16_t* k = keys.row_data(rows[begin + i]) + size_t(item.kv_head) * k_dim;
      const uint16_t* v = values.row_data(rows[begin + i]) + size_t(item.kv_head) * v_dim;
      for (int d = 0; d < k_dim; d++) memory.k_tile[d * kBlockCells + i] = half_to_float(k[d]);
      for (int d = 0; d < v_dim; d++) memory.v_tile[i * v_dim + d] = half_to_float(v[d]);
    }
    kernels_->attend_tile(queries, {n_cells, memory.k_tile.data(), memory.v_tile.data(), 0}, mask, softmax,
                          memory.scratch);
  }
}

void Attention::attend_part(Part& part, ThreadMemory& memory) {
  const Item& item = items_[part.item];
  Queries plain, coded;
  load_queries(item, memory, plain, coded);
  for (auto* storage : {&part.coded, &part.exact}) {
    Softmax softmax = softmax_in(*storage, plain.n_rows);
    std::fill(storage->begin(), storage->end(), 0.0f);
    std::fill_n(softmax.max, plain.n_rows, kHidden);
  }
  Softmax coded_softmax = softmax_in(part.coded, plain.n_rows), exact_softmax = softmax_in(part.exact, plain.n_rows);
  attend_coded(item, part, coded, memory, coded_softmax);
  if (part.with_exact) attend_exact(item, plain, memory, exact_softmax);
}

void Attention::attend(int thread) {
  for (Part& part : parts_[thread]) attend_part(part, memory_[thread]);
}

void Attention::combine(int thread) {
  const int dim = p_.value_dim;
  std::vector<float> coded(dim), out(dim);
  for (size_t i = thread; i < items_.size(); i += n_threads_) {
    const Item& item = items_[i];
    const Transform& transform = p_.layer->values().codec(item.kv_head).transform;
    const int n_rows = item.n_tokens * group_;
    for (int row = 0; row < n_rows; row++) {
      const int head = item.kv_head * group_ + row % group_;
      float top = p_.sinks ? p_.sinks[head] : kHidden;
      for (const Part* part : of_item_[i]) top = std::max({top, part->coded[row], part->exact[row]});
      float coded_sum = 0, exact_sum = 0;
      std::fill(coded.begin(), coded.end(), 0.0f);
      float* result = p_.out + size_t(item.stream) * p_.out_stream +
                      size_t(item.first_token + row / group_) * p_.out_token + size_t(head) * p_.out_head;
      std::fill_n(result, dim, 0.0f);
      if (top == kHidden) continue;  // nothing visible: zeros, as ggml gives
      const auto add = [&](const std::vector<float>& from, float& sum, float* to) {
        if (from[row] == kHidden) return;
        const float weight = std::exp(from[row] - top);
        sum += weight * from[n_rows + row];
        const float* acc = &from[2 * n_rows + size_t(row) * dim];
        for (int d = 0; d < dim; d++) to[d] += weight * acc[d];
      };
      for (const Part* part : of_item_[i]) {
        add(part->coded, coded_sum, coded.data());
        add(part->exact, exact_sum, result);
      }
      transform.output(coded.data(), coded_sum, out.data());
      float total = coded_sum + exact_sum;
      if (p_.sinks) total += std::exp(p_.sinks[head] - top);
      const float inverse = 1.0f / total;
      for (int d = 0; d < dim; d++) result[d] = (result[d] + out[d]) * inverse;
    }
  }
}

}  // namespace thimble
