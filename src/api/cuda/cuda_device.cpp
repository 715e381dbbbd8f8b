#include "api/cuda/cuda_device.h"

#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/layout.h"

namespace thimble::api {
namespace {

constexpr int64_t kMaxCount = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxVectors = 1 << 29;  // of a call

template <typename Args>
void check_rows(const Args& args) {
  check_cuda(*args.codec, args.blocks, "blocks");
  require_supported(args.n_rows <= kMaxVectors / args.codec->n_heads(),
                    "on CUDA a call takes at most 2^29 vectors: make several calls");
}

// All blocks of a memory: each is a stream of its own, so that a cell's number says where it is.
cuda::CacheView view_of(const thimble_blocks& blocks) {
  return {static_cast<uint8_t*>(blocks.data), blocks.block_stride, blocks.head_stride, blocks.block_stride};
}

}  // namespace

void check_cuda(const thimble_codec& codec, const thimble_blocks& blocks, const char* name) {
  const Format& format = codec.format();
  require_supported(cuda::cuda_supports(format), [&] {
    return std::string(
               "on CUDA a codec is of 64, 128 or 256 numbers a head, at 4, 2 or 1 bits with one width in each "
               "vector; that of ") +
           name + " is of " + std::to_string(format.head_dim) + " at " + std::to_string(format.bits()) +
           ": use another rate, a profile made with thimble calibrate --even, or a context on the CPU";
  });
  const auto address = reinterpret_cast<uintptr_t>(blocks.data);
  require_supported((address | blocks.block_stride | blocks.head_stride) % 16 == 0, [&] {
    return std::string("on CUDA ") + name + ".data, block_stride and head_stride must be multiples of 16";
  });
  require_supported(blocks.n_blocks <= kMaxCount,
                    [&] { return std::string("on CUDA ") + name + ".n_blocks must be below 2^31"; });
}

const cuda::CodecTables& CudaDevice::tables(const thimble_codec& codec) {
  const auto it = codecs_.find(codec.heads.get());
  if (it != codecs_.end() && !it->second.heads.expired()) return it->second.tables->view();
  std::erase_if(codecs_, [](const auto& entry) { return entry.second.heads.expired(); });
  try {
    Codec& made = codecs_[codec.heads.get()] = {codec.heads, ops_->tables(cuda::pack_tables(*codec.heads))};
    return made.tables->view();
  } catch (const std::invalid_argument& e) {
    throw Failure(THIMBLE_UNSUPPORTED, std::string("on CUDA: ") + e.what());
  }
}

void CudaDevice::encode(const thimble_encode_args& args, void* stream) {
  check_rows(args);
  if (args.n_rows == 0) return;
  const bool is_key = args.codec->kind() == Kind::key;
  cuda::EncodeArgs a;
  a.n_kv_heads = args.codec->n_heads();
  a.head_dim = args.codec->format().head_dim;
  a.n_tokens = int(args.n_rows);
  a.cells_per_stream = kBlockCells;
  // The kernel's other side has no rows and does nothing.
  a.key_codec = a.value_codec = tables(*args.codec);
  a.key_cache = a.value_cache = view_of(args.blocks);
  a.key_token_stride = a.value_token_stride = args.row_stride;
  a.key_head_stride = a.value_head_stride = a.head_dim;

  const CudaCall call(*ops_, stream);
  a.cells = static_cast<const int64_t*>(ops_->upload(args.cells, size_t(args.n_rows) * sizeof(int64_t)));
  const void* rows = args.rows;
  if (args.type == THIMBLE_F16) {
    const size_t numbers = size_t(args.n_rows - 1) * args.row_stride + size_t(a.n_kv_heads) * a.head_dim;
    require_supported(numbers <= size_t(kMaxCount),
                      "on CUDA f16 rows of a call extend over fewer than 2^31 numbers: make several calls");
    cuda::CellArgs w;
    w.n = int(numbers);
    w.head_dim = 1;
    w.halves = static_cast<uint16_t*>(const_cast<void*>(rows));
    w.floats = static_cast<float*>(ops_->scratch(numbers * sizeof(float)));
    ops_->widen(w);
    rows = w.floats;
  }
  (is_key ? a.keys : a.values) = static_cast<const float*>(rows);
  ops_->encode(a);
}

void CudaDevice::decode(const thimble_decode_args& args, void* stream) {
  check_rows(args);
  if (args.n_rows == 0) return;
  cuda::CellArgs a;
  a.is_key = args.codec->kind() == Kind::key;
  a.n_kv_heads = args.codec->n_heads();
  a.head_dim = args.codec->format().head_dim;
  a.cells_per_stream = kBlockCells;
  a.cache = view_of(args.blocks);
  a.codec = tables(*args.codec);
  a.n = int(args.n_rows);
  a.row_stride = args.row_stride;
  if (args.type == THIMBLE_F16) {
    a.halves = static_cast<uint16_t*>(args.rows);
  } else {
    a.floats = static_cast<float*>(args.rows);
  }

  const CudaCall call(*ops_, stream);
  a.cells = static_cast<const int64_t*>(ops_->upload(args.cells, size_t(args.n_rows) * sizeof(int64_t)));
  ops_->read_rows(a);
}

std::unique_ptr<Device> make_cuda_device(int index) {
  return std::make_unique<CudaDevice>(make_cuda_ops(index));
}

}  // namespace thimble::api
