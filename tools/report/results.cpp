#include "report/results.h"

#include <algorithm>
#include <stdexcept>

namespace thimble {

using json = nlohmann::json;

std::string cache_name(const json& row) {
  const std::string kv = row.at("kv"), method = row.value("method", "thimble");
  return method == "thimble" || method == "llama.cpp" ? kv : kv + ", " + method;
}

void Results::add(const json& file, const std::string& path) {
  if (file.is_object() && file.contains("results")) {
    for (const json& result : file["results"]) add_rows(result, path);
  } else {
    add_rows(file, path);
  }
}

void Results::add_rows(const json& result, const std::string& path) {
  if (!result.is_object() || !result.contains("model") || !result.contains("rows") || !result["rows"].is_array()) {
    throw std::runtime_error(path + " was not written by thimble eval --json or thimble bench --json");
  }
  const std::string of = result["model"];
  if (!model.empty() && model != of) {
    throw std::runtime_error(path + " is of " + of + ", the files before it of " + model +
                             ": a report is of one model");
  }
  model = of;
  (result.contains("task") ? quality : speed).push_back(result);
  for (const json& row : result["rows"]) {
    const std::string name = cache_name(row);
    if (std::find(caches.begin(), caches.end(), name) != caches.end()) continue;
    caches.insert(name == "f16" ? caches.begin() : caches.end(), name);
  }
}

const json* find_row(const json& result, const std::string& cache) {
  for (const json& row : result["rows"]) {
    if (cache_name(row) == cache) return &row;
  }
  return nullptr;
}

std::string result_name(const json& result) {
  return result["task"].get<std::string>() + ", " + std::to_string(result["context"].get<int>()) + " tokens";
}

CacheSize size_of(const Results& results, const std::string& cache) {
  CacheSize size;
  for (const json& result : results.quality) {
    const json* row = find_row(result, cache);
    const int context = result["context"];
    if (row && context > size.context) size = {(*row)["kv_bytes"], row->value("store_bytes", 0.0), context};
  }
  return size;
}

}  // namespace thimble
