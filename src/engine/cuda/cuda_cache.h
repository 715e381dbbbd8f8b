// A KV cache in the memory of a CUDA device, whose layers have the same cells.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "cuda/attend/attend.h"
#include "cuda/encode/bias.h"
#include "cuda/encode/encode.h"
#include "cuda/host/cache.h"
#include "cuda/retrieve/retrieve.h"
#include "cuda/rows/rows.h"
#include "cuda/state/saved_orders.h"
#include "cuda/state/state.h"
#include "engine/cuda/cuda_queue.h"
#include "engine/kv_cache.h"

namespace thimble {

inline cuda::BatchMask mask_of(const BatchSight& sight) {
  return {sight.mask,      sight.mask_token,   sight.mask_stream, int(sight.n_tokens),
          sight.n_streams, sight.first_stream, int(sight.n_cells)};
}

class CudaCache : public KvCache {
public:
  explicit CudaCache(const cuda::DeviceInfo& device) : device_(device) {}

  /// Whether a layer has the cells that those which were added have; the first one fits.
  bool fits(const LayerPlan& plan) const;
  void add_layer(const LayerPlan& plan, const LayerCodecs& codecs, uint8_t* const memory[2]) override;
  /// New rows wait where they are for the attention over them, or for `flush`: all is then done by few kernels.
  void write(const Lane& lane, const WriteTask& task) override;
  bool attend(const Lane& lane, const AttendTask& task, DenseAttention* dense) override;
  void end_dense(const Lane& lane, const AttendTask& task) override;
  /// The window takes a batch in when a layer is read first; its rows are in flight until the graph comes to another
  /// layer or ends.
  void read(const Lane& lane, const ReadTask& task) override;
  void end_graph(const Lane& lane) override;
  void flush(const Lane& lane, int layer) override;
  void abandon() override;
  bool can_record() const override { return true; }
  void begin_recording() override;
  std::vector<RecordedWrites> end_recording(bool will_be_done) override;
  bool take_recorded(const std::vector<RecordedWrites>& writes) override;
  void read_cells(int layer, Kind kind, int64_t first, int64_t n, uint8_t* rows) override;
  RefusedRows write_cells(int layer, Kind kind, std::span<const int64_t> cells, const uint8_t* rows) override;
  int64_t keys_at_once() const override { return cuda::CellState::kKeysAtOnce; }
  KeyRows read_keys(int layer, std::span<const int64_t> cells, std::span<const int32_t> shifts) override;
  void write_keys(int layer, std::span<const int64_t> cells) override;
  void copy_stream(int layer, Kind kind, int from, int to) override;
  void clear() override;

