#include "eval/emulated_cache.h"

#include <ggml-backend.h>
#include <ggml.h>

#include <stdexcept>

#include "cache/cache_name.h"

namespace thimble {

bool EmulatedCache::callback(ggml_tensor* node, bool ask, void* user_data) {
  EmulatedCache& self = *static_cast<EmulatedCache*>(user_data);
  const bool stores = node->op == GGML_OP_SET_ROWS, attends = node->op == GGML_OP_FLASH_ATTN_EXT;
  if (!stores && !attends) return !ask;
  const ggml_tensor* root = stores ? node : node->src[1];
  while (root->view_src) root = root->view_src;
  const auto cache = parse_cache_name(root->name);
  if (!cache || (attends && !self.attends(cache->layer))) return !ask;
  if (ask) return true;
  try {
    if (root->type != GGML_TYPE_F16) throw std::runtime_error("an emulated cache must be f16");
    if (attends) {
      self.attended(node, cache->layer);
    } else {
      int64_t first_written = 0;  // of cells in a row, since the sequence is written in order
      ggml_backend_tensor_get(node->src[1], &first_written, 0, sizeof first_written);
      self.stored(root, cache->layer, cache->kind, int(first_written), int(node->src[1]->ne[0]));
    }
  } catch (const std::exception& e) {
    self.error_ = e.what();
    return false;
  }
  return true;
}

std::vector<uint16_t> EmulatedCache::get_rows(const ggml_tensor* cache, int first_cell, int n) {
  std::vector<uint16_t> rows(size_t(n) * size_t(cache->ne[0]));
  ggml_backend_tensor_get(cache, rows.data(), size_t(first_cell) * cache->nb[1], rows.size() * sizeof(uint16_t));
  return rows;
}

void EmulatedCache::set_rows(const ggml_tensor* cache, int first_cell, const std::vector<uint16_t>& rows) {
  ggml_backend_tensor_set(const_cast<ggml_tensor*>(cache), rows.data(), size_t(first_cell) * cache->nb[1],
                          rows.size() * sizeof(uint16_t));
}

uint16_t* EmulatedCache::row_of(const ggml_tensor* cache, int cell) {
  if (!ggml_backend_buffer_is_host(cache->buffer)) {
    throw std::runtime_error("this emulated cache must be in memory that the CPU reads");
  }
  return reinterpret_cast<uint16_t*>(static_cast<char*>(cache->data) + size_t(cell) * cache->nb[1]);
}

void EmulatedCache::check() const {
  if (!error_.empty()) throw std::runtime_error(error_);
}

}  // namespace thimble
