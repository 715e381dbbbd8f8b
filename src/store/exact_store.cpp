#include "store/exact_store.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace thimble {
namespace {

constexpr size_t kFileChunk = size_t{1} << 20;
constexpr size_t kHugePage = size_t{2} << 20;  // also the chunk in RAM

bool is_lack_of_room(int error) {
  return error == ENOSPC || error == EDQUOT || error == EFBIG;
}

[[noreturn]] void fail(const std::string& directory, int error) {
  const std::string where = directory.empty() ? "exact store in RAM" : "exact store in " + directory;
  std::string what = where + ": " + std::strerror(error);
  if (is_lack_of_room(error)) {
    what = where +
           ": the disk (or the file size that is allowed) is full; free some room there, choose another "
           "directory (path=), a smaller context, or store=ram";
  }
  throw std::runtime_error(what);
}

size_t page_size() {
  static const size_t size = size_t(sysconf(_SC_PAGESIZE));
  return size;
}

// Opens a file without a name. On file systems that cannot make one it gets a name, which is removed at once.
int open_nameless(const std::string& directory) {
#ifdef O_TMPFILE
  const int file = open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (file >= 0) return file;
  if (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL) return -1;
#endif
  std::string name = directory + "/thimble-XXXXXX";
  const int named = mkstemp(name.data());
  if (named >= 0) {
    unlink(name.c_str());
    fcntl(named, F_SETFD, FD_CLOEXEC);
  }
  return named;
}

}  // namespace

ExactStore::ExactStore(int64_t n_rows, size_t row_size, int file, std::string directory)
    : n_rows_(n_rows),
      row_size_(row_size),
      rows_per_chunk_(
          std::max<int64_t>(1, int64_t((file < 0 ? kHugePage : kFileChunk) / (row_size * sizeof(uint16_t))))),
      file_(file),
      directory_(std::move(directory)),
      rooms_(size_t((n_rows + rows_per_chunk_ - 1) / rows_per_chunk_), Room::unasked) {
  const int flags = file_ < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED;
  mapped_bytes_ = total_bytes() + (file_ < 0 ? kHugePage : 0);
  mapping_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, flags, file_, 0);
  if (mapping_ == MAP_FAILED) {
    const int error = errno;
    if (file_ >= 0) close(file_);
    fail(directory_, error);
  }
  data_ = static_cast<uint16_t*>(mapping_);
  if (file_ >= 0) {
    // Single rows are read from all over the file, so read-ahead around them would read rows that nobody needs.
    madvise(data_, total_bytes(), MADV_RANDOM);
  } else {
    // Single rows are read from all over the store: with small pages, each would need an address that the processor has
    // not translated for long.
    uintptr_t begin = reinterpret_cast<uintptr_t>(mapping_);
    begin = (begin + kHugePage - 1) / kHugePage * kHugePage;
    data_ = reinterpret_cast<uint16_t*>(begin);
    madvise(data_, total_bytes(), MADV_HUGEPAGE);
  }
}

ExactStore::~ExactStore() {
  munmap(mapping_, mapped_bytes_);
  if (file_ >= 0) close(file_);
}

std::unique_ptr<ExactStore> ExactStore::ram(int64_t n_rows, size_t row_size, size_t most_bytes) {
  std::unique_ptr<ExactStore> store(new ExactStore(n_rows, row_size, -1, {}));
  store->most_bytes_ = most_bytes;
  return store;
}

std::unique_ptr<ExactStore> ExactStore::file(const std::string& directory, int64_t n_rows, size_t row_size) {
  const size_t bytes = size_t(n_rows) * row_size * sizeof(uint16_t);
  // Beyond this limit a write does not fail: the system sends SIGXFSZ, which ends the process.
  rlimit limit;
  if (getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur < bytes) fail(directory, EFBIG);
  const int file = open_nameless(directory);
  if (file < 0) fail(directory, errno);
  if (ftruncate(file, off_t(bytes)) != 0) {
    const int error = errno;
    close(file);
    fail(directory, error);
  }
  return std::unique_ptr<ExactStore>(new ExactStore(n_rows, row_size, file, directory));
}

