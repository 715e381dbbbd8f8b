// A plugin built for another version of ggml refuses to load, with one sentence.
#include <ggml-backend.h>
#include <ggml.h>
#include <gtest/gtest.h>

#include <string>

TEST(Misfit, IsRefused) {
  std::string log;
  ggml_log_set([](ggml_log_level, const char* text, void* to) { *static_cast<std::string*>(to) += text; }, &log);
  EXPECT_EQ(ggml_backend_load(MISFIT_PATH), nullptr);
  EXPECT_EQ(ggml_backend_reg_by_name("THIMBLE"), nullptr);
  EXPECT_NE(log.find("built for ggml 0.0.1 but loaded into ggml " + std::string(ggml_version())), std::string::npos);
  ggml_log_set(nullptr, nullptr);
}
