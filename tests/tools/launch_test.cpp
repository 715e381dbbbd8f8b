// The THIMBLE_KV that `thimble run` and `thimble serve` make.
#include <gtest/gtest.h>

#include <functional>
#include <stdexcept>

#include "launch_settings.h"

namespace thimble {
namespace {

LaunchFlags flags(const std::string& kv, std::vector<std::string> set = {}) {
  LaunchFlags f;
  f.kv = kv;
  f.set = std::move(set);
  return f;
}

std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

TEST(LaunchSettings, FlagsBecomeKeys) {
  EXPECT_EQ(merge_settings(flags("2"), "").text, "bits=2");
  LaunchFlags all = flags("2/1+64", {"small=0,pool=3", "tail=drop"});
  all.window = "32";
  all.store = "/tmp";
  all.profile = "p.gguf";
  all.policy = "auto";
  EXPECT_EQ(merge_settings(all, "").text,
            "bits=2/1,top=64,window=32,store=file,path=/tmp,profile=p.gguf,policy=auto,small=0,pool=3,tail=drop");
  EXPECT_TRUE(merge_settings(all, "").has("profile"));
  EXPECT_FALSE(merge_settings(flags("2"), "").has("profile"));
  EXPECT_EQ(merge_settings(LaunchFlags{}, "").text, "");
}

TEST(LaunchSettings, TheEnvironmentStaysUnlessSaid) {
  const LaunchSettings merged = merge_settings(flags("2"), "bits=4,pool=7");
  EXPECT_EQ(merged.text, "bits=2,pool=7");
  ASSERT_EQ(merged.notes.size(), 1u);
  EXPECT_EQ(merged.notes[0], "--kv 2 takes the place of bits=4 in THIMBLE_KV");
  EXPECT_TRUE(merge_settings(flags("4"), "bits=4").notes.empty());
  EXPECT_EQ(merge_settings(LaunchFlags{}, "bits=1").text, "bits=1");
}

TEST(LaunchSettings, ErrorsNameWhatWasTyped) {
  EXPECT_EQ(error_of([] { merge_settings(flags("5"), ""); }).find("--kv 5: bits=5"), 0u);
  EXPECT_EQ(error_of([] { merge_settings(flags("2", {"windo=3"}), ""); }).find("--set windo=3: unknown key"), 0u);
  EXPECT_EQ(error_of([] { merge_settings(flags("2", {"pool"}), ""); }), "--set pool is not key=value");
  EXPECT_EQ(error_of([] { merge_settings(flags("2", {"bits=4"}), ""); }), "--set bits=4: --kv 2 says bits already");
  EXPECT_EQ(error_of([] { merge_settings(flags("2"), "bits=7"); }).find("THIMBLE_KV: bits=7"), 0u);
  LaunchFlags store = flags("2");
  store.store = "/tmp";
  EXPECT_EQ(error_of([&] { merge_settings(store, ""); }).find("--kv 2 --store /tmp: store="), 0u);
}

}  // namespace
}  // namespace thimble
