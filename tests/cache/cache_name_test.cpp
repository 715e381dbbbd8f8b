// The names of cache tensors.
#include "cache/cache_name.h"

#include <gtest/gtest.h>

namespace thimble {
namespace {

TEST(CacheName, LayerAndKind) {
  const auto keys = parse_cache_name("cache_k_l0"), values = parse_cache_name("cache_v_l127");
  ASSERT_TRUE(keys && values);
  EXPECT_EQ(keys->layer, 0);
  EXPECT_EQ(keys->kind, Kind::key);
  EXPECT_EQ(values->layer, 127);
  EXPECT_EQ(values->kind, Kind::value);
}

TEST(CacheName, NothingElse) {
  for (const char* name :
       {"", "cache_k_l", "cache_r_l1", "cache_k_l1 (view)", "cache_k_l1x", "cache_k_l-1", "cache_k_l+1", "cache_k_l 1",
        " cache_k_l1", "cache_k_l99999999999", "cache_kk_l1", "k_l1", "l_out-1"}) {
    EXPECT_FALSE(parse_cache_name(name)) << "'" << name << "'";
  }
}

}  // namespace
}  // namespace thimble
