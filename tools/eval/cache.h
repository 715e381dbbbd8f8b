// Which caches `thimble eval` measures, by the names that --kv and --method give them, and what they cost in memory.
#pragma once

#include <ggml.h>

#include <string>
#include <vector>

#include "engine/settings.h"
#include "layout.h"
#include "profile/profile.h"

namespace thimble {

/// How caches are coded: by Thimble, or as published.
enum class Method { thimble, vecinfer, tailorkv, oscar, kvarn };
const char* method_name(Method method);
/// Whether the plugin codes the method's caches; else they are emulated (eval/emulated_cache.h).
constexpr bool by_plugin(Method method) {
  return method == Method::thimble || method == Method::vecinfer;
}

struct EvalCache {
  std::string name;
  Method method = Method::thimble;
  bool coded = false;              // true: coded; false: a plain cache of llama.cpp's, of this type
  ggml_type type = GGML_TYPE_F16;  // of llama.cpp's cache
  double key_bits = 16, value_bits = 16;
  int top = 0;  // cells that each KV head retrieves exactly
  bool drop_tail = false;
};

/// Parses "f16", "q8_0", "2", "3/1" (bits of keys / values), "2+64", "2+64drop". Throws std::runtime_error.
EvalCache parse_cache(const std::string& name);

/// The caches that are named. f16 is always there and the first, as all others are compared with it. Published methods
/// add rows behind the cache that they are compared with:
///   vecinfer    every coded cache without retrieval, by a profile of VecInfer's recipe at the same bits
///   oscar       every coded cache of 2 bits without retrieval
///   kvarn       every coded cache without retrieval whose keys and values have whole bits
///   tailorkv    one row, with as many retrieved cells as the first cache that retrieves
std::vector<EvalCache> caches_to_measure(const std::vector<std::string>& names,
                                         const std::vector<std::string>& methods);

struct CacheBytes {
  double compute = 0;  // in the memory of the device that computes: codes, scales, the window
  double store = 0;    // exact keys and values in slower memory
};

/// How many channels of every cell's key a sparse layer of TailorKV keeps in the memory of the device that computes.
constexpr int sketch_channels(int key_dim) {
  return key_dim / 4;
}

/// THIMBLE_KV for a cache that the plugin codes, as `thimble run` makes it from --kv: the settings of the cache's name,
/// then `more` ("window=32,small=0"; empty: the plugin's defaults).
std::string settings_of(const EvalCache& cache, const std::string& more);

/// Bytes of a cache that the plugin codes, as it plans them, with the f16 bytes of layers that it leaves f16.
CacheBytes planned_bytes(const Settings& settings, const CacheLayout& layout);
/// Bits that a number takes in the layers that are coded, with scales; 16 where none is.
double planned_bits(const Settings& settings, const CacheLayout& layout);
/// Bytes of an emulated cache by OSCAR or KVarN: what it codes, its exact rows, and the layers left f16.
CacheBytes published_bytes(const EvalCache& cache, const Settings& settings, const CacheLayout& layout);
/// Bits that a number takes in the layers that such a cache codes, with scales.
double published_bits(const EvalCache& cache, const Settings& settings, const CacheLayout& layout);
/// Bytes of any other cache: a type of llama.cpp's own, or TailorKV's, whose exact window has `n_window` rows.
CacheBytes cache_bytes(const EvalCache& cache, const Profile* profile, const CacheLayout& layout, int n_window);

/// Numbers in the keys and values of one cell, all layers.
double values_of_cell(const ModelShape& shape);

}  // namespace thimble
