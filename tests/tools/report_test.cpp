// `thimble report`: which cache it recommends, in which words, and the page.
#include <gtest/gtest.h>

#include <cmath>

#include "report/chart.h"
#include "report/page.h"
#include "report/recommendation.h"
#include "report/results.h"

namespace thimble {
namespace {

using json = nlohmann::json;

constexpr double kMiB = 1 << 20;

json row(const char* kv, double mib, json more, double store = 0) {
  json out = {{"kv", kv},
              {"method", kv[0] == 'f' ? "llama.cpp" : "thimble"},
              {"bits_per_value", 2.25},
              {"kv_bytes", mib * kMiB},
              {"store_bytes", store * kMiB}};
  out.update(more);
  return out;
}

json result(const char* task, json rows) {
  return {{"task", task}, {"model", "m.gguf"}, {"context", 8192}, {"profile", "none"}, {"rows", rows}};
}

json kld(double mean, double last) {
  return {{"kld_mean", mean},
          {"kld_by_quarter", {mean, mean, mean, last}},
          {"kld_growth", mean > 0 ? json(last / mean) : json()},
          {"kld_by_position", {mean, last}}};
}

json score(double value) {
  return {{"score", value}, {"chance", 0.1}, {"by_task", {{{"task", "vt"}, {"score", value}, {"chance", 0.1}}}}};
}

/// Caches of 100, 50, 30 and 20 MiB; that of 20 has an exact store.
Results measured(const std::vector<double>& klds, const std::vector<double>& scores) {
  const char* names[] = {"f16", "4", "2", "1+64"};
  const double mib[] = {100, 50, 30, 20}, store[] = {0, 0, 0, 100};
  json generate = json::array(), ruler = json::array();
  for (size_t i = 0; i < klds.size(); i++) {
    generate.push_back(row(names[i], mib[i], kld(klds[i], klds[i]), store[i]));
    ruler.push_back(row(names[i], mib[i], score(scores[i]), store[i]));
  }
  Results results;
  results.add({{"results", {result("generate", generate), result("ruler", ruler)}}}, "eval.json");
  return results;
}

TEST(Recommendation, SmallestWithinTheBounds) {
  const Recommendation all = recommend(measured({0, 0.01, 0.03}, {0.8, 0.8, 0.79}), {});
  EXPECT_EQ(all.smallest, "2");
  EXPECT_EQ(all.words.at(0),
            "Take --kv 2: it is the smallest cache with mean KLD at most 0.05 and every task's score at least 0.95 of "
            "f16's. It takes 30.0 MiB for 8192 tokens, where f16 takes 100.0.");
  EXPECT_EQ(all.words.size(), 1u);
  EXPECT_EQ(recommend(measured({0, 0.01, 0.06}, {0.8, 0.8, 0.8}), {}).smallest, "4") << "too much divergence";
  EXPECT_EQ(recommend(measured({0, 0.01, 0.03}, {0.8, 0.8, 0.7}), {}).smallest, "4") << "too low a score";
  EXPECT_EQ(recommend(measured({0, 0.06, 0.03}, {0.8, 0.8, 0.7}), {}).smallest, "f16");
  EXPECT_EQ(recommend(measured({0, 0.06, 0.06}, {0.8, 0.8, 0.8}), {.kld = 0.1}).smallest, "2");
}

TEST(Recommendation, ExactStoresCountUnlessTheyLieElsewhere) {
  const Recommendation r = recommend(measured({0, 0.01, 0.03, 0.01}, {0.8, 0.8, 0.8, 0.8}), {});
  EXPECT_EQ(r.smallest, "2");
  EXPECT_EQ(r.smallest_beside_store, "1+64");
  ASSERT_EQ(r.words.size(), 2u);
  EXPECT_NE(r.words[1].find("take --kv 1+64: it takes 20.0 MiB"), std::string::npos) << r.words[1];
  EXPECT_NE(r.words[1].find("and 100.0 MiB of exact rows"), std::string::npos) << r.words[1];
}

TEST(Recommendation, NamesLlamaCppsOwnCachesByItsFlags) {
  Results results = measured({0, 0.01}, {0.8, 0.8});
  for (json& of : results.quality) {
    of["rows"][1]["kv"] = "q8_0";
    of["rows"][1]["method"] = "llama.cpp";
  }
  results.caches = {"f16", "q8_0"};
  EXPECT_EQ(recommend(results, {}).words.at(0).substr(0, 25), "Take -ctk q8_0 -ctv q8_0:");
}

TEST(Recommendation, SaysWhatSpeaksAgainstACache) {
  Results results;
  results.add(
      result("generate", {row("f16", 100, kld(0, 0)), row("2", 30, kld(0.02, 0.08)), row("4", 50, kld(0.01, 0.02))}),
      "eval.json");
  const Recommendation r = recommend(results, {});
  ASSERT_EQ(r.judged.size(), 2u);
  EXPECT_EQ(r.judged[0].against,
            std::vector<std::string>{"generate, 8192 tokens: KLD 0.0800 in the last quarter, above 0.05"});
  EXPECT_TRUE(r.judged[1].against.empty());
  EXPECT_EQ(r.judged[1].remarks.size(), 1u) << "it doubles, though what it comes to is little";
  EXPECT_EQ(r.smallest, "4");
}

TEST(Recommendation, NothingThatWasNotMeasured) {
  Results results = measured({0, 0.01}, {0.8, 0.8});
  results.add(result("tools", {row("f16", 100, score(0.9)), row("2", 30, score(0.9))}), "tools.json");
  EXPECT_EQ(recommend(results, {}).smallest, "f16") << "each has one task that was not measured";
  Results published;
  published.add(result("text", {row("f16", 100, kld(0, 0)), row("2", 30, kld(0, 0))}), "text.json");
  published.quality[0]["rows"][1]["method"] = "vecinfer";
  published.caches = {"f16", "2, vecinfer"};
  EXPECT_EQ(recommend(published, {}).smallest, "f16") << "emulated methods are none of ours";
  Results speed;
  speed.add({{"model", "m.gguf"}, {"rows", json::array()}}, "bench.json");
  EXPECT_NE(recommend(speed, {}).words.at(0).find("Only speed was measured"), std::string::npos);
}

TEST(Recommendation, SaysWhereATaskTellsLittle) {
  const Recommendation r = recommend(measured({0, 0.01}, {0.15, 0.15}), {});
  ASSERT_EQ(r.words.size(), 2u);
  EXPECT_EQ(r.words[1],
            "ruler, 8192 tokens: f16 itself scores 0.150 where chance is 0.100, so this task tells little of a cache.");
}

TEST(Results, AreOfOneModelAndOfOurPrograms) {
  Results results = measured({0, 0.01}, {0.8, 0.8});
  EXPECT_EQ(results.caches, (std::vector<std::string>{"f16", "4"}));
  json other = result("text", json::array());
  other["model"] = "n.gguf";
  EXPECT_THROW(results.add(other, "other.json"), std::runtime_error);
  for (const json& wrong :
       {json(1), json::array(), json{{"rows", 1}, {"model", "m.gguf"}}, json{{"model", "m.gguf"}}}) {
    EXPECT_THROW(results.add(wrong, "wrong.json"), std::runtime_error) << wrong;
  }
}

size_t occurrences(const std::string& text, const std::string& what) {
  size_t n = 0;
  for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) n++;
  return n;
}

TEST(Page, StandsAloneAndHasEveryCache) {
  Results results = measured({0, 0.01, 0.06}, {0.8, 0.8, 0.79});
  results.add(
      {{"model", "m.gguf"},
       {"threads", 2},
       {"rounds", 3},
       {"rows",
        {{{"depth", 0}, {"kv", "f16"}, {"decode_tok_s", 50.5}, {"decode_tok_s_range", {50, 51}}, {"prompt_tok_s", 99}},
         {{"depth", 4096},
          {"kv", "4"},
          {"decode_tok_s", 61.25},
          {"decode_over_f16", 2.5},
          {"decode_tok_s_range", {60, 62}},
          {"prompt_tok_s", 120}}}}},
      "bench.json");
  results.model = "<m>.gguf";
  const Recommendation r = recommend(results, {});
  EXPECT_NE(
      r.words[0].find("It decodes 61.2 tokens a second with 4096 tokens in the cache, 2.50 times as fast as f16."),
      std::string::npos)
      << r.words[0];
  const std::string page = write_page(results, r);
  for (const char* outside : {"http", "src=", "<script", "<link", "@import"}) {
    EXPECT_EQ(page.find(outside), std::string::npos) << outside;
  }
  EXPECT_EQ(page.find("<m>"), std::string::npos);
  EXPECT_NE(page.find("&lt;m&gt;.gguf"), std::string::npos);
  for (const char* part : {"Take --kv 4", "<td>2</td>", "100.0", "0.0600", "0.790", ">vt<", "61.2", "60.0 to 62.0"}) {
    EXPECT_NE(page.find(part), std::string::npos) << part;
  }
  EXPECT_EQ(occurrences(page, "<svg"), 3u) << "KLD by bytes and by position, speed";
  for (const char* element : {"svg", "table", "div", "ul", "h2", "text", "span"}) {
    EXPECT_EQ(occurrences(page, std::string("<") + element + ">") + occurrences(page, std::string("<") + element + " "),
              occurrences(page, std::string("</") + element + ">"))
        << element;
  }
}

TEST(Chart, LeavesOutWhatItCannotShow) {
  EXPECT_EQ(draw_chart({"x", false}, {"y", true}, {{"f16", {{1, 0}, {2, 0}}}}, true), "");
  const std::string svg =
      draw_chart({"x", false}, {"y", true}, {{"f16", {{1, 0}}}, {"2", {{1, 0.1}, {2, NAN}, {3, 0.2}}}}, true);
  EXPECT_EQ(occurrences(svg, "<circle"), 2u);
  EXPECT_EQ(occurrences(svg, "<polyline"), 1u);
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  EXPECT_EQ(svg.find("inf"), std::string::npos);
  // One point alone has an axis, too.
  EXPECT_EQ(draw_chart({"x", true}, {"y", true}, {{"2", {{3, 0.1}}}}, false).find("nan"), std::string::npos);
}

}  // namespace
}  // namespace thimble
