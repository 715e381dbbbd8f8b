#include "cache/exact_rows.h"

#include <algorithm>

namespace thimble {
namespace {

class WindowRows : public ExactRows {
public:
  WindowRows(int row_size, int n_slots, uint16_t* memory) : row_size_(row_size), n_slots_(n_slots), memory_(memory) {}

  void begin_batch(std::span<const int64_t> cells) override { in_flight_.resize(cells.size() * row_size_); }
  uint16_t* row(const Window::Row& row) const override {
    if (row.in_flight) return const_cast<uint16_t*>(&in_flight_[size_t(row.index) * row_size_]);
    if (row.index < n_slots_) return memory_ + size_t(row.index) * row_size_;
    const size_t extra = size_t(row.index - n_slots_);
    return extra < more_.size() ? more_[extra].get() : nullptr;
  }
  void end_batch(std::span<const Window::Move> moves) override {
    for (const Window::Move& move : moves) {
      std::copy_n(&in_flight_[size_t(move.batch_row) * row_size_], row_size_, slot(move.slot));
    }
    in_flight_ = {};
  }

  uint16_t* at(int64_t, int slot) override { return slot >= 0 ? this->slot(slot) : nullptr; }
  uint16_t* keep(int64_t) override { return nullptr; }

  void copy_cells(int64_t, int64_t, int64_t) override {}
  void copy_slot(int from, int to) override { std::copy_n(slot(from), row_size_, slot(to)); }
  void clear() override { in_flight_ = {}; }

private:
  uint16_t* slot(int index) {
    while (index >= n_slots_ + int(more_.size())) more_.push_back(std::make_unique<uint16_t[]>(row_size_));
    return row({-1, false, index});
  }

  size_t row_size_;
  int n_slots_;
  uint16_t* memory_;
  std::vector<std::unique_ptr<uint16_t[]>> more_;
  std::vector<uint16_t> in_flight_;
};

class StoredRows : public ExactRows {
public:
  explicit StoredRows(std::unique_ptr<ExactStore> store) : store_(std::move(store)) {}

  void begin_batch(std::span<const int64_t> cells) override {
    for (int64_t cell : cells) store_->reserve(cell);
  }
  uint16_t* row(const Window::Row& row) const override { return store_->row(row.cell); }
  void end_batch(std::span<const Window::Move>) override {}

  uint16_t* at(int64_t cell, int) override { return store_->row(cell); }
  uint16_t* keep(int64_t cell) override {
    store_->reserve(cell);
    return store_->row(cell);
  }

  void copy_cells(int64_t from, int64_t to, int64_t n) override { store_->copy(from, to, n); }
  void copy_slot(int, int) override {}
  void clear() override { store_->clear(); }

  const ExactStore* store() const override { return store_.get(); }

private:
  std::unique_ptr<ExactStore> store_;
};

}  // namespace

std::unique_ptr<ExactRows> window_rows(int row_size, int n_slots, uint16_t* memory) {
  return std::make_unique<WindowRows>(row_size, n_slots, memory);
}

std::unique_ptr<ExactRows> stored_rows(std::unique_ptr<ExactStore> store) {
  return std::make_unique<StoredRows>(std::move(store));
}

}  // namespace thimble
