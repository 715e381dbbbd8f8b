// A KV cache in the memory of a CUDA device.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "cuda/attend/attend.h"
#include "cuda/encode/encode.h"
#include "cuda/host/cache.h"
#include "cuda/retrieve/retrieve.h"
#include "cuda/state/saved_orders.h"
#include "cuda/state/state.h"
#include "engine/cuda/cuda_queue.h"
#include "engine/kv_cache.h"

namespace thimble {

class CudaCache : public KvCache {
public:
  CudaCache(const cuda::DeviceInfo& device, const Settings& settings, uint64_t hash)
      : device_(device), window_size_(settings.window), hash_(hash) {}

  void add_layer(const LayerPlan& plan, const LayerCodecs& codecs, uint8_t* const memory[2]) override;
  std::string refusal(const WriteTask& task) const override;
  std::string refusal(const AttendTask& task) const override;
  /// New rows wait where they are for the attention over them, or for `flush`: all is then done by few kernels.
  void write(const Lane& lane, const WriteTask& task) override;
  bool attend(const Lane& lane, const AttendTask& task, DenseAttention* dense) override;
  void end_dense(const Lane& lane, const AttendTask& task) override;
  void flush(const Lane& lane, int layer) override;
  void abandon() override;
  /// A replay leaves the books of whole batches only in order: those of all layers.
  bool can_record(size_t n_layers) const override { return n_layers == layers_.size(); }
  void read_cells(int layer, Kind kind, int64_t first, int64_t n, uint8_t* rows) override;
  RefusedRows write_cells(int layer, Kind kind, std::span<const int64_t> cells, const uint8_t* rows) override;
  int64_t keys_at_once() const override { return cuda::CellState::kKeysAtOnce; }
  KeyRows read_keys(int layer, std::span<const int64_t> cells, std::span<const int32_t> shifts) override;
  void write_keys(int layer, std::span<const int64_t> cells) override;
  void copy_stream(int layer, Kind kind, int from, int to) override;
  void clear() override;

private:
  struct Layer {
    cuda::DeviceLayer device;
    int top = 0;
    bool drop_tail = false;
    bool waits[2] = {false, false};  // by Kind: rows that were written and not taken in
    WriteTask writes[2];
  };
  Layer& layer(int index) { return *layers_.at(index); }
  void begin_batch(const WriteTask& task, cudaStream_t stream);
  cuda::EncodeArgs take_writes(Layer& layer, cudaStream_t stream);
  void attend_codes(CudaQueue& queue, Layer& layer, const AttendTask& task, const cuda::EncodeArgs& written);
  void retrieve(CudaQueue& queue, Layer& layer, int first_stream, const cuda::AttendArgs& attend);
  void prefill(CudaQueue& queue, Layer& layer, const AttendTask& task, cuda::EncodeArgs& written,
               DenseAttention* dense);
  void read_store(const Layer& layer, const cuda::DenseRows& rows, cudaStream_t stream);
  void decode(const Layer& layer, const cuda::DenseRows& rows, bool before_batch, cudaStream_t stream);
  const float* slopes(CudaQueue& queue, float max_bias, int n_heads);
  cuda::CellState state();
  std::vector<cuda::EncodeArgs> all_layers() const;
  cuda::HostWindow host_window();
  std::span<const uint32_t> orders_of(int layer, std::span<const int64_t> cells, const uint8_t* rows);

  cuda::DeviceInfo device_;
  WindowSize window_size_;
  uint64_t hash_;
  cuda::DeviceWindow window_;
  std::map<int, std::unique_ptr<Layer>> layers_;
  // The layers as code_leaving wants them. Recordings may go on reading older tables than the last.
  std::vector<cuda::DeviceMemory> leaving_;
  size_t n_leaving_ = 0;
  std::map<std::pair<float, int>, cuda::DeviceMemory> slopes_;
  cuda::DeviceMemory shifts_;
  std::unique_ptr<cuda::StateKernels> state_kernels_;  // once a state is saved or loaded
  cuda::SavedOrders saved_orders_;                     // of the first layer's keys
  std::vector<int64_t> arrived_;                       // the cells of which these were loaded last,
  std::vector<uint32_t> arrived_orders_;               // and their orders, which are all layers'
};

}  // namespace thimble
