// A plugin built for another version of ggml refuses to load, with one sentence.
#include <ggml-backend.h>
#include <ggml.h>
#include <gtest/gtest.h>

#include <string>

TEST(Misfit, IsRefused) {
  testing::internal::CaptureStderr();
  EXPECT_EQ(ggml_backend_load(MISFIT_PATH), nullptr);
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_EQ(ggml_backend_reg_by_name("THIMBLE"), nullptr);
  EXPECT_NE(said.find("built for ggml 0.0.1 but loaded into ggml " + std::string(ggml_version())), std::string::npos);
}
