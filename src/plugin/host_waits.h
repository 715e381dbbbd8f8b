// Nodes for which the inner backend makes the host wait for the device. Nothing can be recorded meanwhile.
//
// Of ggml-cuda's ops that is MUL_MAT_ID alone: where no kernel takes the experts' numbers from device memory, the host
// reads them and starts a multiplication for each expert. ggml-cuda does not tell which way it will go, and ends the
// program where it would have to wait while a recording is made. So its rule is written down here, as ggml 0.20 to 0.26
// have it (ggml_cuda_mul_mat_id_needs_sync) for cards of architecture 8.0 and later.
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

namespace thimble {

/// What ggml-cuda's choice depends on besides the node.
struct InnerBuild {
  int architecture = 0;      // the newest that it was compiled for and that the device can run, such as 900; 0: unknown
  bool only_cublas = false;  // GGML_CUDA_FORCE_CUBLAS
};

/// By what the backend says of itself (ggml_backend_get_features, may be null), the device's architecture and ggml's
/// version.
InnerBuild inner_build(const ggml_backend_feature* features, int device_architecture, const char* ggml_version);

/// Whether the host may have to wait. True where that is not known.
bool host_waits(const ggml_tensor* node, const InnerBuild& build);

}  // namespace thimble
