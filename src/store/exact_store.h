// The exact store: rows of f16 numbers (the keys or the values of every cell of a layer), kept away from the codes, in
// memory that costs little: plain RAM, or a file that the system keeps in its page cache as far as it has room.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace thimble {

/// Room for `n_rows` rows is addressed at once and taken in chunks, when rows of a chunk are first reserved. Reading
/// may go on in several threads; what changes the store may not go on beside anything else, but for the rows' contents.
class ExactStore {
public:
  /// In anonymous memory. Throws std::runtime_error where the addresses are not to be had.
  static std::unique_ptr<ExactStore> ram(int64_t n_rows, size_t row_size);
  /// In a file in `directory`, which has no name there any more when this returns, so that nothing is left behind
  /// however the process ends. Throws std::runtime_error with a sentence where it cannot be made.
  static std::unique_ptr<ExactStore> file(const std::string& directory, int64_t n_rows, size_t row_size);
  ~ExactStore();
  ExactStore(const ExactStore&) = delete;
  ExactStore& operator=(const ExactStore&) = delete;

  /// Makes sure that a row can be written. Throws std::runtime_error where the disk is full; writing to a mapped page
  /// that the disk has no block for would end the process instead (SIGBUS).
  void reserve(int64_t row);
  /// A row, [row_size] numbers, or null where it was never reserved.
  uint16_t* row(int64_t row) const {
    return reserved_[size_t(row / rows_per_chunk_)] ? data_ + size_t(row) * row_size_ : nullptr;
  }
  /// Says that `n` numbers from `first` on will be read soon of each of these rows, which were reserved and are in
  /// ascending order: starts reading from the disk what is not in memory of them, or what is towards the processor.
  void will_need(std::span<const int64_t> rows, size_t first, size_t n) const;
  /// Of how many rows this was said.
  int64_t n_asked() const { return n_asked_.load(std::memory_order_relaxed); }
  /// Rows [from, from + n) to [to, to + n), which do not overlap. Throws as `reserve`.
  void copy(int64_t from, int64_t to, int64_t n);
  /// Forgets all rows and gives their room back.
  void clear();

  /// What is taken of RAM or disk.
  size_t reserved_bytes() const;
  /// What all rows would take.
  size_t total_bytes() const { return size_t(n_rows_) * row_size_ * sizeof(uint16_t); }

private:
  ExactStore(int64_t n_rows, size_t row_size, int file, std::string directory);
  size_t chunk_bytes() const { return size_t(rows_per_chunk_) * row_size_ * sizeof(uint16_t); }

  int64_t n_rows_;
  size_t row_size_;
  int64_t rows_per_chunk_;
  int file_;  // -1: RAM
  std::string directory_;
  uint16_t* data_ = nullptr;
  std::vector<char> reserved_;  // by chunk
  mutable std::atomic<int64_t> n_asked_{0};
};

}  // namespace thimble
