#include "engine/kv_cache.h"

namespace thimble {

int64_t WriteTask::cell(int64_t row) const {
  const char* at = static_cast<const char*>(cells) + row * cell_bytes;
  const int64_t number = is_i64 ? *reinterpret_cast<const int64_t*>(at) : *reinterpret_cast<const int32_t*>(at);
  return stream_places == 0 ? number : number / stream_places * stream_cells + number % stream_places;
}

BatchSight AttendTask::sight() const {
  return {problem.mask,      problem.mask_token,   problem.mask_stream, problem.n_tokens,
          problem.n_streams, problem.first_stream, problem.n_cells};
}

}  // namespace thimble
