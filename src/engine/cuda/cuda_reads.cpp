// Layers that the program around attends to, on rows that are decoded for it.
#include <utility>

#include "engine/cuda/cuda_cache.h"

namespace thimble {

// The window takes the batch in, and its rows wait to be written there and to be coded.
void CudaCache::take_off(CudaQueue& queue, Layer& layer, const BatchQueries& queries) {
  const int n_kv_heads = layer.device.shape().n_kv_heads;
  const bool judges = queries.data && queries.dim == layer.device.head_dim() && queries.n_heads % n_kv_heads == 0 &&
                      queries.dim <= cuda::kMaxJudgedDim && queries.dim % 8 == 0;
  if (judges) keep_queries(layer, queries.n_heads);
  const WriteTask& write = layer.writes[int(layer.waits[int(Kind::key)] ? Kind::key : Kind::value)];
  const BatchSight sight = write.sight;
  cuda::EncodeArgs p = take_writes(queue, layer, judges ? queries : BatchQueries{});
  if (p.n_tokens == 0) return;
  if (flight_.layer && flight_.batch != batch_) land(queue);
  const cuda::DeviceWindow& window = layer.device.window();
  const bool is_prompt = p.n_tokens > cuda::kMaxTokens * sight.n_streams;
  if (judges && !is_prompt && window.is_judged()) {
    cuda::KeepQueriesArgs keep;
    keep.n_streams = sight.n_streams;
    keep.n_tokens = int(sight.n_tokens);
    keep.n_heads = queries.n_heads;
    keep.head_dim = queries.dim;
    keep.queries = queries.data;
    keep.stream_stride = queries.stream;
    keep.token_stride = queries.token;
    keep.head_stride = queries.head;
    keep.n_judges = window.n_judges();
    keep.judges = window.judges(sight.first_stream);
    keep.kept = window.queries(sight.first_stream);
    require(cuda::keep_queries(device_, keep, queue.stream()), "queries");
  }
  const cuda::EncodeArgs before = flight_.args;
  const bool joins = flight_.layer != nullptr;
  const auto copy = [&](cuda::DeviceMemory& memory, const void* from, size_t row, size_t pitch) {
    char* to = queue.room<char>(memory, row * size_t(p.n_tokens));
    require(cudaMemcpy2DAsync(to, row, from, pitch, row, size_t(p.n_tokens), cudaMemcpyDefault, queue.stream()),
            "rows of the batch");
    return to;
  };
  for (Kind kind : {Kind::key, Kind::value}) {
    const bool is_key = kind == Kind::key;
    const float*& rows = is_key ? p.keys : p.values;
    size_t& stride = is_key ? p.key_token_stride : p.value_token_stride;
    const size_t numbers = size_t(n_kv_heads) * layer.device.head_dim(kind);
    if (rows) {
      const char* copied = copy(flight_memory_[int(kind)], rows, numbers * sizeof(float), stride * sizeof(float));
      rows = reinterpret_cast<const float*>(copied);
      stride = numbers;
    } else if (joins) {
      rows = is_key ? before.keys : before.values;
      stride = numbers;
      (is_key ? p.key_head_stride : p.value_head_stride) = size_t(layer.device.head_dim(kind));
    }
  }
  if (!joins || p.cells != before.cells) {
    p.cells = reinterpret_cast<const int64_t*>(copy(flight_memory_[2], p.cells, sizeof(int64_t), sizeof(int64_t)));
  }
  flight_ = {&layer, is_prompt, batch_, p};
}

// Takes the rows that are in flight into the window, and codes those that have no row there.
void CudaCache::land(CudaQueue& queue) {
  const Flight flight = std::exchange(flight_, {});
  if (flight.layer) encode(*flight.layer, flight.args, queue.stream());
}

void CudaCache::read(const Lane& lane, const ReadTask& task) {
  CudaQueue& queue = queue_of(lane);
  Layer& of = layer(task.layer);
  if (of.waits[0] || of.waits[1]) take_off(queue, of, task.queries);
  const cuda::DeviceLayer& device = of.device;
  const bool is_key = task.kind == Kind::key, flies = flight_.layer == &of;
  cuda::ReadRowsArgs r;
  r.side = cuda::side_of(device.encode_args(), task.kind);
  r.first_stream = task.first_stream;
  r.n_streams = task.n_streams;
  r.n_cells = int(task.n_cells);
  // While a prompt is read the window still holds the rows of before.
  r.window_cells = flies && flight_.is_prompt ? scratch_.kept_cells() : device.window().cells(0);
  const float* rows = is_key ? flight_.args.keys : flight_.args.values;
  if (flies && rows) r.flight = {flight_.args.n_tokens, flight_.args.cells, rows};
  r.exact = queue.room<int32_t>(queue.exact, size_t(task.n_streams) * device.shape().cells_per_stream);
  r.transposed = task.transposed;
  r.out = task.rows;
  r.out_stride = task.row_stride;
  require(cuda::read_rows(device_, r, queue.stream()), "decoding");
}

}  // namespace thimble
