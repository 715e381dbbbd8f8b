// Cells of a device cache to and from the rows that llama.cpp saves and loads (cache/state_row.h), whole ranges at a
// time. Only codes cross the bus; tags and zeros are the host's. What touches device memory is behind StateKernels, so
// that all the rest runs in tests without a device.
#pragma once

#include <span>
#include <vector>

#include "cache/state_row.h"
#include "cuda/state/cell_args.h"
#include "cuda/state/host_window.h"

namespace thimble::cuda {

/// What a device does for states, in the order in which it was asked to. Implementations throw std::runtime_error where
/// the device fails.
class StateKernels {
public:
  virtual ~StateKernels() = default;

  enum class Scratch { cells, slots, vectors, halves, floats, count };
  /// Device memory of at least `bytes`, and pinned host memory; what was there is lost when it has to grow, and is not
  /// needed any more when the same is asked for again after `wait`.
  virtual void* device_memory(Scratch which, size_t bytes) = 0;
  virtual void* host_memory(size_t bytes) = 0;

  /// Waits for all that any stream of the device does: it may write the cache.
  virtual void begin() = 0;
  virtual void wait() = 0;
  virtual void copy(void* to, const void* from, size_t bytes) = 0;

  virtual void gather_codes(const CellArgs& args) = 0;   // blocks to `vectors`
  virtual void scatter_codes(const CellArgs& args) = 0;  // and back
  virtual void read_rows(const CellArgs& args) = 0;      // RowsKernel::read
  virtual void put_rows(const CellArgs& args) = 0;       // RowsKernel::put
  virtual void widen(const CellArgs& args) = 0;          // ConvertKernel: `halves` to `floats`
  virtual void round(const CellArgs& args) = 0;          // `floats` to `halves` and back
  virtual void encode(const EncodeArgs& args) = 0;       // EncodeKernel::run
};

class CellState {
public:
  /// Bytes of one copy over the bus at most. Smaller ones are for tests.
  explicit CellState(StateKernels& kernels, size_t chunk_bytes = size_t(16) << 20)
      : kernels_(kernels), chunk_bytes_(chunk_bytes) {}

  // `layer`: DeviceLayer::encode_args, `window`: that layer's, `hashes`: RowLayout's. Cells are numbered through all
  // streams. A row has n_kv_heads * head_dim f16 numbers.

  /// The rows of cells first .. first + n - 1, bit for bit as save_cell writes them.
  void save(const EncodeArgs& layer, Kind kind, const HostWindow& window, int64_t first, int64_t n,
            std::span<const uint64_t> hashes, uint8_t* rows);

  /// What `load` did not: entries of `cells` whose rows are refused, and of which nothing was written. Their old
  /// contents are void.
  using Refused = std::vector<size_t>;
  /// Loads rows into cells; no cell comes twice. Keys of a cell come before its values. Codes go to their blocks; exact
  /// and mixed rows to the window, and into codes where that takes them not. With an exact store, all rows are exact,
  /// and the window takes the last. Cells that leave the window for others are coded. The caller writes `window` back
  /// where keys came. `orders`: HostWindow::place's.
  Refused load(const EncodeArgs& layer, Kind kind, HostWindow& window, std::span<const int64_t> cells,
               std::span<const uint64_t> hashes, const uint8_t* rows, std::span<const uint32_t> orders = {});

  /// Keys of cells as f32, [cells][n_kv_heads][head_dim] in device memory, to be changed there. write_keys, with the
  /// same cells, puts them back rounded to f16: exact rows as they are, others coded again. Both have ended when they
  /// return; nothing else may be called in between.
  float* read_keys(const EncodeArgs& layer, const HostWindow& window, std::span<const int64_t> cells);
  void write_keys(const EncodeArgs& layer, const HostWindow& window, std::span<const int64_t> cells);
  /// Cells that read_keys takes at most.
  static constexpr int64_t kKeysAtOnce = 4096;

private:
  void save_stored(const EncodeArgs& layer, Kind kind, int64_t first, int64_t n, uint8_t* rows);
  void code_leaving(const EncodeArgs& layer, const HostWindow::Leaving& leaving);
  void scatter(const CellArgs& side, const RowLayout& layout, std::span<const int64_t> cells,
               std::span<const size_t> entries, const uint8_t* rows);
  std::vector<uint8_t> mixed_as_exact(const CellArgs& side, const RowLayout& layout, std::span<const int64_t> cells,
                                      std::span<const size_t> entries, const uint8_t* rows);
  void load_codes(const CellArgs& side, const RowLayout& layout, std::span<const int64_t> cells,
                  std::span<const int32_t> slots, std::span<const size_t> entries, const uint8_t* rows);
  void load_exact(const EncodeArgs& layer, const CellArgs& side, std::span<const int64_t> cells,
                  std::span<const int32_t> slots, std::span<const size_t> entries, const uint8_t* rows);
  /// Rows that are in `halves`: into the window and the store, and coded where they belong into codes.
  void put_and_encode(const EncodeArgs& layer, CellArgs side, std::span<const int64_t> cells,
                      std::span<const int32_t> slots);
  const int64_t* upload(std::span<const int64_t> cells);
  const int32_t* upload(std::span<const int32_t> slots);
  int64_t cells_at_once(size_t row_bytes) const;

  StateKernels& kernels_;
  size_t chunk_bytes_;
};

}  // namespace thimble::cuda
