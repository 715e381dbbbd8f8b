// What the host API returns. Nothing here prints, throws or aborts.
#pragma once

#include <cuda_runtime_api.h>

namespace thimble::cuda {

struct [[nodiscard]] Status {
  enum class Code {
    ok,
    invalid_argument,  // the caller's mistake
    unsupported,       // no kernel for this shape on this device
    cuda,              // a CUDA call failed: see `error`
  };
  Code code = Code::ok;
  const char* message = "";  // static storage
  cudaError_t error = cudaSuccess;

  bool ok() const { return code == Code::ok; }

  static Status invalid(const char* message) { return {Code::invalid_argument, message, cudaSuccess}; }
  static Status unsupported(const char* message) { return {Code::unsupported, message, cudaSuccess}; }
  static Status from(cudaError_t error) {
    if (error == cudaSuccess) return {};
    return {Code::cuda, cudaGetErrorString(error), error};
  }
};

}  // namespace thimble::cuda
