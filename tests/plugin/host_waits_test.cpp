// Which graphs of a mixture of experts can be recorded.
#include "plugin/host_waits.h"

#include <gtest/gtest.h>

#include <memory>

namespace thimble {
namespace {

const ggml_backend_feature kHopper[] = {{"ARCHS", "800,860,900"}, {"USE_GRAPHS", "1"}, {nullptr, nullptr}};
const ggml_backend_feature kOld[] = {{"ARCHS", "610,700,900"}, {nullptr, nullptr}};
const ggml_backend_feature kCublas[] = {{"FORCE_CUBLAS", "1"}, {"ARCHS", "900"}, {nullptr, nullptr}};
const ggml_backend_feature kSilent[] = {{"USE_GRAPHS", "1"}, {nullptr, nullptr}};

class HostWaits : public testing::Test {
protected:
  struct FreeContext {
    void operator()(ggml_context* context) const { ggml_free(context); }
  };
  std::unique_ptr<ggml_context, FreeContext> context_{
      ggml_init({ggml_tensor_overhead() * 256, nullptr, /*no_alloc=*/true})};

  // 64 experts, 8 of them for each token.
  ggml_tensor* multiply(ggml_type type, int n_tokens, int columns = 2048, int rows = 768) {
    ggml_context* c = context_.get();
    return ggml_mul_mat_id(c, ggml_new_tensor_3d(c, type, columns, rows, 64),
                           ggml_new_tensor_3d(c, GGML_TYPE_F32, columns, 1, n_tokens),
                           ggml_new_tensor_2d(c, GGML_TYPE_I32, 8, n_tokens));
  }
};

TEST_F(HostWaits, TheArchitectureIsTheNewestThatTheDeviceCanRun) {
  EXPECT_EQ(inner_build(kHopper, 900, "0.26.0").architecture, 900);
  EXPECT_EQ(inner_build(kHopper, 890, "0.26.0").architecture, 860);
  EXPECT_EQ(inner_build(kOld, 890, "0.20.0").architecture, 700);
  EXPECT_TRUE(inner_build(kCublas, 900, "0.26.0").only_cublas);
  for (const char* version : {"0.19.4", "0.27.0", "1.0.0", ""}) {
    EXPECT_EQ(inner_build(kHopper, 900, version).architecture, 0) << version;
  }
  EXPECT_EQ(inner_build(kSilent, 900, "0.26.0").architecture, 0);
  EXPECT_EQ(inner_build(nullptr, 900, "0.26.0").architecture, 0);
}

TEST_F(HostWaits, NotForFewTokens) {
  const InnerBuild build = inner_build(kHopper, 900, "0.26.0");
  for (ggml_type type : {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F32, GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_TYPE_Q8_0,
                         GGML_TYPE_IQ1_M, GGML_TYPE_IQ3_S, GGML_TYPE_MXFP4}) {
    for (int n_tokens : {1, 4, 8}) {
      EXPECT_FALSE(host_waits(multiply(type, n_tokens), build)) << ggml_type_name(type) << ", " << n_tokens;
    }
  }
}

TEST_F(HostWaits, WhereNoKernelTakesTheExperts) {
  const InnerBuild build = inner_build(kHopper, 900, "0.26.0");
  EXPECT_TRUE(host_waits(multiply(GGML_TYPE_F16, 512), build));
  EXPECT_TRUE(host_waits(multiply(GGML_TYPE_F16, 1, 2048, 770), build));  // rows that are no multiple of 32
  EXPECT_TRUE(host_waits(multiply(GGML_TYPE_F16, 1, 2080, 768), build));  // columns that are no multiple of 64
  EXPECT_FALSE(host_waits(multiply(GGML_TYPE_F32, 1, 2080, 768), build));
  EXPECT_FALSE(host_waits(multiply(GGML_TYPE_Q8_0, 1, 2048, 770), build));
  EXPECT_FALSE(host_waits(multiply(GGML_TYPE_Q3_K, 5), inner_build(kCublas, 900, "0.26.0")));
  EXPECT_TRUE(host_waits(multiply(GGML_TYPE_Q3_K, 6), inner_build(kCublas, 900, "0.26.0")));
}

TEST_F(HostWaits, WhereTheBuildIsUnknownOrOld) {
  for (const InnerBuild& build :
       {InnerBuild(), inner_build(kOld, 890, "0.26.0"), inner_build(kHopper, 900, "0.30.0")}) {
    EXPECT_TRUE(host_waits(multiply(GGML_TYPE_F16, 1), build));
    EXPECT_TRUE(host_waits(multiply(GGML_TYPE_Q4_K, 1), build));
  }
  ggml_context* c = context_.get();
  ggml_tensor* x = ggml_new_tensor_2d(c, GGML_TYPE_F32, 64, 64);
  EXPECT_FALSE(host_waits(ggml_mul_mat(c, x, x), InnerBuild()));  // nothing else waits
}

}  // namespace
}  // namespace thimble
