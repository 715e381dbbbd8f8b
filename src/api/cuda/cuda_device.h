// The calls of the API on CUDA: what there are kernels for, and the kernels' arguments. Index arrays come from the
// caller's memory and are copied to the device within the call; all else is device memory.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "api/cuda/ops.h"
#include "api/device.h"
#include "api/handles.h"

namespace thimble::api {

class CudaDevice : public Device {
public:
  explicit CudaDevice(std::unique_ptr<CudaOps> ops) : ops_(std::move(ops)) {}

  const char* name() const override { return ops_->name(); }
  void check_stream(const void*) const override {}
  void encode(const thimble_encode_args& args, void* stream) override;
  void decode(const thimble_decode_args& args, void* stream) override;
  void attend(const thimble_attend_args& args, void* stream) override;  // cuda_attend.cpp

private:
  struct Codec {
    std::weak_ptr<const std::vector<HeadCodec>> heads;
    std::unique_ptr<CudaTables> tables;
  };

  /// A codec's tables, which are copied to the device when it is met first.
  const cuda::CodecTables& tables(const thimble_codec& codec);

  std::unique_ptr<CudaOps> ops_;
  std::map<const std::vector<HeadCodec>*, Codec> codecs_;  // tables go before ops_
};

/// Throws a Failure of THIMBLE_UNSUPPORTED. `what` is a callable where the sentence must be put together.
inline void require_supported(bool holds, const char* what) {
  if (!holds) throw Failure(THIMBLE_UNSUPPORTED, what);
}
template <std::invocable What>
void require_supported(bool holds, What what) {
  if (!holds) throw Failure(THIMBLE_UNSUPPORTED, what());
}

/// Throws a Failure where CUDA's kernels do not take a codec's vectors or a caller's blocks as they lie.
void check_cuda(const thimble_codec& codec, const thimble_blocks& blocks, const char* name);

/// Between CudaOps::begin and end.
class CudaCall {
public:
  CudaCall(CudaOps& ops, void* stream) : ops_(ops) { ops_.begin(stream); }
  ~CudaCall() { ops_.end(); }
  CudaCall(const CudaCall&) = delete;
  CudaCall& operator=(const CudaCall&) = delete;

private:
  CudaOps& ops_;
};

}  // namespace thimble::api