  /// What the host counts of batches, and a return to it.
  std::vector<uint64_t> counted() const;
  void set_counted(const std::vector<uint64_t>& counted);

private:
  struct Layer {
    int number = 0;
    cuda::DeviceLayer device;
    int top = 0;
    bool drop_tail = false;
    std::vector<uint64_t> hashes;    // LayerPlan::hashes
    bool corrects_prompts = false;   // scores of coded cells get what they lack in prompts, too
    size_t index = 0;                // in the tables
    bool waits[2] = {false, false};  // by Kind: rows that were written and not taken in
    WriteTask writes[2];
    uint64_t batch[2] = {0, 0};  // by Kind: the batch that was written last,
    uint64_t window_batch = 0;   // and taken into the window
    uint64_t ended_batch = 0;    // of prompts whose layers end together: the last one that the layer has ended
    // A prompt's new rows, copied for dense attention behind the first one (models in which layers share a cache). They
    // are not written to the cache.
    cuda::EncodeArgs again;
    cuda::DeviceMemory again_memory[3];  // keys and values by Kind, f32; cells
  };
  // A prompt whose layers end together, behind its graph or where their memory is full: the window's books begin for
  // all layers at once, each layer then keeps its rows and what its queries say of the cells in question, and at the
  // end these are scored, cells leave the windows of these layers and are coded.
  struct Prompt {
    uint64_t batch = 0;
    cuda::WindowArgs args;    // of all layers
    cuda::StagedRows staged;  // of the layers from number `first` on
    cuda::JudgeMeans means;   // theirs
    cuda::BatchMask mask;
    size_t first = 0, n = 0;  // layers that are staged
    bool has_begun = false;   // the kernels that begin it, or end layers of it, are behind a layer's first
    size_t max_layers = 1;    // that there is memory for
    cuda::DeviceMemory lists, rows, cells, judged;
  };
  // The batch of the layer that is being read.
  struct Flight {
    Layer* layer = nullptr;
    bool is_prompt = false;
    uint64_t batch = 0;
    cuda::EncodeArgs args;  // in memory of flight_memory_
  };
  Layer& layer(int index) { return *layers_.at(index); }
  static BatchQueries queries_of(const AttendTask& task);
  void keep_queries(Layer& layer, int n_heads);
  void make_tables();
  cuda::LeaveArgs leaving(size_t first, size_t n, int n_tokens) const;
  void code_leaving(const cuda::LeaveArgs& leave, cudaStream_t stream);
  void update_windows(const WriteTask& task, const int64_t* cells, cudaStream_t stream);
  void update_window(CudaQueue& queue, Layer& layer, const WriteTask& task, const cuda::EncodeArgs& written,
                     const BatchQueries& queries);
  cuda::JudgeArgs judge_args(const Layer& layer, const cuda::WindowArgs& window, const cuda::EncodeArgs& written,
                             const BatchQueries& queries) const;
  bool ends_together() const;
  bool begin_prompt(CudaQueue& queue, const WriteTask& task, const cuda::EncodeArgs& written,
                    const BatchQueries& queries);
  void place_means(CudaQueue& queue, const cuda::WindowArgs& args, const cuda::BatchMask& mask);
  void judge_staged(const cuda::WindowArgs& args, cudaStream_t stream);
  void end_prompt(cudaStream_t stream);
  size_t stage(Layer& layer, cudaStream_t stream);
  cuda::PromptArgs staging(size_t index, const cuda::EncodeArgs& written);
  void stage_alone(CudaQueue& queue, Layer& layer, const cuda::EncodeArgs& written);
  bool is_staged(const cuda::EncodeArgs& written) const { return written.n_tokens > 0 && prompt_.batch == batch_; }
  cuda::EncodeArgs take_writes(CudaQueue& queue, Layer& layer, const BatchQueries& queries);
  void count_batch(Layer& layer, Kind kind);
  void encode(const Layer& layer, const cuda::EncodeArgs& args, cudaStream_t stream);
  void take_off(CudaQueue& queue, Layer& layer, const BatchQueries& queries);
  void land(CudaQueue& queue);
  void attend_codes(CudaQueue& queue, Layer& layer, const AttendTask& task, const cuda::EncodeArgs& written);
  bool put_new_rows(CudaQueue& queue, const cuda::AttendArgs& a, const cuda::EncodeArgs& p,
                    const cuda::DeviceWindow& window, int first_stream);
  void retrieve(CudaQueue& queue, Layer& layer, int first_stream, const cuda::AttendArgs& attend);
  void prefill(CudaQueue& queue, Layer& layer, const AttendTask& task, cuda::EncodeArgs& written,
               DenseAttention* dense);
  void read_store(const Layer& layer, const cuda::DenseRows& rows, cudaStream_t stream);
  void decode(const Layer& layer, const cuda::DenseRows& rows, const bool (&restored)[2], cudaStream_t stream);
  void decode_window(const Layer& layer, const cuda::DenseRows& rows, bool before_batch, cudaStream_t stream);
  void keep_for_others(CudaQueue& queue, Layer& layer, const cuda::EncodeArgs& written);
  const float* slopes(CudaQueue& queue, float max_bias, int n_heads);
  cuda::CellState state();
  cuda::HostWindow host_window(const Layer& layer);

  cuda::DeviceInfo device_;
  uint64_t batch_ = 0;  // batches taken in
  cuda::WindowScratch scratch_;
  std::map<int, std::unique_ptr<Layer>> layers_;
  // The layers and their windows as kernels want them. Recordings may go on reading older tables than the last.
  std::vector<cuda::DeviceMemory> tables_, window_tables_;
  size_t n_tables_ = 0;
  std::map<std::pair<float, int>, cuda::DeviceMemory> slopes_;
  cuda::DeviceMemory shifts_;
  bool is_recording_ = false;
  std::vector<RecordedWrites> recorded_;
  std::vector<uint64_t> before_recording_;  // counted()
  Prompt prompt_;
  Flight flight_;
  cuda::DeviceMemory flight_memory_[3];                // keys and values by Kind, f32; cells
  std::unique_ptr<cuda::StateKernels> state_kernels_;  // once a state is saved or loaded
  cuda::SavedOrders saved_orders_;
  int saved_layer_ = -1;  // whose keys it was given last
};

}  // namespace thimble
