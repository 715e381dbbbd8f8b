#include "plugin/host_waits.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace thimble {
namespace {

constexpr int kAmpere = 800;

// Whether the rule was read in this version's source.
bool is_known(const char* version) {
  int major = 0, minor = 0;
  return std::sscanf(version, "%d.%d", &major, &minor) == 2 && major == 0 && minor >= 20 && minor <= 26;
}

// The matrix kernels for f16, bf16 and f32 (ggml_cuda_should_use_mmf).
bool has_matrix_kernel(const ggml_tensor* experts, int64_t n_tokens) {
  const size_t size = ggml_type_size(experts->type);
  const bool is_packed = experts->nb[0] == size && std::all_of(experts->nb + 1, experts->nb + GGML_MAX_DIMS,
                                                               [&](size_t n) { return n % (2 * size) == 0; });
  return (experts->type == GGML_TYPE_F16 || experts->type == GGML_TYPE_BF16 || experts->type == GGML_TYPE_F32) &&
         is_packed && experts->ne[0] % int64_t(32 * (4 / size)) == 0 && experts->ne[1] % 32 == 0 && n_tokens <= 128;
}

}  // namespace

InnerBuild inner_build(const ggml_backend_feature* features, int device_architecture, const char* ggml_version) {
  InnerBuild build;
  if (!features || !is_known(ggml_version)) return build;
  for (; features->name; features++) {
    if (std::strcmp(features->name, "FORCE_CUBLAS") == 0) build.only_cublas = true;
    if (std::strcmp(features->name, "ARCHS") != 0) continue;
    for (const char* at = features->value; *at;) {
      char* end = nullptr;
      const int architecture = int(std::strtol(at, &end, 10));
      if (architecture <= device_architecture) build.architecture = std::max(build.architecture, architecture);
      at = end == at ? at + 1 : end;
    }
  }
  return build;
}

bool host_waits(const ggml_tensor* node, const InnerBuild& build) {
  if (node->op != GGML_OP_MUL_MAT_ID) return false;
  if (build.architecture < kAmpere) return true;
  const ggml_tensor *experts = node->src[0], *inputs = node->src[1];
  if (inputs->type != GGML_TYPE_F32 || node->type != GGML_TYPE_F32) return true;
  const int64_t n_tokens = node->ne[2];
  // There are kernels for few tokens for all types, of up to 5 tokens at least. Up to 8, those types that have no
  // matrix kernel have one of these.
  if (ggml_is_quantized(experts->type)) return n_tokens > (build.only_cublas ? 5 : 8);
  return !has_matrix_kernel(experts, n_tokens);
}

}  // namespace thimble
