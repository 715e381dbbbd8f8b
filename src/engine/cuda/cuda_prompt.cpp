// Prompts whose layers end together.
//
// What a batch leaves to be done, scores, books, choice and coding, needs nothing but the rows of its tokens and the
// means of the queries that decide. So a layer keeps these, and the end is made for many layers at once, by kernels
// that fill the device, while the host prepares the next graph.
#include <algorithm>
#include <utility>

#include "engine/cuda/cuda_cache.h"

namespace thimble {
namespace {

// Of device memory, for the rows of tokens that are not coded yet; more only where one layer's need more.
constexpr size_t kStagedBytes = size_t(64) << 20;
// For the means of queries; more only where one layer's need more.
constexpr size_t kMeanBytes = size_t(64) << 20;
// For lists of the books of all layers. Where they need more, each layer ends by itself.
constexpr size_t kListBytes = size_t(64) << 20;

}  // namespace

// Whether all layers attend to codes, and code what their windows leave.
bool CudaCache::ends_together() const {
  return std::all_of(layers_.begin(), layers_.end(), [](const auto& entry) {
    const cuda::DeviceLayer& device = entry.second->device;
    return !device.is_read_as_rows() && !device.has_store() &&
           device.head_dim(Kind::key) == device.head_dim(Kind::value);
  });
}

// Begins the books of all layers. Returns whether they end together.
bool CudaCache::begin_prompt(CudaQueue& queue, const WriteTask& task, const cuda::EncodeArgs& p,
                             const BatchQueries& queries) {
  if (!ends_together()) return false;
  const cudaStream_t stream = queue.stream();
  const cuda::BatchMask mask = mask_of(task.sight);
  end_prompt(stream);
  cuda::WindowArgs args = scratch_.batch(p.cells, int(task.n_rows), mask);
  args.n_layers = int(layers_.size());
  const size_t list_bytes = scratch_.prompt_bytes(args);
  if (list_bytes > kListBytes) return false;
  size_t side = sizeof(uint16_t);  // bytes of a layer's keys or values
  for (const auto& [index, layer] : layers_) {
    side = std::max(side, size_t(task.n_rows) * layer->device.row_bytes(Kind::key));
    // A layer that was never attended to has as many queries for a KV head as this one; else that shows soon.
    if (!queries.data || layer->device.window().is_judged()) continue;
    keep_queries(*layer, queries.n_heads / p.n_kv_heads * layer->device.shape().n_kv_heads);
  }
  prompt_.max_layers = std::clamp<size_t>(kStagedBytes / (2 * side), 1, cuda::StagedRows::kMaxLayers);
  prompt_.max_layers = std::min(prompt_.max_layers, layers_.size());
  scratch_.add_prompt(&args, queue.room<char>(prompt_.lists, list_bytes));
  place_means(queue, args, mask);
  prompt_.staged.rows = reinterpret_cast<uint16_t*>(queue.room<char>(prompt_.rows, prompt_.max_layers * 2 * side));
  prompt_.staged.side_stride = side / sizeof(uint16_t);
  prompt_.staged.n_tokens = args.n_tokens;
  // The next graph may write other cells to the memory that these come from.
  int64_t* cells = queue.room<int64_t>(prompt_.cells, args.n_tokens);
  require(cudaMemcpyAsync(cells, p.cells, args.n_tokens * sizeof(int64_t), cudaMemcpyDefault, stream), "cells");
  args.cells = prompt_.staged.cells = cells;
  args.layers = window_tables_.back().as<cuda::LayerWindow>();
  // What the batch before left to leave has a list of its own, coded before: tokens may come to these cells, and the
  // end of this batch codes its tokens beside the list that the window makes since.
  cuda::WindowArgs before = scratch_.finish();
  before.layers = args.layers;
  before.n_layers = args.n_layers;
  args.part = cuda::WindowArgs::begin;
  for (const cuda::WindowArgs& part : {before, args}) {
    require(cuda::update_window(device_, part, stream), "the window");
    code_leaving(leaving(0, layers_.size(), cuda::kMaxTokens * args.n_streams), stream);
  }
  for (auto& [index, layer] : layers_) layer->window_batch = batch_;
  prompt_.args = args;
  prompt_.batch = batch_;
  prompt_.has_begun = false;
  return true;
}

// Room for what the queries of the layers that are staged say.
void CudaCache::place_means(CudaQueue& queue, const cuda::WindowArgs& args, const cuda::BatchMask& mask) {
  prompt_.mask = mask;
  cuda::JudgeMeans& means = prompt_.means;
  means.n_jobs = std::min(args.judge.max_entries / cuda::kJudgeTile, cuda::kMaxJudgeJobs);
  size_t most = 0;  // numbers of a token's queries
  for (const auto& [index, layer] : layers_) {
    const cuda::LayerWindow& window = layer->device.window().view();
    if (window.queries) most = std::max(most, size_t(window.n_kv_heads) * window.group * window.head_dim);
  }
  means.layer_stride = most * means.n_jobs * mask.n_streams;
  if (most == 0) return;
  const size_t bytes = means.layer_stride * sizeof(float);
  prompt_.max_layers = std::min(prompt_.max_layers, std::max<size_t>(kMeanBytes / bytes, 1));
  means.data = queue.room<float>(prompt_.judged, prompt_.max_layers * means.layer_stride);
}

// The scores of the cells in question in the layers that are staged, whose windows are `args`'.
void CudaCache::judge_staged(const cuda::WindowArgs& args, cudaStream_t stream) {
  if (prompt_.means.layers == 0) return;
  cuda::JudgeArgs judge;
  judge.layers = args.layers;
  judge.n_layers = args.n_layers;
  judge.list = args.judge;
  judge.n_streams = args.n_streams;
  for (const auto& [index, layer] : layers_) {
    judge.n_kv_heads = std::max(judge.n_kv_heads, layer->device.shape().n_kv_heads);
  }
  judge.capacity = args.capacity;
  judge.n_judges = args.n_judges;
  judge.first_stream = prompt_.mask.first_stream;
  judge.n_batch_streams = prompt_.mask.n_streams;
  judge.stream_tokens = prompt_.mask.n_tokens;
  judge.staged = prompt_.staged;
  judge.means = prompt_.means;
  require(cuda::judge_cells(device_, judge, stream), "the window");
}

// Takes the layers that are staged to their end.
void CudaCache::end_prompt(cudaStream_t stream) {
  if (prompt_.n == 0) return;
  const size_t n = std::exchange(prompt_.n, 0);
  prompt_.has_begun = false;
  cuda::WindowArgs args = cuda::WindowScratch::from_layer(prompt_.args, prompt_.first, n);
  judge_staged(args, stream);
  args.part = cuda::WindowArgs::end;
  require(cuda::update_window(device_, args, stream), "the window");
  cuda::LeaveArgs leave = leaving(prompt_.first, n, args.n_tokens);
  leave.staged = prompt_.staged;
  leave.staged.slots = args.token_slots;
  code_leaving(leave, stream);
  require(cuda::place_staged(device_, leave, stream), "rows of the window");
  for (auto& [index, layer] : layers_) {
    if (layer->index >= prompt_.first && layer->index < prompt_.first + n) layer->ended_batch = prompt_.batch;
  }
}

// A layer's number among those that are staged. Without room for it, or where it is not the next one, these end first.
size_t CudaCache::stage(Layer& layer, cudaStream_t stream) {
  size_t index = layer.index - prompt_.first;
  if (prompt_.n > 0 && (layer.index < prompt_.first || index > prompt_.n || index >= prompt_.max_layers)) {
    end_prompt(stream);
  }
  if (prompt_.n == 0) {
    prompt_.first = layer.index;
    prompt_.staged.layers[0] = prompt_.staged.layers[1] = prompt_.means.layers = 0;
    index = 0;
  }
  prompt_.n = std::max(prompt_.n, index + 1);
  return index;
}

// For prepare_prompt to keep the tokens' rows.
cuda::PromptArgs CudaCache::staging(size_t index, const cuda::EncodeArgs& p) {
  cuda::PromptArgs prompt;
  prompt.batch = p;
  prompt.staged_keys = prompt_.staged.of(int(index), true);
  prompt.staged_values = prompt_.staged.of(int(index), false);
  if (p.keys) prompt_.staged.layers[0] |= 1u << index;
  if (p.values) prompt_.staged.layers[1] |= 1u << index;
  prompt.queries.n_streams = 0;
  return prompt;
}

// Keeps rows that nobody attends to yet. Where the layer has ended already, they are coded at once.
void CudaCache::stage_alone(CudaQueue& queue, Layer& layer, const cuda::EncodeArgs& written) {
  if (layer.ended_batch == batch_) {
    cuda::EncodeArgs late = written;
    late.window.slots = cuda::WindowScratch::from_layer(prompt_.args, layer.index, 1).token_slots;
    return encode(layer, late, queue.stream());
  }
  const size_t index = stage(layer, queue.stream());
  require(cuda::prepare_prompt(device_, staging(index, written), queue.stream()), "rows of a prompt");
}

void CudaCache::end_graph(const Lane& lane) {
  CudaQueue& queue = queue_of(lane);
  land(queue);
  end_prompt(queue.stream());
}

}  // namespace thimble
