// Times a decode step over one layer with retrieval (2 bits, 64 cells) whose exact rows lie in RAM, in a file that the
// page cache holds, and in a file of which it holds a quarter. The layer is that of Llama-3.1-8B with random contents,
// and every step has random queries, so that no cell is likelier to be retrieved than another: in a model, the cells of
// one token are mostly those of the token before. Three quarters of the rows are then read from the disk.
//
//   store_bench <directory> [cells = 131072] [steps = 15] [threads = 2]
//
// The three take turns with the same queries, and their results must be equal.
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "kernels/kernels.h"
#include "random_layer.h"

namespace {

using namespace thimble;

constexpr int kLayers = 32, kTop = 64;

// Keeps every fourth page of the layer's rows in memory, as a hash of its number says, and drops the others. Returns
// the share of pages that are in memory then.
double drop_three_quarters(const CacheLayer& layer) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  size_t n_there = 0, n_all = 0;
  for (Kind kind : {Kind::key, Kind::value}) {
    const ExactStore& store = *layer.side(kind).store();
    char* const data = reinterpret_cast<char*>(store.row(0));
    const size_t n_pages = store.total_bytes() / page;
    std::vector<unsigned char> there(n_pages);
    const auto look = [&] {
      if (mincore(data, n_pages * page, there.data()) != 0) throw std::runtime_error("mincore failed");
    };
    look();
    for (size_t i = 0; i < n_pages; i++) {
      const bool stays = (i * 0x9e3779b97f4a7c15u >> 40) % 4 == 0;
      if (!stays && (there[i] & 1)) madvise(data + i * page, page, MADV_PAGEOUT);
    }
    look();
    for (unsigned char byte : there) n_there += byte & 1;
    n_all += n_pages;
  }
  return double(n_there) / double(n_all);
}

void write_out(const CacheLayer& layer) {
  for (Kind kind : {Kind::key, Kind::value}) {
    const ExactStore& store = *layer.side(kind).store();
    if (msync(store.row(0), store.total_bytes(), MS_SYNC) != 0) throw std::runtime_error("msync failed");
  }
}

int run(const std::string& directory, int64_t n_cells, int n_steps, int n_threads) {
  const Shape shape{128, 4, 8, n_cells, 1};
  Ours ram(shape, 2, n_threads, kernels(), kTop), file(shape, 2, n_threads, kernels(), kTop, directory);
  write_out(file.layer());
  std::vector<double> times[3];
  double share = 0;
  for (int step = 0; step <= n_steps; step++) {
    for (int i = 0; i < 3; i++) {
      Ours& layer = i == 0 ? ram : file;
      layer.new_queries(unsigned(100 + step));
      if (i == 2) share += drop_three_quarters(file.layer()) / (n_steps + 1);
      if (i == 1) layer.step();  // brings this step's rows into memory
      const auto start = std::chrono::steady_clock::now();
      layer.step();
      const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
      if (step > 0) times[i].push_back(time.count());  // the first one touches all codes
      if (layer.out() != ram.out()) throw std::runtime_error("a store's result differs from that in RAM");
    }
  }
  std::printf("%lld cells, %d threads, %d steps; ms for %d layers: median [lowest, highest]\n",
              static_cast<long long>(n_cells), n_threads, n_steps, kLayers);
  double in_ram = 0;
  const char* names[] = {"RAM", "file, in memory", "file, a quarter in memory"};
  for (int i = 0; i < 3; i++) {
    std::vector<double>& t = times[i];
    std::sort(t.begin(), t.end());
    const double median = t[t.size() / 2] * kLayers;
    if (i == 0) in_ram = median;
    std::printf("%-26s %8.1f [%.1f, %.1f]  %.2fx\n", names[i], median, t.front() * kLayers, t.back() * kLayers,
                median / in_ram);
  }
  std::printf("share of the file's pages in memory before a step: %.2f\n", share);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "store_bench <directory> [cells] [steps] [threads]\n");
    return 2;
  }
  try {
    return run(argv[1], argc > 2 ? std::atoll(argv[2]) : 131072, argc > 3 ? std::atoi(argv[3]) : 15,
               argc > 4 ? std::atoi(argv[4]) : 2);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "store_bench: %s\n", error.what());
    return 1;
  }
}
