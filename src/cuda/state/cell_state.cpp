#include "cuda/state/cell_state.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "cuda/state/code_packer.h"

namespace thimble::cuda {
namespace {

using Scratch = StateKernels::Scratch;

// Calls f(first, end) for parts of [0, n), on a few threads where there is much to copy: one alone is slower than the
// bus.
template <typename F>
void in_parallel(size_t n, size_t bytes_each, F f) {
  constexpr size_t kBytesWorthAThread = size_t(2) << 20, kMaxThreads = 8;
  const size_t cores = std::max(1u, std::thread::hardware_concurrency());
  const size_t n_threads = std::clamp<size_t>(n * bytes_each / kBytesWorthAThread, 1, std::min(kMaxThreads, cores));
  std::vector<std::jthread> threads;
  for (size_t t = 1; t < n_threads; t++) {
    threads.emplace_back([=, &f] { f(n * t / n_threads, n * (t + 1) / n_threads); });
  }
  f(0, n / n_threads);
}

size_t row_bytes(const CellArgs& side) {
  return size_t(side.n_kv_heads) * side.head_dim * sizeof(uint16_t);
}

RowLayout layout_of(const CellArgs& side, std::span<const uint64_t> hashes, bool takes_codes) {
  return {side.head_dim * sizeof(uint16_t), size_t(CodePacker{Kind::key, side.codec.order()}.vector_bytes()), hashes,
          takes_codes};
}

}  // namespace

int64_t CellState::cells_at_once(size_t row_bytes) const {
  return std::max<int64_t>(1, int64_t(chunk_bytes_ / row_bytes));
}

const int64_t* CellState::upload(std::span<const int64_t> cells) {
  void* to = kernels_.device_memory(Scratch::cells, cells.size_bytes());
  kernels_.copy(to, cells.data(), cells.size_bytes());
  return static_cast<const int64_t*>(to);
}

const int32_t* CellState::upload(std::span<const int32_t> slots) {
  void* to = kernels_.device_memory(Scratch::slots, slots.size_bytes());
  kernels_.copy(to, slots.data(), slots.size_bytes());
  return static_cast<const int32_t*>(to);
}

// ---- saving

void CellState::save(const EncodeArgs& layer, Kind kind, const HostWindow& window, int64_t first, int64_t n,
                     std::span<const uint64_t> hashes, uint8_t* rows) {
  kernels_.begin();
  CellArgs side = side_of(layer, kind);
  if (side.store) return save_stored(layer, kind, first, n, rows);
  const RowLayout layout = layout_of(side, hashes, true);
  const size_t bytes = row_bytes(side), coded_bytes = layout.vectors_bytes();
  for (int64_t done = 0, at_once = cells_at_once(coded_bytes); done < n; done += at_once) {
    std::vector<int64_t> cells, exact_cells;
    std::vector<int32_t> exact_slots;
    std::vector<size_t> exact_entries;
    for (int64_t cell = first + done; cell < first + std::min(n, done + at_once); cell++) {
      if (const int slot = window.slot_of(cell); slot >= 0) {
        exact_entries.push_back(cells.size());
        exact_cells.push_back(cell);
        exact_slots.push_back(slot);
      }
      cells.push_back(cell);
    }
    const size_t all_coded = cells.size() * coded_bytes, all_exact = exact_cells.size() * bytes;
    uint8_t* host = static_cast<uint8_t*>(kernels_.host_memory(all_coded + all_exact));
    side.n = int(cells.size());
    side.cells = upload(cells);
    side.vectors = static_cast<uint8_t*>(kernels_.device_memory(Scratch::vectors, all_coded));
    kernels_.gather_codes(side);
    kernels_.copy(host, side.vectors, all_coded);
    if (!exact_cells.empty()) {
      CellArgs exact = side;
      kernels_.wait();  // `cells` of the device is used again
      exact.n = int(exact_cells.size());
      exact.cells = upload(exact_cells);
      exact.slots = upload(exact_slots);
      exact.halves = static_cast<uint16_t*>(kernels_.device_memory(Scratch::halves, all_exact));
      kernels_.read_rows(exact);
      kernels_.copy(host + all_coded, exact.halves, all_exact);
    }
    kernels_.wait();
    uint8_t* to = rows + done * bytes;
    in_parallel(cells.size(), bytes, [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; i++) {
        if (side.codec.order().is_f16()) {
          std::memcpy(to + i * bytes, host + i * coded_bytes, bytes);
        } else {
          write_coded_row(host + i * coded_bytes, layout, to + i * bytes);
        }
      }
    });
    for (size_t i = 0; i < exact_entries.size(); i++) {
      std::memcpy(to + exact_entries[i] * bytes, host + all_coded + i * bytes, bytes);
    }
  }
}

