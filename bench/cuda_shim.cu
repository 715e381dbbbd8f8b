// C entry points over src/cuda for bench/cuda_attention.py, which owns all memory.
#include "cuda/attend/attend.h"
#include "cuda/layout.h"

using namespace thimble;
using namespace thimble::cuda;

namespace {

DeviceInfo device() {
  DeviceInfo info;
  (void)query_device(0, &info);
  return info;
}

thread_local const char* last_message = "";

int report(const Status& status) {
  last_message = status.message;
  return int(status.code);
}

}  // namespace

extern "C" {

struct AttentionShape {
  int n_streams, n_tokens, n_kv_heads, group, head_dim, n_cells, key_width, value_width, n_exact;
  float softcap, scale;
};

// Device pointers; null where there is none. Blocks are [n_streams][n_kv_heads][n_cells / 64].
struct AttentionPointers {
  uint8_t *keys, *values;
  const uint32_t* key_packed;
  const float* key_scale;
  const uint32_t* value_packed;
  const float* value_scale;
  const float* queries;  // [n_streams][n_tokens][n_heads][head_dim]
  const uint16_t* mask;
  const uint32_t* hidden;
  const uint16_t *exact_keys, *exact_values;
  const int32_t* exact_cells;
  float* output;
  void* workspace;
  size_t workspace_bytes;
};

const char* bench_message() {
  return last_message;
}

void bench_positions(int is_key, int n_subspaces, int* out) {  // [n_subspaces][64]
  for (int m = 0; m < n_subspaces; m++) {
    for (int c = 0; c < 64; c++) {
      *out++ = cuda_position(is_key ? Kind::key : Kind::value, n_subspaces, m, c);
    }
  }
}

static AttendArgs make_args(const AttentionShape& s, const AttentionPointers& p) {
  AttendArgs a;
  a.n_streams = s.n_streams;
  a.n_tokens = s.n_tokens;
  a.n_kv_heads = s.n_kv_heads;
  a.group = s.group;
  a.head_dim = s.head_dim;
  a.n_cells = s.n_cells;
  const auto codec = [&](int width, const uint32_t* packed, const float* scale) {
    CodecTables tables{};
    tables.head_dim = s.head_dim;
    tables.width = width;
    tables.n_kv_heads = s.n_kv_heads;
    tables.packed = packed;
    tables.scale = scale;
    return tables;
  };
  a.key_codec = codec(s.key_width, p.key_packed, p.key_scale);
  a.value_codec = codec(s.value_width, p.value_packed, p.value_scale);
  const auto view = [&](uint8_t* data, const CodecTables& codec) {
    const size_t head = codec.block_bytes() * (s.n_cells / 64);
    return CacheView{data, head * s.n_kv_heads, head, codec.block_bytes()};
  };
  a.keys = view(p.keys, a.key_codec);
  a.values = view(p.values, a.value_codec);
  a.queries = p.queries;
  a.query_head_stride = s.head_dim;
  a.query_token_stride = size_t(s.n_kv_heads) * s.group * s.head_dim;
  a.query_stream_stride = s.n_tokens * a.query_token_stride;
  a.scale = s.scale;
  a.softcap = s.softcap;
  a.mask = p.mask;
  a.mask_token_stride = s.n_cells;
  a.mask_stream_stride = size_t(s.n_cells) * s.n_tokens;
  a.hidden = p.hidden;
  a.hidden_stream_stride = s.n_cells / 32;
  if (s.n_exact > 0) a.exact[0] = {p.exact_keys, p.exact_values, p.exact_cells, s.n_exact, false};
  a.output = p.output;
  return a;
}

size_t bench_workspace_bytes(const AttentionShape* s) {
  return attend_workspace_bytes(device(), make_args(*s, {}));
}

int bench_attend(const AttentionShape* s, const AttentionPointers* p, void* stream) {
  return report(
      attend(device(), make_args(*s, *p), p->workspace, p->workspace_bytes, static_cast<cudaStream_t>(stream)));
}

}  // extern "C"
