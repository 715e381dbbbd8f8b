// Preloaded into a program, makes its ggml look like another one. The variable DOCTORED names the change:
//   version=<text>   the text that ggml_version returns
//   overhead         tensors look larger than they are
//   ops              two ops have changed their names
//   api=<number>     the backend API version of the first registered backend
//   type             buffer types have one function more
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <string_view>

namespace {

std::string_view doctored() {
  const char* what = std::getenv("DOCTORED");
  return what ? what : "";
}

template <typename Function>
Function next(const char* name, Function) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

const char* ggml_version() {
  static constexpr std::string_view kVersion = "version=";
  if (doctored().starts_with(kVersion)) return std::getenv("DOCTORED") + kVersion.size();
  return next("ggml_version", ggml_version)();
}

size_t ggml_tensor_overhead() {
  return next("ggml_tensor_overhead", ggml_tensor_overhead)() + (doctored() == "overhead" ? 16 : 0);
}

const char* ggml_op_name(int op) {
  const char* name = next("ggml_op_name", ggml_op_name)(op);
  if (doctored() != "ops") return name;
  if (std::strcmp(name, "ROPE") == 0) return "SET_ROWS";
  return std::strcmp(name, "SET_ROWS") == 0 ? "ROPE" : name;
}

// A registry begins with the API version; the rest is as it was.
void* ggml_backend_reg_get(size_t index) {
  constexpr size_t kBytes = 48;
  alignas(8) static char other[kBytes];
  static constexpr std::string_view kApi = "api=";
  void* registry = next("ggml_backend_reg_get", ggml_backend_reg_get)(index);
  if (!doctored().starts_with(kApi) || index != 0) return registry;
  const int api = std::atoi(std::getenv("DOCTORED") + kApi.size());
  std::memcpy(other, registry, kBytes);
  std::memcpy(other, &api, sizeof(api));
  return other;
}

void* ggml_backend_buft_get_device(void** type) {
  void* device = next("ggml_backend_buft_get_device", ggml_backend_buft_get_device)(type);
  if (doctored() != "type") return device;
  while (*type != device) type++;  // the word that it read, and then the one behind it
  return type[1];
}
}
