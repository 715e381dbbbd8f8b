#include "report/page.h"

#include <algorithm>
#include <cstdio>

#include "report/chart.h"

namespace thimble {
namespace {

using json = nlohmann::json;

constexpr double kMiB = 1 << 20;

const char* const kStyle =
    "body{font:15px/1.5 sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:3px 9px;text-align:right}"
    "td:first-child,th:first-child{text-align:left}.take{background:#e6f4e6;padding:.6em 1em;border-left:4px solid "
    "#2a2}"
    ".no{color:#a00}.yes{color:#070}.grid{stroke:#ddd}svg{max-width:100%}small{color:#666}";

template <typename... T>
std::string format(const char* pattern, T... values) {
  char text[512];
  std::snprintf(text, sizeof text, pattern, values...);
  return text;
}

std::string number(const json* row, const char* member, const char* pattern) {
  if (!row || !row->contains(member) || !(*row)[member].is_number()) return "";
  return format(pattern, (*row)[member].get<double>());
}

/// A table from cells of HTML; the first row is the head.
std::string table(const std::vector<std::vector<std::string>>& rows) {
  std::string html = "<table>\n";
  for (size_t i = 0; i < rows.size(); i++) {
    html += "<tr>";
    for (const std::string& cell : rows[i]) html += i == 0 ? "<th>" + cell + "</th>" : "<td>" + cell + "</td>";
    html += "</tr>\n";
  }
  return html + "</table>\n";
}

/// Bytes, bits, and one column for each result: the KL divergence of a text or a score.
std::string overview(const Results& results, const Recommendation& recommendation) {
  std::vector<std::vector<std::string>> rows = {{"--kv", "bits a value", "MiB", "exact rows, MiB"}};
  for (const json& result : results.quality) {
    const bool is_text = result["rows"].front().contains("kld_mean");
    rows[0].push_back(escape_html(result_name(result)) + (is_text ? "<br>mean KLD" : "<br>score"));
    if (result["task"] == "generate") rows[0].push_back("KLD, last quarter<br>over the first");
    if (result["task"] == "tools") rows[0].push_back("calls written,<br>right");
  }
  rows[0].push_back("within the bounds");
  for (const std::string& cache : results.caches) {
    const CacheSize size = size_of(results, cache);
    if (size.context == 0) continue;  // only its speed was measured
    std::string bits;
    std::vector<std::string> cells;
    for (const json& result : results.quality) {
      const json* row = find_row(result, cache);
      if (row) bits = number(row, "bits_per_value", "%.2f");
      cells.push_back(row && row->contains("kld_mean") ? number(row, "kld_mean", "%.4f")
                                                       : number(row, "score", "%.3f"));
      if (result["task"] == "generate") cells.push_back(number(row, "kld_growth", "%.2f"));
      if (result["task"] == "tools") cells.push_back(number(row, "call_right", "%.2f"));
    }
    std::string within;
    for (const Judgement& j : recommendation.judged) {
      if (j.cache != cache) continue;
      within = !j.against.empty()                           ? "<span class=\"no\">no</span>"
               : j.n_measured < int(results.quality.size()) ? "not all measured"
                                                            : "<span class=\"yes\">yes</span>";
    }
    rows.push_back({escape_html(cache), bits, format("%.1f", size.kv / kMiB),
                    size.store > 0 ? format("%.1f", size.store / kMiB) : ""});
    rows.back().insert(rows.back().end(), cells.begin(), cells.end());
    rows.back().push_back(within);
  }
  return table(rows);
}

std::string reasons(const Recommendation& recommendation) {
  std::string html;
  for (const Judgement& j : recommendation.judged) {
    for (const std::string& what : j.against) {
      html += "<li><b>" + escape_html(j.cache) + "</b> " + escape_html(what) + "</li>\n";
    }
    for (const std::string& what : j.remarks) {
      html += "<li>" + escape_html(j.cache) + " " + escape_html(what) + " <small>(does not count)</small></li>\n";
    }
  }
  return html.empty() ? "" : "<h2>What speaks against a cache</h2>\n<ul>\n" + html + "</ul>\n";
}

std::string bytes_chart(const Results& results, const json& result) {
  std::vector<Series> series;
  for (const std::string& cache : results.caches) {
    const json* row = find_row(result, cache);
    Series s{cache, {}};
    if (row && row->contains("kld_mean"))
      s.points.emplace_back((*row)["kv_bytes"].get<double>() / kMiB, (*row)["kld_mean"]);
    series.push_back(std::move(s));
  }
  return draw_chart({"MiB next to the compute", true}, {"mean KL divergence from f16", true}, series, /*lines=*/false);
}

std::string position_chart(const Results& results, const json& result) {
  constexpr size_t kPoints = 16;
  std::vector<Series> series;
  for (const std::string& cache : results.caches) {
    const json* row = find_row(result, cache);
    Series s{cache, {}};
    if (row && row->contains("kld_by_position")) {
      const std::vector<double> all = (*row)["kld_by_position"];
      const size_t n_points = std::min(kPoints, all.size());
      for (size_t i = 0; i < n_points; i++) {
        const size_t begin = all.size() * i / n_points, end = all.size() * (i + 1) / n_points;
        double sum = 0;
        for (size_t at = begin; at < end; at++) sum += all[at];
        s.points.emplace_back(double(begin + end) / 2, sum / double(end - begin));
      }
    }
    series.push_back(std::move(s));
  }
  return draw_chart({"tokens decoded", false}, {"KL divergence from f16", true}, series, /*lines=*/true);
}

/// Scores of a result's parts, coloured by how much of f16's is left.
std::string score_table(const Results& results, const json& result, const char* list, const char* name) {
  const json* exact = find_row(result, "f16");
  if (!exact || !exact->contains(list)) return "";
  const bool has_chance = (*exact)[list].front().contains("chance");
  std::vector<std::vector<std::string>> rows = {{""}};
  for (const std::string& cache : results.caches) {
    if (find_row(result, cache)) rows[0].push_back(escape_html(cache));
  }
  if (has_chance) rows[0].push_back("chance");
  for (size_t i = 0; i < (*exact)[list].size(); i++) {
    const json& part = (*exact)[list][i];
    rows.push_back({part[name].is_string() ? escape_html(part[name]) : format("%g", part[name].get<double>())});
    for (const std::string& cache : results.caches) {
      const json* row = find_row(result, cache);
      if (!row) continue;
      const double score = (*row)[list][i]["score"], of_exact = part["score"];
      const double left = of_exact > 0 ? std::clamp(score / of_exact, 0.0, 1.0) : 1;
      rows.back().push_back(format("<span style=\"background:hsl(%.0f 70%% 85%%);padding:2px 5px\">%.3f</span>",
                                   120 * std::max(0.0, left - 0.5) * 2, score));
    }
    if (has_chance) rows.back().push_back(format("%.3f", part["chance"].get<double>()));
  }
  return table(rows);
}

std::string speed_section(const Results& results, const json& result) {
  std::vector<Series> series;
  std::vector<std::vector<std::string>> rows = {
      {"--kv", "tokens in the cache", "decoded tokens/s", "lowest to highest", "over f16", "prompt tokens/s"}};
  for (const std::string& cache : results.caches) {
    Series s{cache, {}};
    for (const json& row : result["rows"]) {
      if (cache_name(row) != cache) continue;
      s.points.emplace_back(row["depth"].get<double>(), row["decode_tok_s"].get<double>());
      const json& range = row["decode_tok_s_range"];
      rows.push_back({escape_html(cache), number(&row, "depth", "%.0f"), number(&row, "decode_tok_s", "%.1f"),
                      format("%.1f to %.1f", range[0].get<double>(), range[1].get<double>()),
                      number(&row, "decode_over_f16", "%.2f"), number(&row, "prompt_tok_s", "%.1f")});
    }
    series.push_back(std::move(s));
  }
  return "<h2>Speed</h2>\n<p>Medians of " + std::to_string(result.value("rounds", 0)) + " rounds, " +
         std::to_string(result.value("threads", 0)) + " threads.</p>\n" +
         draw_chart({"tokens in the cache", false}, {"decoded tokens a second", false}, series, /*lines=*/true) +
         table(rows);
}

std::string quality_section(const Results& results, const json& result) {
  std::string html = "<h2>" + escape_html(result_name(result)) +
                     "</h2>\n<p><small>Profile: " + escape_html(result.value("profile", "none")) + ".</small></p>\n";
  if (result["rows"].front().contains("kld_mean")) {
    html += bytes_chart(results, result) + position_chart(results, result);
  }
  html += score_table(results, result, "by_task", "task") + score_table(results, result, "by_value", "value") +
          score_table(results, result, "by_depth", "depth");
  return html;
}

}  // namespace

std::string write_page(const Results& results, const Recommendation& recommendation) {
  const std::string model = escape_html(results.model);
  std::string html = "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>KV caches of " + model +
                     "</title>\n<style>" + kStyle + "</style></head><body>\n<h1>KV caches of " + model + "</h1>\n";
  html += "<div class=\"take\">\n";
  for (const std::string& sentence : recommendation.words) html += "<p>" + escape_html(sentence) + "</p>\n";
  html += "</div>\n";
  if (!results.quality.empty()) html += overview(results, recommendation);
  html += reasons(recommendation);
  for (const json& result : results.quality) html += quality_section(results, result);
  for (const json& result : results.speed) html += speed_section(results, result);
  return html + "</body></html>\n";
}

}  // namespace thimble
