// The exact store: writing and reading rows, the room that it takes and leaves, and full disks.
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "store/exact_store.h"
#include "support/temporary_folder.h"

namespace thimble {
namespace {

namespace fs = std::filesystem;
using test::TemporaryFolder;

std::vector<uint16_t> pattern(int64_t row, size_t size) {
  std::vector<uint16_t> x(size);
  for (size_t i = 0; i < size; i++) x[i] = uint16_t(row * 131 + int64_t(i) * 7 + 1);
  return x;
}

void put(ExactStore& store, int64_t row, const std::vector<uint16_t>& x) {
  store.reserve(row);
  std::memcpy(store.row(row), x.data(), x.size() * 2);
}

std::vector<uint16_t> get(const ExactStore& store, int64_t row, size_t size) {
  return {store.row(row), store.row(row) + size};
}

void use(ExactStore& store, int64_t n_rows, size_t size) {
  const std::vector<int64_t> rows = {0, 1, n_rows / 2, n_rows - 1};
  EXPECT_EQ(store.reserved_bytes(), 0u);
  for (int64_t row : rows) EXPECT_EQ(store.row(row), nullptr);
  for (int64_t row : rows) put(store, row, pattern(row, size));
  for (int64_t row : rows) {
    store.will_need(std::vector<int64_t>{row}, 0, size);
    EXPECT_EQ(get(store, row, size), pattern(row, size));
  }
  EXPECT_GT(store.reserved_bytes(), 0u);
  EXPECT_LE(store.reserved_bytes(), store.total_bytes());
  EXPECT_EQ(store.total_bytes(), size_t(n_rows) * size * 2);
  std::vector<int64_t> all(n_rows);
  std::iota(all.begin(), all.end(), 0);
  store.will_need(all, size / 2, size - size / 2);

  store.copy(0, n_rows / 2, n_rows / 4);
  EXPECT_EQ(get(store, n_rows / 2, size), pattern(0, size));
  EXPECT_EQ(get(store, n_rows / 2 + 1, size), pattern(1, size));
  EXPECT_EQ(get(store, n_rows - 1, size), pattern(n_rows - 1, size));

  store.clear();
  EXPECT_EQ(store.reserved_bytes(), 0u);
  for (int64_t row : rows) EXPECT_EQ(store.row(row), nullptr);
  put(store, 1, pattern(9, size));
  EXPECT_EQ(get(store, 1, size), pattern(9, size));
}

TEST(ExactStore, RowsInRam) {
  for (const auto& [n_rows, size] : {std::pair<int64_t, size_t>{8, 64}, {5000, 192}, {40000, 1024}, {8, 1 << 20}}) {
    use(*ExactStore::ram(n_rows, size), n_rows, size);
  }
}

TEST(ExactStore, RowsInAFile) {
  const TemporaryFolder directory;
  for (const auto& [n_rows, size] : {std::pair<int64_t, size_t>{8, 64}, {5000, 192}, {40000, 1024}, {8, 1 << 20}}) {
    use(*ExactStore::file(directory.path(), n_rows, size), n_rows, size);
    EXPECT_TRUE(directory.empty());
  }
}

// Pages that left memory are on their way back when will_need returns, and no others.
TEST(ExactStore, RowsOfAFileAreReadAhead) {
  const TemporaryFolder directory;
  const auto store = ExactStore::file(directory.path(), 64, 4096);  // a row is pages of its own, however large they are
  const size_t row_bytes = 4096 * sizeof(uint16_t), page = size_t(sysconf(_SC_PAGESIZE));
  if (page > row_bytes) GTEST_SKIP() << "pages of " << page << " bytes hold several rows";
  for (int64_t row = 0; row < 64; row++) {
    store->reserve(row);
    std::fill_n(store->row(row), 4096, uint16_t(row));
  }
  const auto in_memory = [&](int64_t row) {
    std::vector<unsigned char> pages(row_bytes / page);
    EXPECT_EQ(mincore(store->row(row), row_bytes, pages.data()), 0);
    return std::all_of(pages.begin(), pages.end(), [](unsigned char p) { return p & 1; });
  };
  ASSERT_EQ(msync(store->row(0), 64 * row_bytes, MS_SYNC), 0);
  if (madvise(store->row(0), 64 * row_bytes, MADV_PAGEOUT) != 0 || in_memory(7)) {
    GTEST_SKIP() << "what the page cache has does not leave it here, as on tmpfs";
  }
  store->will_need(std::vector<int64_t>{7, 9, 60}, 0, 4096);
  EXPECT_EQ(store->n_asked(), 3);
  for (int i = 0; i < 1000 && !(in_memory(7) && in_memory(9) && in_memory(60)); i++) usleep(1000);
  for (int64_t row : {7, 9, 60}) EXPECT_TRUE(in_memory(row)) << row;
  for (int64_t row : {0, 8, 10, 59, 63}) EXPECT_FALSE(in_memory(row)) << row;
  for (int64_t row = 0; row < 64; row++) EXPECT_EQ(*store->row(row), row);
}

TEST(ExactStore, AFileIsAsLargeAsWhatWasReserved) {
  const TemporaryFolder directory;
  const auto free_bytes = [&] { return fs::space(directory.path()).free; };
  const auto store = ExactStore::file(directory.path(), 1 << 24, 1024);  // 32 GiB of rows
  const auto before = free_bytes();
  put(*store, 12345678, pattern(1, 1024));
  EXPECT_LE(store->reserved_bytes(), size_t{2} << 20);
  // Others may use the disk at the same time, but hardly this much of it.
  EXPECT_LT(int64_t(before) - int64_t(free_bytes()), int64_t{8} << 30);
}

TEST(ExactStore, HasNoNameWhileItIsInUse) {
  const TemporaryFolder directory;
  const auto store = ExactStore::file(directory.path(), 1000, 128);
  put(*store, 3, pattern(3, 128));
  EXPECT_TRUE(directory.empty());
}

// Runs in a process of its own; returns its wait status.
int in_child(const std::function<int()>& work) {
  const pid_t child = fork();
  if (child == 0) _exit(work());
  int status = 0;
  waitpid(child, &status, 0);
  return status;
}

TEST(ExactStore, NothingIsLeftBehindByKill9) {
  const TemporaryFolder directory;
  const int status = in_child([&] {
    const auto store = ExactStore::file(directory.path(), 1000, 128);
    for (int row = 0; row < 500; row++) put(*store, row, pattern(row, 128));
    raise(SIGKILL);
    return 0;
  });
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_TRUE(directory.empty());
}

TEST(ExactStore, AMissingDirectoryIsNamed) {
  try {
    ExactStore::file("/nowhere/at/all", 10, 10);
    FAIL() << "made";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("/nowhere/at/all"), std::string::npos) << error.what();
  }
}

TEST(ExactStore, AFileThatIsNotAllowedToBeSoLargeIsRefused) {
  const TemporaryFolder directory;
  const int status = in_child([&] {
    const rlimit limit{1 << 20, 1 << 20};
    setrlimit(RLIMIT_FSIZE, &limit);
    try {
      ExactStore::file(directory.path(), 1000, 1024);
    } catch (const std::runtime_error& error) {
      return std::strstr(error.what(), "full") ? 0 : 1;
    }
    return 2;
  });
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  EXPECT_TRUE(directory.empty());
}

// On a disk of 4 MiB: rows that fit are written, others are refused, and earlier rows do not change.
TEST(ExactStore, AFullDiskHasNoRoomForARow) {
  const TemporaryFolder directory;
  constexpr int kCannotMount = 77;
  const int status = in_child([&] {
    const std::string path = directory.path();
    const bool alone = unshare(CLONE_NEWNS) == 0 || unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0;
    if (!alone || mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
        mount("tmpfs", path.c_str(), "tmpfs", 0, "size=4m") != 0) {
      return kCannotMount;
    }
    const std::string other = path + "/of-another-program";
    std::ofstream(other) << std::string(1 << 20, 'x');
    const auto store = ExactStore::file(path, 100000, 128);
    int64_t row = 0;
    while (row < 100000 && store->reserve(row)) {
      put(*store, row, pattern(row, 128));
      row++;
    }
    if (row == 100000) return 1;
    if (!store->is_full()) return 2;
    if (row < 8000) return 3;
    if (store->row(row)) return 4;
    for (int64_t i = 0; i < row; i++) {
      if (get(*store, i, 128) != pattern(i, 128)) return 5;
    }
    fs::remove(other);  // there is room again, but other rows of this chunk were not written
    if (store->reserve(row) || store->row(row)) return 8;
    store->clear();
    if (store->is_full()) return 7;
    put(*store, row, pattern(row, 128));
    return get(*store, row, 128) == pattern(row, 128) ? 0 : 6;
  });
  ASSERT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  if (WEXITSTATUS(status) == kCannotMount) GTEST_SKIP() << "no file system can be mounted here";
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

}  // namespace
}  // namespace thimble
