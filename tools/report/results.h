// What `thimble eval --json` and `thimble bench --json` wrote of one model, cache by cache.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace thimble {

/// A cache's name: "2", or with its method where that is not ours or llama.cpp's: "2, vecinfer".
std::string cache_name(const nlohmann::json& row);

struct Results {
  std::string model;
  std::vector<nlohmann::json> quality;  // results of `thimble eval`, each of one task and context
  std::vector<nlohmann::json> speed;    // those of `thimble bench`
  std::vector<std::string> caches;      // all that have a row of quality or speed, f16 first where there is one

  /// Adds the content of a file. Throws std::runtime_error where it is neither's, or of another model.
  void add(const nlohmann::json& file, const std::string& path);

private:
  void add_rows(const nlohmann::json& result, const std::string& path);
};

/// A cache's row of a result; null where it has none.
const nlohmann::json* find_row(const nlohmann::json& result, const std::string& cache);
/// "ruler, 8192 tokens"
std::string result_name(const nlohmann::json& result);

/// The bytes of a cache in the results of the longest context.
struct CacheSize {
  double kv = 0;     // next to the compute: codes, the window, caches that stay f16
  double store = 0;  // the exact store's, in RAM or a file
  int context = 0;   // 0: not known
};
CacheSize size_of(const Results& results, const std::string& cache);

}  // namespace thimble
