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

thimble_context* make_context(const thimble_context_args& args) {
  if (args.device == THIMBLE_DEVICE_CUDA) {
    throw Failure(THIMBLE_UNSUPPORTED, "this version of the library has no CUDA contexts: use THIMBLE_DEVICE_CPU");
  }
  require(args.device == THIMBLE_DEVICE_CPU, "thimble_context_args.device is no thimble_device");
  require(args.device_index == 0, "thimble_context_args.device_index must be 0 on the CPU");
  require(args.n_threads >= 0 && args.n_threads <= kMaxThreads,
          "thimble_context_args.n_threads must be between 0 and 512");
  const unsigned n_cores = std::thread::hardware_concurrency();  // 0 where the system does not tell
  const int n_default = n_cores == 0 ? 1 : int(std::min<unsigned>(n_cores, kMaxThreads));
  try {
    return new thimble_context(args.n_threads > 0 ? args.n_threads : n_default);
  } catch (const std::system_error&) {
    throw Failure(THIMBLE_OUT_OF_MEMORY, "the system starts no more threads: ask for fewer");
  } catch (const std::runtime_error& e) {  // from kernels(): THIMBLE_ISA names a set that this machine lacks
    throw Failure(THIMBLE_UNSUPPORTED, e.what());
  }
}

}  // namespace

Use::Use(thimble_context* context, const void* stream) : context_(not_null(context)) {
  if (stream) throw Failure(THIMBLE_UNSUPPORTED, "a context on the CPU takes no stream: pass null");
  require(!context_.busy.exchange(true, std::memory_order_acquire),
          "the context is at work for another call: threads that work at once need a context each");
}

}  // namespace thimble::api

using namespace thimble::api;

thimble_status thimble_context_create(const thimble_context_args* args, thimble_context** context) {
  return guarded([&] {
    require(context != nullptr, "the place for the context is null");
    *context = nullptr;
    *context = make_context(args ? take_args(args, "thimble_context_args") : thimble_context_args{});
  });
}

void thimble_context_free(thimble_context* context) {
  delete context;
}

const char* thimble_context_instruction_set(const thimble_context* context) {
  return context ? context->kernels.name : "";
}
