// What a layer's plan says of codes without a profile: which weights of norms keys are stretched by, for saved states
// and for the user.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/layer_plan.h"
#include "plugin/report.h"

namespace thimble {
namespace {

LayerGeometry geometry(std::vector<float> query_norm, std::vector<float> key_norm, bool unread = false) {
  LayerGeometry layer;
  layer.n_kv_heads = 2;
  layer.group = 2;
  layer.cells_per_stream = 8192;
  for (Kind kind : {Kind::key, Kind::value}) {
    layer.head_dim[int(kind)] = 64;
    layer.width[int(kind)] = 128;
  }
  layer.query_norm = std::move(query_norm);
  layer.key_norm = std::move(key_norm);
  layer.norms_unread = unread;
  return layer;
}

class Plan : public testing::Test {
protected:
  std::unique_ptr<Engine> engine = make_engine({"CPU", ""});
  std::vector<float> ones = std::vector<float>(64, 1.0f), great = ones;

  Plan() { great[5] = 40; }
  LayerPlan of(const LayerGeometry& layer, const char* settings = "bits=2") const {
    return CachePlanner(*engine, Settings::parse(settings)).plan(layer);
  }
  std::string report_of(const LayerPlan& plan, const char* settings = "bits=2") const {
    PlanTotals totals;
    totals.add(plan);
    return report(totals, Settings::parse(settings), *engine, /*is_far=*/false);
  }
};

TEST_F(Plan, AStatesHashSaysWhatKeysWereStretchedBy) {
  const LayerPlan stretched = of(geometry(ones, great));
  ASSERT_EQ(stretched.key_stretches.size(), 2u);
  EXPECT_EQ(of(geometry(ones, great)).hashes, stretched.hashes);
  EXPECT_NE(of(geometry(great, ones)).hashes, stretched.hashes);
  EXPECT_NE(of(geometry({}, {})).hashes, stretched.hashes);
  EXPECT_NE(of(geometry(ones, {}, /*unread=*/true)).hashes, stretched.hashes);
  EXPECT_EQ(of(geometry(ones, {}, /*unread=*/true)).hashes, of(geometry({}, {})).hashes);  // coded alike
  EXPECT_NE(of(geometry({}, {}), "bits=4").hashes, of(geometry({}, {})).hashes);
}

TEST_F(Plan, NormsThatCannotBeReadAreReported) {
  const LayerPlan unread = of(geometry(ones, {}, /*unread=*/true));
  EXPECT_TRUE(unread.key_stretches.empty());
  EXPECT_NE(report_of(unread).find("cannot be read in 1 layers"), std::string::npos) << report_of(unread);
  EXPECT_EQ(report_of(of(geometry(ones, great))).find("cannot be read"), std::string::npos);
  EXPECT_EQ(report_of(of(geometry({}, {}))).find("cannot be read"), std::string::npos);
  // Keys that are not coded need no weights.
  EXPECT_FALSE(of(geometry(ones, {}, /*unread=*/true), "bits=16/2").norms_unread);
}

}  // namespace
}  // namespace thimble