// The store is the host's memory.
void CellState::save_stored(const EncodeArgs& layer, Kind kind, int64_t first, int64_t n, uint8_t* rows) {
  const CellArgs side = side_of(layer, kind);
  const size_t bytes = row_bytes(side), head_bytes = side.head_dim * sizeof(uint16_t);
  in_parallel(size_t(n), bytes, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; i++) {
      const size_t stream = (first + i) / side.cells_per_stream, cell = (first + i) % side.cells_per_stream;
      for (int head = 0; head < side.n_kv_heads; head++) {
        const size_t row = (stream * side.n_kv_heads + head) * side.cells_per_stream + cell;
        std::memcpy(rows + i * bytes + head * head_bytes, side.store + row * side.head_dim, head_bytes);
      }
    }
  });
}

// ---- loading

CellState::Refused CellState::load(const EncodeArgs& layer, Kind kind, HostWindow& window,
                                   std::span<const int64_t> cells, std::span<const uint64_t> hashes,
                                   const uint8_t* rows, std::span<const uint32_t> orders) {
  const CellArgs side = side_of(layer, kind);
  const size_t bytes = row_bytes(side), n = cells.size();
  const bool takes_codes = side.cache.data && !side.codec.order().is_f16();
  const RowLayout layout = layout_of(side, hashes, takes_codes);
  std::vector<RowKind> kinds(n);
  in_parallel(n, bytes, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; i++) kinds[i] = row_kind(rows + i * bytes, layout);
  });
  std::vector<size_t> refused, coded, exact, mixed;
  for (size_t i = 0; i < n; i++) {
    if (kinds[i] == RowKind::mixed) mixed.push_back(i);
    (kinds[i] == RowKind::refused ? refused : kinds[i] == RowKind::coded ? coded : exact).push_back(i);
  }

  kernels_.begin();
  std::vector<uint8_t> with_mixed;
  if (!mixed.empty()) {
    with_mixed.assign(rows, rows + n * bytes);
    const std::vector<uint8_t> exact_rows = mixed_as_exact(side, layout, cells, mixed, rows);
    for (size_t i = 0; i < mixed.size(); i++) std::copy_n(&exact_rows[i * bytes], bytes, &with_mixed[mixed[i] * bytes]);
    rows = with_mixed.data();
  }
  if (kind == Kind::key) {
    std::vector<bool> is_exact(n);
    for (size_t i : exact) is_exact[i] = true;
    code_leaving(layer, window.place(cells, is_exact, orders));
  }
  const std::vector<int32_t> slots = window.slots_of(cells);
  load_codes(side, layout, cells, slots, coded, rows);
  load_exact(layer, side, cells, slots, exact, rows);
  kernels_.wait();
  return refused;
}

void CellState::code_leaving(const EncodeArgs& layer, const HostWindow::Leaving& leaving) {
  if (leaving.cells.empty() || layer.store.keys) return;  // with a store, cells were coded as they came
  EncodeArgs p = layer;
  p.from_window = true;
  p.n_tokens = int(leaving.cells.size());
  p.cells = upload(leaving.cells);
  p.window.slots = upload(leaving.slots);
  kernels_.encode(p);
  kernels_.wait();
}

