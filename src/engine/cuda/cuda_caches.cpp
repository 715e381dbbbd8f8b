#include "engine/cuda/cuda_caches.h"

#include <algorithm>
#include <iterator>

namespace thimble {

void CudaCaches::add_layer(const LayerPlan& plan, const LayerCodecs& codecs, uint8_t* const memory[2]) {
  const auto fitting =
      std::find_if(caches_.begin(), caches_.end(), [&](const auto& cache) { return cache->fits(plan); });
  if (fitting != caches_.end()) {
    (*fitting)->add_layer(plan, codecs, memory);
    by_layer_[plan.layer] = fitting->get();
    return;
  }
  auto cache = std::make_unique<CudaCache>(device_);
  cache->add_layer(plan, codecs, memory);
  by_layer_[plan.layer] = cache.get();
  caches_.push_back(std::move(cache));
}

std::string CudaCaches::refusal(const WriteTask& task) const {
  if (!task.is_f16 && task.is_i64) return {};
  return "new keys and values must be f32 and their cells 64-bit numbers on a CUDA device";
}

std::string CudaCaches::refusal(const AttendTask& task) const {
  if (task.problem.n_cells % kBlockCells != 0) return "its cells are no multiple of 64";
  return {};
}

void CudaCaches::end_graph(const Lane& lane) {
  for (const auto& cache : caches_) cache->end_graph(lane);
}

void CudaCaches::abandon() {
  for (const auto& cache : caches_) cache->abandon();
}

void CudaCaches::clear() {
  for (const auto& cache : caches_) cache->clear();
}

void CudaCaches::begin_recording() {
  for (const auto& cache : caches_) cache->begin_recording();
}

std::vector<RecordedWrites> CudaCaches::end_recording(bool will_be_done) {
  std::vector<RecordedWrites> all;
  for (const auto& cache : caches_) std::ranges::copy(cache->end_recording(will_be_done), std::back_inserter(all));
  return all;
}

// Each cache counts its own layers' batches, so their order among caches says nothing.
bool CudaCaches::take_recorded(const std::vector<RecordedWrites>& writes) {
  std::vector<std::vector<uint64_t>> before;
  for (const auto& cache : caches_) {
    std::vector<RecordedWrites> own;
    std::ranges::copy_if(writes, std::back_inserter(own),
                         [&](const RecordedWrites& w) { return by_layer_.at(w.layer) == cache.get(); });
    before.push_back(cache->counted());
    if (cache->take_recorded(own)) continue;
    for (size_t i = 0; i < before.size(); i++) caches_[i]->set_counted(before[i]);
    return false;
  }
  return true;
}

}  // namespace thimble
