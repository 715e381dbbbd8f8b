// A model that is larger than RAM and disk, for measurements of speed: to be preloaded into a program that maps a GGUF
// of bench/random_gguf.py --holes, whose weights are holes. Where that is mapped, the holes show the pages of
// $REPEAT_PAGES, a file of random weights, over and over. What the program copies to a GPU is as if the file were
// whole.
//
//   c++ -O2 -shared -fPIC bench/repeat_pages.cpp -o repeat_pages.so -ldl
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

namespace {

using Mmap = void* (*)(void*, size_t, int, int, int, off_t);

void* map(void* where, size_t size, int protection, int flags, int file, off_t offset) {
  static const auto next = reinterpret_cast<Mmap>(dlsym(RTLD_NEXT, "mmap"));
  const char* name = std::getenv("REPEAT_PAGES");
  const bool is_file = name && file >= 0 && offset == 0 && !where;
  const off_t place = is_file ? lseek(file, 0, SEEK_CUR) : -1, hole = is_file ? lseek(file, 0, SEEK_HOLE) : -1;
  if (is_file) lseek(file, place, SEEK_SET);
  if (hole < 0 || size_t(hole) >= size) return next(where, size, protection, flags, file, offset);

  const int pages = open(name, O_RDONLY | O_CLOEXEC);
  struct stat of_pages {};
  if (pages < 0 || fstat(pages, &of_pages) != 0 || of_pages.st_size % sysconf(_SC_PAGESIZE) != 0) return MAP_FAILED;
  // Nothing maps the holes themselves: a file in RAM would fill them with pages.
  char* base = static_cast<char*>(next(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  const auto put = [&](off_t from, off_t to, int source, off_t at) {
    return next(base + from, size_t(to - from), PROT_READ, MAP_SHARED | MAP_FIXED, source, at) != MAP_FAILED;
  };
  bool done = base != MAP_FAILED;
  for (off_t at = 0; done && size_t(at) < size;) {
    const off_t data = lseek(file, at, SEEK_DATA);  // behind the last there is none
    const off_t until = std::min<off_t>(off_t(size), data == at ? lseek(file, at, SEEK_HOLE)
                                                     : data < 0 ? off_t(size)
                                                                : data);
    if (data == at) {
      done = put(at, until, file, at);
      at = until;
      continue;
    }
    for (; done && at < until; at += of_pages.st_size) {
      done = put(at, std::min<off_t>(until, at + of_pages.st_size), pages, 0);
    }
    at = until;
  }
  close(pages);
  lseek(file, place, SEEK_SET);
  return done ? base : MAP_FAILED;
}

}  // namespace

extern "C" void* mmap(void* where, size_t size, int protection, int flags, int file, off_t offset) noexcept {
  return map(where, size, protection, flags, file, offset);
}
extern "C" void* mmap64(void* where, size_t size, int protection, int flags, int file, off_t offset) noexcept {
  return map(where, size, protection, flags, file, offset);
}
