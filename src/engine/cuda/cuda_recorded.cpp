// What the host counts of batches, and how recordings that are done again keep it in order. The counts say which layer
// of a batch is written first: then the windows of all layers take the batch in.
#include <utility>

#include "engine/cuda/cuda_cache.h"

namespace thimble {

void CudaCache::count_batch(Layer& layer, Kind kind) {
  uint64_t& batch = layer.batch[int(kind)];
  if (batch == batch_) batch_++;  // the first of this batch to be written
  batch = batch_;
}

std::vector<uint64_t> CudaCache::counted() const {
  std::vector<uint64_t> counts = {batch_};
  for (const auto& [number, layer] : layers_) {
    counts.insert(counts.end(), {layer->batch[0], layer->batch[1], layer->window_batch});
  }
  return counts;
}

void CudaCache::set_counted(const std::vector<uint64_t>& counts) {
  auto next = counts.begin();
  batch_ = *next++;
  for (const auto& [number, layer] : layers_) {
    for (uint64_t* count : {&layer->batch[0], &layer->batch[1], &layer->window_batch}) *count = *next++;
  }
}

void CudaCache::begin_recording() {
  is_recording_ = true;
  recorded_.clear();
  before_recording_ = counted();
}

std::vector<RecordedWrites> CudaCache::end_recording(bool will_be_done) {
  is_recording_ = false;
  if (!will_be_done) set_counted(before_recording_);
  return std::exchange(recorded_, {});
}

bool CudaCache::take_recorded(const std::vector<RecordedWrites>& writes) {
  const std::vector<uint64_t> before = counted();
  for (const RecordedWrites& recorded : writes) {
    Layer& written = layer(recorded.layer);
    for (Kind kind : {Kind::key, Kind::value}) {
      if (recorded.has[int(kind)]) count_batch(written, kind);
    }
    const bool takes_batch = written.window_batch != batch_;
    if (takes_batch != recorded.takes_batch || layers_.size() != recorded.n_layers) {
      set_counted(before);
      return false;
    }
    if (!takes_batch) continue;
    for (const auto& [number, layer] : layers_) layer->window_batch = batch_;
  }
  return true;
}

}  // namespace thimble
