// What each kernel of a program takes on a GPU: CUPTI's records of all kernels, in order of their start, summed up by
// name when the program ends.
//
// usage: CUDA_INJECTION64_PATH=<this library> KERNEL_TIMES=<file> [KERNEL_TIMES_FROM=ms] [KERNEL_TIMES_TO=ms]
// program...
//
// A line a kernel: calls, ms in all, us a call from the end of whatever ran before it (or its own start, if later) to
// its own end, us a call that nothing ran before it, name. FROM and TO cut out a part of the program, counted from its
// first kernel; a line for each gap of more than 100 us helps to find one.
//
// Build: g++ -std=c++20 -O2 -shared -fPIC bench/kernel_times.cpp -o libkernel_times.so -lcupti
#include <cupti.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

struct Record {
  uint64_t start, end;
  const std::string* name;
};
std::mutex mutex;
std::vector<Record> records;
std::map<std::string, int> names;

void CUPTIAPI give_buffer(uint8_t** buffer, size_t* size, size_t* n_records) {
  *size = size_t(8) << 20;
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, *size));
  *n_records = 0;
}

void CUPTIAPI take_buffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid) {
  const std::lock_guard lock(mutex);
  CUpti_Activity* activity = nullptr;
  while (cuptiActivityGetNextRecord(buffer, valid, &activity) == CUPTI_SUCCESS) {
    if (activity->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
      const auto* kernel = reinterpret_cast<const CUpti_ActivityKernel9*>(activity);
      const auto name = names.try_emplace(kernel->name ? kernel->name : "?").first;
      records.push_back({kernel->start, kernel->end, &name->first});
    } else if (activity->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
      const auto* copy = reinterpret_cast<const CUpti_ActivityMemcpy5*>(activity);
      records.push_back({copy->start, copy->end, &names.try_emplace("copy").first->first});
    }
  }
  std::free(buffer);
}

double milliseconds(const char* name, double otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atof(value) : otherwise;
}

void report() {
  (void)cuptiActivityFlushAll(1);
  const std::lock_guard lock(mutex);
  const char* path = std::getenv("KERNEL_TIMES");
  FILE* file = path ? std::fopen(path, "w") : stderr;
  if (!file || records.empty()) return;
  std::sort(records.begin(), records.end(), [](const Record& a, const Record& b) { return a.start < b.start; });
  const uint64_t origin = records.front().start;
  const double from = milliseconds("KERNEL_TIMES_FROM", 0), to = milliseconds("KERNEL_TIMES_TO", 1e12);
  struct Sum {
    int calls = 0;
    double busy = 0, alone = 0;
  };
  std::map<std::string, Sum> sums;
  uint64_t end = origin;
  double busy = 0, idle = 0;
  for (const Record& r : records) {
    const double at = double(r.start - origin) / 1e6;
    const double gap = r.start > end ? double(r.start - end) / 1e3 : 0;
    if (at >= from && at < to) {
      if (gap > 100) std::fprintf(file, "at %.1f ms: nothing for %.0f us, before %.60s\n", at, gap, r.name->c_str());
      Sum& sum = sums[*r.name];
      sum.calls++;
      sum.alone += gap;
      sum.busy += double(r.end - std::min(std::max(end, r.start), r.end)) / 1e3;
      idle += gap;
      busy += double(r.end - std::min(std::max(end, r.start), r.end)) / 1e3;
    }
    end = std::max(end, r.end);
  }
  std::vector<std::pair<std::string, Sum>> sorted(sums.begin(), sums.end());
  std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.second.busy > b.second.busy; });
  std::fprintf(file, "busy %.2f ms, idle %.2f ms, in %.2f ms\n", busy / 1e3, idle / 1e3, double(end - origin) / 1e6);
  std::fprintf(file, "calls ms us-a-call us-nothing-before name\n");
  for (const auto& [name, sum] : sorted) {
    std::fprintf(file, "%6d %9.3f %8.2f %8.2f %.150s\n", sum.calls, sum.busy / 1e3, sum.busy / sum.calls,
                 sum.alone / sum.calls, name.c_str());
  }
  if (path) std::fclose(file);
}

}  // namespace

extern "C" int InitializeInjection() {
  if (cuptiActivityRegisterCallbacks(give_buffer, take_buffer) != CUPTI_SUCCESS) return 0;
  if (cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) != CUPTI_SUCCESS) return 0;
  (void)cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY);
  std::atexit(report);
  return 1;
}