// Codes of some rows to their blocks; heads of which a row has no codes get any.
void CellState::scatter(const CellArgs& side, const RowLayout& layout, std::span<const int64_t> cells,
                        std::span<const size_t> entries, const uint8_t* rows) {
  const size_t bytes = layout.row_bytes(), coded_bytes = layout.vectors_bytes();
  uint8_t* host = static_cast<uint8_t*>(kernels_.host_memory(entries.size() * coded_bytes));
  in_parallel(entries.size(), bytes, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; i++) read_coded_row(rows + entries[i] * bytes, layout, host + i * coded_bytes);
  });
  std::vector<int64_t> of_entries;
  for (size_t i : entries) of_entries.push_back(cells[i]);
  CellArgs a = side;
  a.n = int(entries.size());
  a.cells = upload(of_entries);
  a.vectors = static_cast<uint8_t*>(kernels_.device_memory(Scratch::vectors, entries.size() * coded_bytes));
  kernels_.copy(a.vectors, host, entries.size() * coded_bytes);
  kernels_.scatter_codes(a);
  kernels_.wait();
}

// The device decodes what a row has codes of, in the blocks of the row's cell.
std::vector<uint8_t> CellState::mixed_as_exact(const CellArgs& side, const RowLayout& layout,
                                               std::span<const int64_t> cells, std::span<const size_t> entries,
                                               const uint8_t* rows) {
  const size_t bytes = layout.row_bytes(), at_once = size_t(cells_at_once(bytes));
  std::vector<uint8_t> exact(entries.size() * bytes);
  for (size_t done = 0; done < entries.size(); done += at_once) {
    const auto part = entries.subspan(done, std::min(at_once, entries.size() - done));
    scatter(side, layout, cells, part, rows);
    std::vector<int64_t> of_part;
    for (size_t i : part) of_part.push_back(cells[i]);
    CellArgs a = side;
    a.n = int(part.size());
    a.cells = upload(of_part);
    a.slots = nullptr;
    a.store = nullptr;
    a.halves = static_cast<uint16_t*>(kernels_.device_memory(Scratch::halves, part.size() * bytes));
    kernels_.read_rows(a);
    uint8_t* host = static_cast<uint8_t*>(kernels_.host_memory(part.size() * bytes));
    kernels_.copy(host, a.halves, part.size() * bytes);
    kernels_.wait();
    for (size_t i = 0; i < part.size(); i++) {
      take_decoded_heads(rows + part[i] * bytes, host + i * bytes, layout, &exact[(done + i) * bytes]);
    }
  }
  return exact;
}

void CellState::load_codes(const CellArgs& side, const RowLayout& layout, std::span<const int64_t> cells,
                           std::span<const int32_t> slots, std::span<const size_t> entries, const uint8_t* rows) {
  const size_t bytes = row_bytes(side), coded_bytes = layout.vectors_bytes();
  const size_t at_once = size_t(cells_at_once(coded_bytes));
  for (size_t done = 0; done < entries.size(); done += at_once) {
    const auto part = entries.subspan(done, std::min(at_once, entries.size() - done));
    scatter(side, layout, cells, part, rows);

    // Where an exact row is kept besides, what the codes stand for is all that is left of it.
    std::vector<int64_t> kept_cells;
    std::vector<int32_t> kept_slots;
    for (size_t i : part) {
      if (!side.store && slots[i] < 0) continue;
      kept_cells.push_back(cells[i]);
      kept_slots.push_back(slots[i]);
    }
    if (kept_cells.empty()) continue;
    CellArgs a = side;
    a.n = int(kept_cells.size());
    a.cells = upload(kept_cells);
    a.halves = static_cast<uint16_t*>(kernels_.device_memory(Scratch::halves, a.n * bytes));
    a.store = nullptr;
    kernels_.read_rows(a);
    a.slots = upload(kept_slots);
    a.store = side.store;
    kernels_.put_rows(a);
    kernels_.wait();
  }
}