bool ExactStore::reserve(int64_t row) {
  const int64_t chunk = row / rows_per_chunk_;
  Room& room = rooms_[size_t(chunk)];
  if (room != Room::unasked) return room == Room::taken;
  const auto refuse = [&] {
    room = Room::refused;
    is_full_ = true;
    return false;
  };
  if (most_bytes_ < total_bytes() && reserved_bytes() + chunk_bytes() > most_bytes_) return refuse();
  if (file_ >= 0) {
    const size_t begin = size_t(chunk) * chunk_bytes(), end = std::min(begin + chunk_bytes(), total_bytes());
    int error;
    do {
      error = posix_fallocate(file_, off_t(begin), off_t(end - begin));
    } while (error == EINTR);
    if (is_lack_of_room(error)) return refuse();
    if (error != 0) fail(directory_, error);
  }
  room = Room::taken;
  return true;
}

void ExactStore::will_need(std::span<const int64_t> rows, size_t first, size_t n) const {
  n_asked_.fetch_add(int64_t(rows.size()), std::memory_order_relaxed);
  if (rows.empty() || n == 0) return;
  char* const data = reinterpret_cast<char*>(data_);
  const auto begin_of = [&](int64_t row) { return (size_t(row) * row_size_ + first) * sizeof(uint16_t); };
  const size_t bytes = n * sizeof(uint16_t);
  if (file_ < 0) {
    constexpr size_t kLine = 64, kAtMost = 4096;  // bytes of a row: prefetching more would push lines out again
    for (int64_t row : rows) {
      for (size_t i = 0; i < std::min(bytes, kAtMost); i += kLine) __builtin_prefetch(data + begin_of(row) + i, 0, 2);
    }
    return;
  }
  // Mostly, all pages are in memory, and a madvise for such a page takes longer than reading its row. One mincore tells
  // which pages are missing, and takes less time than those calls unless the rows lie far apart.
  constexpr size_t kPagesToARow = 16;
  const size_t page = page_size(), first_page = begin_of(rows.front()) / page;
  const size_t n_pages = (begin_of(rows.back()) + bytes - 1) / page + 1 - first_page;
  std::vector<unsigned char> in_memory;
  if (n_pages <= kPagesToARow * rows.size()) {
    in_memory.resize(n_pages);
    if (mincore(data + first_page * page, n_pages * page, in_memory.data()) != 0) in_memory.clear();
  }
  size_t i = first_page;
  for (int64_t row : rows) {  // several rows may lie in one page
    const size_t last = (begin_of(row) + bytes - 1) / page;
    for (i = std::max(i, begin_of(row) / page); i <= last; i++) {
      if (in_memory.empty() || !(in_memory[i - first_page] & 1)) madvise(data + i * page, page, MADV_WILLNEED);
    }
  }
}

void ExactStore::copy(int64_t from, int64_t to, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const uint16_t* source = row(from + i);
    if (source && reserve(to + i)) std::copy_n(source, row_size_, row(to + i));
  }
}

void ExactStore::clear() {
  std::fill(rooms_.begin(), rooms_.end(), Room::unasked);
  is_full_ = false;
  if (file_ < 0) {
    madvise(data_, total_bytes(), MADV_DONTNEED);
    return;
  }
#ifdef FALLOC_FL_PUNCH_HOLE
  // Where the file system cannot punch holes, the file keeps its blocks for later rows.
  (void)!fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, off_t(total_bytes()));
#endif
}

size_t ExactStore::reserved_bytes() const {
  size_t bytes = 0;
  for (size_t i = 0; i < rooms_.size(); i++) {
    if (rooms_[i] == Room::taken) bytes += std::min(chunk_bytes(), total_bytes() - i * chunk_bytes());
  }
  return bytes;
}

}  // namespace thimble
