#include "eval/cache.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <regex>
#include <stdexcept>

#include "eval/kvarn_cache.h"
#include "eval/oscar_cache.h"

namespace thimble {

const char* method_name(Method method) {
  switch (method) {
    case Method::thimble:
      return "thimble";
    case Method::vecinfer:
      return "vecinfer";
    case Method::tailorkv:
      return "tailorkv";
    case Method::oscar:
      return "oscar";
    case Method::kvarn:
      return "kvarn";
  }
  return "";
}

namespace {

/// Whether a published method has a row beside one of our caches.
bool compares_with(Method method, const EvalCache& cache) {
  if (!cache.coded || cache.top > 0) return false;
  if (method == Method::oscar) return cache.key_bits == 2 && cache.value_bits == 2;
  const auto whole = [](double bits) { return bits == int(bits) && bits < 16; };
  return method == Method::vecinfer || (whole(cache.key_bits) && whole(cache.value_bits));
}

/// Bits of a number in a layer that OSCAR or KVarN codes.
double bits_of_number(const EvalCache& cache, Kind kind, int head_dim) {
  if (cache.method == Method::oscar) return oscar::bits(head_dim);
  return kvarn::bits(kind, head_dim, int(kind == Kind::key ? cache.key_bits : cache.value_bits));
}

}  // namespace

EvalCache parse_cache(const std::string& name) {
  EvalCache cache;
  cache.name = name;
  for (ggml_type type :
       {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0, GGML_TYPE_Q4_1, GGML_TYPE_Q4_0}) {
    if (name == ggml_type_name(type)) {
      cache.type = type;
      return cache;
    }
  }
  static const std::regex coded(R"(([0-9.]+)(?:/([0-9.]+))?(?:\+([0-9]{1,5})(drop)?)?)");
  std::smatch part;
  if (!std::regex_match(name, part, coded)) {
    throw std::runtime_error("no cache called " + name +
                             ": f16, q8_0, q4_0, bits like 2, bits of keys/values like 3/1, or bits and retrieved "
                             "cells like 2+64 (2+64drop drops the other cells)");
  }
  cache.coded = true;
  cache.key_bits = cache.value_bits = std::atof(part.str(1).c_str());
  if (part[2].matched) cache.value_bits = std::atof(part.str(2).c_str());
  cache.top = std::atoi(part.str(3).c_str());
  cache.drop_tail = part[4].matched;
  return cache;
}

std::vector<EvalCache> caches_to_measure(const std::vector<std::string>& names,
                                         const std::vector<std::string>& methods) {
  const auto wanted = [&](Method m) { return std::count(methods.begin(), methods.end(), method_name(m)) > 0; };
  std::vector<EvalCache> caches = {parse_cache("f16")};
  bool tailorkv = wanted(Method::tailorkv);
  for (const std::string& name : names) {
    if (name == "f16") continue;
    const EvalCache cache = parse_cache(name);
    caches.push_back(cache);
    EvalCache like = cache;
    for (Method method : {Method::vecinfer, Method::oscar, Method::kvarn}) {
      if (!wanted(method) || !compares_with(method, cache)) continue;
      like.method = method;
      caches.push_back(like);
    }
    if (cache.top > 0 && tailorkv) {
      like = parse_cache("1+" + std::to_string(cache.top));
      like.method = Method::tailorkv;
      like.drop_tail = true;
      caches.push_back(like);
      tailorkv = false;
    }
  }
  if (tailorkv) throw std::runtime_error("--method tailorkv needs a cache that retrieves, such as --kv 2+64");
  return caches;
}

std::string settings_of(const EvalCache& cache, const std::string& more) {
  char text[48];
  std::snprintf(text, sizeof text, "bits=%g/%g", cache.key_bits, cache.value_bits);
  std::string settings = text;
  if (cache.top > 0) settings += ",top=" + std::to_string(cache.top);
  if (cache.drop_tail) settings += ",tail=drop";
  return settings + (more.empty() ? "" : "," + more);
}

CacheBytes planned_bytes(const Settings& settings, const CacheLayout& layout) {
  const PlanTotals totals = plan_totals(settings, layout);
  return {double(totals.coded_bytes + totals.f16_bytes), double(totals.store_bytes)};
}

double planned_bits(const Settings& settings, const CacheLayout& layout) {
  double bits = 0, numbers = 0;
  for (const LayerPlan& plan : plan_layers(settings, layout)) {
    if (!plan.coded) continue;
    for (Kind kind : {Kind::key, Kind::value}) {
      const Format& format = plan.side(kind);
      numbers += double(plan.shape.n_kv_heads) * format.head_dim;
      if (plan.has_codes[int(kind)]) bits += plan.shape.n_kv_heads * 8 * format.vector_bytes();
    }
  }
  return numbers > 0 ? bits / numbers : 16;
}

CacheBytes published_bytes(const EvalCache& cache, const Settings& settings, const CacheLayout& layout) {
  const int n_exact = cache.method == Method::oscar ? oscar::kFirst + oscar::kLast : kvarn::kExact;
  CacheBytes bytes;
  for (const LayerPlan& plan : plan_layers(settings, layout)) {
    if (!plan.coded) bytes.compute += double(plan.f16_bytes);
    for (Kind kind : {Kind::key, Kind::value}) {
      if (!plan.coded) continue;
      const int dim = plan.side(kind).head_dim;
      const double vector = bits_of_number(cache, kind, dim) * dim / 8;
      bytes.compute += plan.shape.n_kv_heads * (vector * double(plan.shape.n_cells()) + 2.0 * dim * n_exact);
    }
  }
  return bytes;
}

double published_bits(const EvalCache& cache, const Settings& settings, const CacheLayout& layout) {
  double bits = 0, numbers = 0;
  for (const LayerPlan& plan : plan_layers(settings, layout)) {
    for (Kind kind : {Kind::key, Kind::value}) {
      if (!plan.coded) continue;
      const double n = double(plan.shape.n_kv_heads) * plan.side(kind).head_dim;
      numbers += n;
      bits += n * bits_of_number(cache, kind, plan.side(kind).head_dim);
    }
  }
  return numbers > 0 ? bits / numbers : 16;
}

CacheBytes cache_bytes(const EvalCache& cache, const Profile* profile, const CacheLayout& layout, int n_window) {
  CacheBytes bytes;
  for (size_t i = 0; i < layout.layers.size(); i++) {
    const LayerShape& layer = layout.shape.layers[i];
    if (layer.n_kv_heads == 0) continue;
    const double n_cells = double(layout.cells(int(i)));
    for (Kind kind : {Kind::key, Kind::value}) {
      const int dim = layer.dim(kind);
      double of_head = double(ggml_row_size(cache.type, dim)) * n_cells;
      if (cache.method == Method::tailorkv) {
        const bool retrieves = profile && !profile->quantization_friendly(int(i));
        // A quantized layer has a bit a number, and the least and greatest of every 64 as f16. A retrieving layer has
        // the sketch and the rows that were fetched.
        of_head =
            2.0 * dim * n_window + (!retrieves          ? dim / 8.0 * 1.5 * n_cells
                                    : kind == Kind::key ? 2.0 * sketch_channels(dim) * n_cells + 2.0 * dim * cache.top
                                                        : 2.0 * dim * cache.top);
        if (retrieves) bytes.store += layer.n_kv_heads * 2.0 * dim * n_cells;
      }
      bytes.compute += layer.n_kv_heads * of_head;
    }
  }
  return bytes;
}

double values_of_cell(const ModelShape& shape) {
  double n = 0;
  for (const LayerShape& layer : shape.layers) n += layer.n_kv_heads * (layer.key_dim + layer.value_dim);
  return n;
}

}  // namespace thimble