void CellState::load_exact(const EncodeArgs& layer, const CellArgs& side, std::span<const int64_t> cells,
                           std::span<const int32_t> slots, std::span<const size_t> entries, const uint8_t* rows) {
  const size_t bytes = row_bytes(side), at_once = size_t(cells_at_once(bytes));
  for (size_t done = 0; done < entries.size(); done += at_once) {
    const auto part = entries.subspan(done, std::min(at_once, entries.size() - done));
    uint8_t* host = static_cast<uint8_t*>(kernels_.host_memory(part.size() * bytes));
    in_parallel(part.size(), bytes, [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; i++) std::memcpy(host + i * bytes, rows + part[i] * bytes, bytes);
    });
    std::vector<int64_t> of_part;
    std::vector<int32_t> slots_of_part;
    for (size_t i : part) {
      of_part.push_back(cells[i]);
      slots_of_part.push_back(slots[i]);
    }
    CellArgs a = side;
    a.n = int(part.size());
    a.halves = static_cast<uint16_t*>(kernels_.device_memory(Scratch::halves, part.size() * bytes));
    a.floats = static_cast<float*>(kernels_.device_memory(Scratch::floats, 2 * part.size() * bytes));
    kernels_.copy(a.halves, host, part.size() * bytes);
    kernels_.widen(a);
    put_and_encode(layer, a, of_part, slots_of_part);
  }
}

// Cells of a store are coded at once, as when they are written; those of the window when they leave it.
void CellState::put_and_encode(const EncodeArgs& layer, CellArgs side, std::span<const int64_t> cells,
                               std::span<const int32_t> slots) {
  uint16_t* const store = side.store;
  std::vector<int64_t> to_encode(cells.begin(), cells.end());
  size_t n_encoded = 0;
  for (size_t i = 0; i < cells.size(); i++) {
    if (!store && slots[i] >= 0) to_encode[i] = -1;
    n_encoded += to_encode[i] >= 0;
  }
  side.cells = upload(cells);
  side.slots = upload(slots);
  side.store = nullptr;  // the encoder writes it
  kernels_.put_rows(side);
  kernels_.wait();
  if (n_encoded == 0) return;
  EncodeArgs p = layer;
  p.n_tokens = side.n;
  p.cells = upload(to_encode);
  (side.is_key ? p.keys : p.values) = side.floats;
  (side.is_key ? p.key_token_stride : p.value_token_stride) = size_t(side.n_kv_heads) * side.head_dim;
  (side.is_key ? p.key_head_stride : p.value_head_stride) = side.head_dim;
  p.window.slots = nullptr;
  kernels_.encode(p);
  kernels_.wait();
}

// ---- keys, to be rotated

float* CellState::read_keys(const EncodeArgs& layer, const HostWindow& window, std::span<const int64_t> cells) {
  kernels_.begin();
  CellArgs side = side_of(layer, Kind::key);
  side.n = int(cells.size());
  side.cells = upload(cells);
  const std::vector<int32_t> slots = window.slots_of(cells);
  side.slots = upload(slots);
  side.floats = static_cast<float*>(kernels_.device_memory(Scratch::floats, 2 * cells.size() * row_bytes(side)));
  kernels_.read_rows(side);
  kernels_.wait();
  return side.floats;
}

void CellState::write_keys(const EncodeArgs& layer, const HostWindow& window, std::span<const int64_t> cells) {
  kernels_.begin();
  CellArgs side = side_of(layer, Kind::key);
  side.n = int(cells.size());
  side.floats = static_cast<float*>(kernels_.device_memory(Scratch::floats, 2 * cells.size() * row_bytes(side)));
  side.halves = static_cast<uint16_t*>(kernels_.device_memory(Scratch::halves, cells.size() * row_bytes(side)));
  kernels_.round(side);
  put_and_encode(layer, side, cells, window.slots_of(cells));
}

}  // namespace thimble::cuda
