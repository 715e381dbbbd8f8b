// The stub and the builds beside it, in the ggml that the tests are linked with.
#include <ggml-backend.h>
#include <ggml.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "loader/versions.h"
#include "plugin/ggml_api.h"
#include "plugin/self_check.h"
#include "support/temporary_folder.h"

namespace thimble {
namespace {

namespace fs = std::filesystem;

TEST(Versions, AreParsedAndCompared) {
  EXPECT_EQ(parse_version("0.25.3"), (GgmlVersion{0, 25, 3}));
  EXPECT_EQ(parse_version("1.2.30-dev"), (GgmlVersion{1, 2, 30}));
  EXPECT_FALSE(parse_version("0.25"));
  EXPECT_FALSE(parse_version(""));
  EXPECT_FALSE(parse_version(nullptr));
  EXPECT_LT((GgmlVersion{0, 9, 11}), (GgmlVersion{0, 15, 0}));
  EXPECT_LT((GgmlVersion{0, 99, 99}), (GgmlVersion{1, 0, 0}));
}

TEST(SelfCheck, PassesInTheGgmlOfItsHeaders) {
  EXPECT_EQ(self_check(), "");
  EXPECT_STREQ(ggml_op_name(custom_op()), "CUSTOM");
  EXPECT_EQ(custom_op(), GGML_OP_CUSTOM);
}

// The loader's lines on stderr, and whether it loads.
struct Load {
  explicit Load(const fs::path& path) {
    testing::internal::CaptureStderr();
    loaded = ggml_backend_load(path.c_str()) != nullptr;
    said = testing::internal::GetCapturedStderr();
  }
  bool loaded;
  std::string said;
};

const fs::path kStub = THIMBLE_PLUGIN_PATH;
const std::string kBuild = "libggml-thimble-api" + std::to_string(GGML_BACKEND_API_VERSION) + ".so";

TEST(Loader, NamesTheFileThatIsMissing) {
  const test::TemporaryFolder folder;
  fs::copy(kStub, folder.path());
  const Load load(fs::path(folder.path()) / kStub.filename());
  EXPECT_FALSE(load.loaded);
  EXPECT_NE(load.said.find("takes " + kBuild + ", which is missing beside libggml-thimble.so"), std::string::npos)
      << load.said;
}

TEST(Loader, RefusesWhatIsNoBuild) {
  const test::TemporaryFolder folder;
  fs::copy(kStub, folder.path());
  fs::copy(kStub, fs::path(folder.path()) / kBuild);
  const Load load(fs::path(folder.path()) / kStub.filename());
  EXPECT_FALSE(load.loaded);
  EXPECT_NE(load.said.find("install Thimble again"), std::string::npos) << load.said;
}

TEST(Loader, RefusesWithoutTheOtherBackendThatWasAskedFor) {
  setenv("THIMBLE_BACKEND_PATH", "/nowhere/libggml-other.so", 1);
  const Load load(kStub);
  unsetenv("THIMBLE_BACKEND_PATH");
  EXPECT_FALSE(load.loaded);
  EXPECT_NE(load.said.find("THIMBLE_BACKEND_PATH=/nowhere/libggml-other.so does not load"), std::string::npos)
      << load.said;
}

TEST(Loader, OpensTheBuildOfItsHostsApi) {
  const Load load(kStub);
  EXPECT_TRUE(load.loaded) << load.said;
  EXPECT_NE(ggml_backend_dev_by_name("THIMBLE0"), nullptr);
  EXPECT_EQ(load.said.find("thimble: this program"), std::string::npos) << load.said;
}

// A GPU of a backend that no build of the plugin has an engine for.
ggml_backend_reg_t registry_with_a_gpu() {
  static ggml_backend_device gpu{};
  static ggml_backend_reg registry{};
  registry.api_version = GGML_BACKEND_API_VERSION;
  registry.iface.get_name = [](ggml_backend_reg_t) { return "OTHER"; };
  registry.iface.get_device_count = [](ggml_backend_reg_t) -> size_t { return 1; };
  registry.iface.get_device = [](ggml_backend_reg_t, size_t) { return &gpu; };
  gpu.reg = &registry;
  gpu.iface.get_name = [](ggml_backend_dev_t) { return "OTHER0"; };
  gpu.iface.get_description = [](ggml_backend_dev_t) { return "a GPU of the test"; };
  gpu.iface.get_type = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
  gpu.iface.get_props = [](ggml_backend_dev_t, ggml_backend_dev_props*) {};
  return &registry;
}

TEST(Loader, SaysWhichGpusItLeavesOut) {
  if (ggml_backend_dev_by_name("THIMBLE0")) GTEST_SKIP() << "a process loads the plugin once: run this test alone";
  ggml_backend_reg_count();  // the CPU is registered first
  ggml_backend_register(registry_with_a_gpu());
  const Load load(kStub);
  EXPECT_TRUE(load.loaded) << load.said;
  EXPECT_NE(load.said.find(
                "THIMBLE0 runs models on the CPU and leaves out OTHER0: this build of the plugin has engines for CPU"),
            std::string::npos)
      << load.said;
}

TEST(Loader, SaysNothingOfGpusWhereTheCpuWasAskedFor) {
  ggml_backend_reg_count();
  ggml_backend_register(registry_with_a_gpu());
  setenv("THIMBLE_KV", "device=CPU", 1);
  const Load load(kStub);
  unsetenv("THIMBLE_KV");
  EXPECT_TRUE(load.loaded) << load.said;
  EXPECT_EQ(load.said.find("leaves out"), std::string::npos) << load.said;
}

}  // namespace
}  // namespace thimble
