#include "report/recommendation.h"

#include <algorithm>
#include <cstdio>

namespace thimble {
namespace {

using json = nlohmann::json;

template <typename... T>
std::string format(const char* pattern, T... values) {
  char text[512];
  std::snprintf(text, sizeof text, pattern, values...);
  return text;
}

bool has_number(const json& row, const char* member) {
  return row.contains(member) && row[member].is_number();
}

/// What one result says of a cache.
void judge(const json& result, const json& row, const json& exact, const Bounds& bounds, Judgement& out) {
  const std::string of = result_name(result);
  if (has_number(row, "kld_mean") && row["kld_mean"] > bounds.kld) {
    out.against.push_back(
        format("%s: mean KLD %.4f, above %.4g", of.c_str(), row["kld_mean"].get<double>(), bounds.kld));
  }
  if (row.contains("kld_by_quarter")) {
    const double last = row["kld_by_quarter"].back();
    if (last > bounds.kld) {
      out.against.push_back(format("%s: KLD %.4f in the last quarter, above %.4g", of.c_str(), last, bounds.kld));
    }
    if (has_number(row, "kld_growth") && row["kld_growth"] > bounds.growth) {
      out.remarks.push_back(format("%s: KLD grows by a factor of %.2f from the first to the last quarter", of.c_str(),
                                   row["kld_growth"].get<double>()));
    }
  }
  if (has_number(row, "score")) {
    const double score = row["score"], of_exact = exact["score"];
    if (score < bounds.score * of_exact) {
      out.against.push_back(
          format("%s: score %.3f, below %.4g of f16's %.3f", of.c_str(), score, bounds.score, of_exact));
    }
  }
  if (has_number(row, "call_right") && row["call_right"] < exact["call_right"]) {
    out.remarks.push_back(format("%s: %.2f of the calls that it writes are right, f16's %.2f", of.c_str(),
                                 row["call_right"].get<double>(), exact["call_right"].get<double>()));
  }
}

/// Tasks at which f16 itself is little better than chance.
std::vector<std::string> weak_tasks(const Results& results, const Bounds& bounds) {
  std::vector<std::string> weak;
  for (const json& result : results.quality) {
    const json* exact = find_row(result, "f16");
    if (!exact || !has_number(*exact, "score") || !has_number(*exact, "chance")) continue;
    const double score = (*exact)["score"], chance = (*exact)["chance"];
    if (score < chance + bounds.margin) {
      weak.push_back(format("%s: f16 itself scores %.3f where chance is %.3f, so this task tells little of a cache.",
                            result_name(result).c_str(), score, chance));
    }
  }
  return weak;
}

/// "It decodes at 2.31 times f16's speed with 8000 tokens in the cache."
std::string speed_words(const Results& results, const std::string& cache) {
  const json* deepest = nullptr;
  for (const json& result : results.speed) {
    for (const json& row : result["rows"]) {
      if (cache_name(row) == cache && has_number(row, "decode_over_f16") &&
          (!deepest || row["depth"] >= (*deepest)["depth"])) {
        deepest = &row;
      }
    }
  }
  if (!deepest) return {};
  return format(" It decodes %.1f tokens a second with %d tokens in the cache, %.2f times as fast as f16.",
                (*deepest)["decode_tok_s"].get<double>(), (*deepest)["depth"].get<int>(),
                (*deepest)["decode_over_f16"].get<double>());
}

std::string smallest(const Results& results, const std::vector<Judgement>& judged, bool with_store) {
  const auto bytes = [&](const std::string& cache) {
    const CacheSize size = size_of(results, cache);
    return size.kv + (with_store ? size.store : 0);
  };
  std::string best = "f16";
  for (const Judgement& j : judged) {
    const bool fits = j.against.empty() && j.n_measured == int(results.quality.size());
    if (fits && j.cache.find(", ") == std::string::npos && bytes(j.cache) < bytes(best)) best = j.cache;
  }
  return best;
}

/// What to give `thimble run` and `thimble serve` for a cache.
std::string setting_of(const Results& results, const std::string& cache) {
  for (const json& result : results.quality) {
    const json* row = find_row(result, cache);
    if (row && row->value("method", "") == "llama.cpp") return format("-ctk %s -ctv %s", cache.c_str(), cache.c_str());
  }
  return "--kv " + cache;
}

std::string size_words(const Results& results, const std::string& cache) {
  constexpr double kMiB = 1 << 20;
  const CacheSize size = size_of(results, cache), exact = size_of(results, "f16");
  std::string words =
      format("%.1f MiB for %d tokens, where f16 takes %.1f", size.kv / kMiB, size.context, exact.kv / kMiB);
  if (size.store > 0) words += format(", and %.1f MiB of exact rows in RAM or a file", size.store / kMiB);
  return words;
}

}  // namespace

Recommendation recommend(const Results& results, const Bounds& bounds) {
  Recommendation out;
  for (const std::string& cache : results.caches) {
    if (cache == "f16") continue;
    Judgement judgement{cache, {}, {}, 0};
    for (const json& result : results.quality) {
      const json *row = find_row(result, cache), *exact = find_row(result, "f16");
      if (!row || !exact) continue;
      judgement.n_measured++;
      judge(result, *row, *exact, bounds, judgement);
    }
    out.judged.push_back(std::move(judgement));
  }
  out.smallest = out.smallest_beside_store = "f16";
  if (results.quality.empty()) {
    out.words.push_back(
        "Only speed was measured, so nothing says which cache is good enough: add a file of thimble "
        "eval --task all --json.");
    return out;
  }
  out.smallest = smallest(results, out.judged, /*with_store=*/true);
  out.smallest_beside_store = smallest(results, out.judged, /*with_store=*/false);
  const std::string why =
      format("mean KLD at most %.4g and every task's score at least %.4g of f16's", bounds.kld, bounds.score);
  if (out.smallest != "f16") {
    out.words.push_back("Take " + setting_of(results, out.smallest) + ": it is the smallest cache with " + why +
                        ". It takes " + size_words(results, out.smallest) + "." + speed_words(results, out.smallest));
  } else {
    out.words.push_back("Keep f16: no smaller cache that was measured has " + why + ".");
  }
  if (out.smallest_beside_store != out.smallest) {
    out.words.push_back("Where the exact rows may lie in slower memory (RAM beside a GPU, or a file), take " +
                        setting_of(results, out.smallest_beside_store) + ": it takes " +
                        size_words(results, out.smallest_beside_store) + "." +
                        speed_words(results, out.smallest_beside_store));
  }
  for (std::string& weak : weak_tasks(results, bounds)) out.words.push_back(std::move(weak));
  return out;
}

}  // namespace thimble
