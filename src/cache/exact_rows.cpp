#include "cache/exact_rows.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

namespace thimble {
namespace {

class WindowRows : public ExactRows {
public:
  WindowRows(int row_size, int n_slots, uint16_t* memory) : row_size_(row_size), n_slots_(n_slots), memory_(memory) {}

  void begin_batch(std::span<const int64_t> cells) override { in_flight_.resize(cells.size() * row_size_); }
  uint16_t* row(const Window::Row& row) const override {
    if (row.in_flight) return const_cast<uint16_t*>(in_flight_.data()) + size_t(row.index) * row_size_;
    if (row.index < n_slots_) return memory_ + size_t(row.index) * row_size_;
    const size_t extra = size_t(row.index - n_slots_);
    return extra < more_.size() ? more_[extra].get() : nullptr;
  }
  void end_batch(std::span<const Window::Move> moves) override {
    for (const Window::Move& move : moves) {
      std::copy_n(in_flight_.data() + size_t(move.batch_row) * row_size_, row_size_, slot(move.slot));
    }
    in_flight_ = {};
  }

  uint16_t* at(int64_t, int slot) override { return slot >= 0 ? this->slot(slot) : nullptr; }
  uint16_t* keep(int64_t) override { return nullptr; }
  uint16_t* lend(int64_t) override { return nullptr; }
  void end_loans(const std::function<bool(int64_t)>&) override {}

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
  StoredRows(std::unique_ptr<ExactStore> store, int row_size) : store_(std::move(store)), row_size_(row_size) {}

  void begin_batch(std::span<const int64_t> cells) override {
    for (int64_t cell : cells) {
      if (!store_->reserve(cell)) lend(cell);
    }
  }
  uint16_t* row(const Window::Row& row) const override { return row_of(row.cell); }
  void end_batch(std::span<const Window::Move>) override {}

  uint16_t* at(int64_t cell, int) override { return row_of(cell); }
  uint16_t* keep(int64_t cell) override { return store_->reserve(cell) ? store_->row(cell) : nullptr; }
  uint16_t* lend(int64_t cell) override {
    std::unique_ptr<uint16_t[]>& row = lent_[cell];
    if (!row) row = std::make_unique<uint16_t[]>(size_t(row_size_));
    return row.get();
  }
  void end_loans(const std::function<bool(int64_t)>& in_window) override {
    std::erase_if(lent_, [&](const auto& loan) { return !in_window(loan.first); });
  }

  void copy_cells(int64_t from, int64_t to, int64_t n) override {
    store_->copy(from, to, n);
    for (int64_t i = 0; i < n && !lent_.empty(); i++) {
      lent_.erase(to + i);
      const auto loan = lent_.find(from + i);
      if (loan == lent_.end() || !store_->reserve(to + i)) continue;
      std::copy_n(loan->second.get(), row_size_, store_->row(to + i));
    }
  }
  void copy_slot(int, int) override {}
  void clear() override {
    lent_.clear();
    store_->clear();
  }

  const ExactStore* store() const override { return store_.get(); }

private:
  uint16_t* row_of(int64_t cell) const {
    if (uint16_t* stored = store_->row(cell)) return stored;
    const auto loan = lent_.find(cell);
    return loan == lent_.end() ? nullptr : loan->second.get();
  }

  std::unique_ptr<ExactStore> store_;
  int row_size_;
  std::unordered_map<int64_t, std::unique_ptr<uint16_t[]>> lent_;  // by cell: rows that the store had no room for
};

}  // namespace

std::unique_ptr<ExactRows> window_rows(int row_size, int n_slots, uint16_t* memory) {
  return std::make_unique<WindowRows>(row_size, n_slots, memory);
}

std::unique_ptr<ExactRows> stored_rows(std::unique_ptr<ExactStore> store, int row_size) {
  return std::make_unique<StoredRows>(std::move(store), row_size);
}

}  // namespace thimble
