// What the API has a CUDA device do. No CUDA in it: tests run the kernels' own source behind this interface on a
// machine without a device.
#pragma once

#include <cstddef>
#include <memory>

#include "cuda/host/tables.h"
#include "cuda/state/cell_args.h"
#include "cuda/types.h"

namespace thimble::api {

/// A codec's tables in device memory.
class CudaTables {
public:
  virtual ~CudaTables() = default;
  virtual const cuda::CodecTables& view() const = 0;
};

/// What stands behind `begin` is called between begin and end, on the stream that begin was given, and is only
/// enqueued. Each throws a Failure where the device fails.
class CudaOps {
public:
  virtual ~CudaOps() = default;

  virtual const char* name() const = 0;
  /// Whether the device has the shared memory to attend to keys and values of these widths.
  virtual bool fits(int head_dim, int key_width, int value_width) const = 0;
  /// Query tokens of one `attend` at most; their parts take scratch memory.
  virtual int tokens_at_once() const = 0;
  /// Copies tables to the device and waits until they are there. They must not outlive this object.
  virtual std::unique_ptr<CudaTables> tables(const cuda::HostTables& tables) = 0;

  virtual void begin(void* stream) = 0;
  /// Gives scratch memory back when all that was enqueued has run.
  virtual void end() noexcept = 0;
  /// Memory until `end`, aligned to 256 bytes.
  virtual void* scratch(size_t bytes) = 0;
  /// The same, with a copy of host memory that may change when this returns.
  virtual void* upload(const void* from, size_t bytes) = 0;

  virtual void encode(const cuda::EncodeArgs& args) = 0;
  virtual void read_rows(const cuda::CellArgs& args) = 0;
  virtual void widen(const cuda::CellArgs& args) = 0;
  /// It finds the room for the parts of splits itself.
  virtual void attend(const cuda::AttendArgs& args) = 0;
};

/// Of the device that CUDA gives this number. Throws a Failure where there is none or the build has no CUDA.
std::unique_ptr<CudaOps> make_cuda_ops(int index);

}  // namespace thimble::api
