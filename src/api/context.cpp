#include <algorithm>
#include <system_error>
#include <thread>

#include "api/args.h"
#include "api/handles.h"

namespace thimble::api {
namespace {

constexpr int kMaxThreads = 512;

thimble_context& not_null(thimble_context* context) {
  require(context != nullptr, "the context is null: make one with thimble_context_create");
  return *context;
}

std::unique_ptr<Device> cpu_device(const thimble_context_args& args) {
  require(args.device_index == 0, "thimble_context_args.device_index must be 0 on the CPU");
  require(args.n_threads >= 0 && args.n_threads <= kMaxThreads,
          "thimble_context_args.n_threads must be between 0 and 512");
  const unsigned n_cores = std::thread::hardware_concurrency();  // 0 where the system does not tell
  const int n_default = n_cores == 0 ? 1 : int(std::min<unsigned>(n_cores, kMaxThreads));
  try {
    return make_cpu_device(args.n_threads > 0 ? args.n_threads : n_default);
  } catch (const std::system_error&) {
    throw Failure(THIMBLE_OUT_OF_MEMORY, "the system starts no more threads: ask for fewer");
  } catch (const std::runtime_error& e) {  // from kernels(): THIMBLE_ISA names a set that this machine lacks
    throw Failure(THIMBLE_UNSUPPORTED, e.what());
  }
}

std::unique_ptr<Device> cuda_device(const thimble_context_args& args) {
  require(args.device_index >= 0, "thimble_context_args.device_index is negative");
  require(args.n_threads == 0, "thimble_context_args.n_threads must be 0 on CUDA");
  return make_cuda_device(args.device_index);
}

std::unique_ptr<Device> make_device(const thimble_context_args& args) {
  require(args.device == THIMBLE_DEVICE_CPU || args.device == THIMBLE_DEVICE_CUDA,
          "thimble_context_args.device is no thimble_device");
  return args.device == THIMBLE_DEVICE_CPU ? cpu_device(args) : cuda_device(args);
}

}  // namespace

Use::Use(thimble_context* context, const void* stream) : context_(not_null(context)) {
  context_.device->check_stream(stream);
  require(!context_.busy.exchange(true, std::memory_order_acquire),
          "the context is at work for another call: threads that work at once need a context each");
}

}  // namespace thimble::api

using namespace thimble::api;

thimble_status thimble_context_create(const thimble_context_args* args, thimble_context** context) {
  return guarded([&] {
    require(context != nullptr, "the place for the context is null");
    *context = nullptr;
    auto device = make_device(args ? take_args(args, "thimble_context_args") : thimble_context_args{});
    *context = new thimble_context{std::move(device)};
  });
}

void thimble_context_free(thimble_context* context) {
  delete context;
}

const char* thimble_context_instruction_set(const thimble_context* context) {
  return context ? context->device->name() : "";
}
