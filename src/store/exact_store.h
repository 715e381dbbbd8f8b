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

/// Addresses for `n_rows` rows are taken at once, memory in chunks, when a row of a chunk is first reserved. Several
/// threads may read rows, and write to rows that were reserved, at once. No other call may run beside them that changes
/// the store.
class ExactStore {
public:
  /// In anonymous memory, of which it takes `most_bytes` at most. Throws std::runtime_error where the system does not
  /// give the addresses.
  static std::unique_ptr<ExactStore> ram(int64_t n_rows, size_t row_size, size_t most_bytes = SIZE_MAX);
  /// In a file in `directory`, which has no name there any more when this returns, so that nothing is left behind
  /// however the process ends. Throws std::runtime_error with a sentence where it cannot be made.
  static std::unique_ptr<ExactStore> file(const std::string& directory, int64_t n_rows, size_t row_size);
  ~ExactStore();
  ExactStore(const ExactStore&) = delete;
  ExactStore& operator=(const ExactStore&) = delete;

  /// Makes sure that a row can be written; false where there is no room, which the store then remembers. Writing to a
  /// mapped page that the disk has no block for would end the process instead (SIGBUS). Throws std::runtime_error for
  /// what else the system may say.
  bool reserve(int64_t row);
  /// Whether there was no room for a row since the store was last cleared.
  bool is_full() const { return is_full_; }
  /// A row, [row_size] numbers, or null where it was never reserved.
  uint16_t* row(int64_t row) const {
    return reserved_[size_t(row / rows_per_chunk_)] ? data_ + size_t(row) * row_size_ : nullptr;
  }
  /// Announces that numbers [first, first + n) of each of these rows will be read soon; rows are in ascending order and
  /// were reserved. Starts reading from the disk what is not in memory, and prefetches what is into the processor's
  /// cache.
  void will_need(std::span<const int64_t> rows, size_t first, size_t n) const;
  /// How many rows were announced so far.
  int64_t n_asked() const { return n_asked_.load(std::memory_order_relaxed); }
  /// Copies rows [from, from + n) to [to, to + n), which do not overlap, as far as there is room.
  void copy(int64_t from, int64_t to, int64_t n);
  /// Forgets all rows and gives their room back.
  void clear();

  /// Bytes of RAM or disk that are taken.
  size_t reserved_bytes() const;
  /// Bytes that all rows would take.
  size_t total_bytes() const { return size_t(n_rows_) * row_size_ * sizeof(uint16_t); }

private:
  ExactStore(int64_t n_rows, size_t row_size, int file, std::string directory);
  size_t chunk_bytes() const { return size_t(rows_per_chunk_) * row_size_ * sizeof(uint16_t); }

  int64_t n_rows_;
  size_t row_size_;
  int64_t rows_per_chunk_;
  int file_;  // -1: RAM
  size_t most_bytes_ = SIZE_MAX;
  std::string directory_;
  uint16_t* data_ = nullptr;
  std::vector<char> reserved_;  // by chunk
  bool is_full_ = false;
  mutable std::atomic<int64_t> n_asked_{0};
};

}  // namespace thimble
