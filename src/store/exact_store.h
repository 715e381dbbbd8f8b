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

/// The store maps addresses for all of its `n_rows` rows when it is made, and takes memory in chunks of up to 2 MiB,
/// when a row of a chunk is first reserved. Several threads may at once read rows and write to rows that were reserved;
/// a call that changes the store must run alone.
class ExactStore {
public:
  /// A store in anonymous memory that takes at most `most_bytes` of it. A row has `row_size` numbers. Throws
  /// std::runtime_error where the system does not give the addresses.
  static std::unique_ptr<ExactStore> ram(int64_t n_rows, size_t row_size, size_t most_bytes = SIZE_MAX);
  /// A store in a file in `directory`. The file has no name any more when this returns, so that nothing is left behind
  /// however the process ends. Throws std::runtime_error with a sentence where the file cannot be made.
  static std::unique_ptr<ExactStore> file(const std::string& directory, int64_t n_rows, size_t row_size);
  ~ExactStore();
  ExactStore(const ExactStore&) = delete;
  ExactStore& operator=(const ExactStore&) = delete;

  /// Takes room for a row, so that it can be written; false where there is none (is_full is then true). Without room, a
  /// write to the mapped page would end the process (SIGBUS). A chunk that found no room gets none before `clear`, even
  /// if the disk has some again: its rows would then seem to be there without having been written. Throws
  /// std::runtime_error on any other error of the system.
  bool reserve(int64_t row);
  /// Whether there was no room for a row since the store was last cleared.
  bool is_full() const { return is_full_; }
  /// A row, [row_size] numbers, or null where it was never reserved.
  uint16_t* row(int64_t row) const {
    return rooms_[size_t(row / rows_per_chunk_)] == Room::taken ? data_ + size_t(row) * row_size_ : nullptr;
  }
  /// Announces that numbers [first, first + n) of each of these rows will be read soon; rows are in ascending order and
  /// were reserved. Starts reading from the disk what is not in memory, and prefetches what is into the processor's
  /// cache.
  void will_need(std::span<const int64_t> rows, size_t first, size_t n) const;
  /// How many rows were announced so far (will_need).
  int64_t n_asked() const { return n_asked_.load(std::memory_order_relaxed); }
  /// Copies rows [from, from + n) to [to, to + n), which do not overlap, as far as there is room.
  void copy(int64_t from, int64_t to, int64_t n);
  /// Drops all rows and gives their room back.
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
  void* mapping_ = nullptr;
  size_t mapped_bytes_ = 0;
  uint16_t* data_ = nullptr;  // in RAM at a multiple of a huge page
  enum class Room : char { unasked, taken, refused };
  std::vector<Room> rooms_;  // by chunk
  bool is_full_ = false;
  mutable std::atomic<int64_t> n_asked_{0};
};

}  // namespace thimble
