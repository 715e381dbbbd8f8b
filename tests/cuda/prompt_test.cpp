// A prompt's tokens in a layer, by the launchers under emulation.
#define THIMBLE_SIMT_HOST
#include <gtest/gtest.h>

#include "prompt_check.h"
#include "state_layer.h"

namespace thimble::cuda {
namespace {

struct EmulatedDevice {
  template <typename T>
  using Vector = std::vector<T>;
  using Tables = HostTables;
  static HostTables tables_of(HostTables tables) { return tables; }
  static void done(const Status& status) { ASSERT_TRUE(status.ok()) << status.message; }
};

class CudaPrompt : public testing::TestWithParam<PromptCase> {};

// With the coding kernel's form for few tokens and with that for many.
TEST_P(CudaPrompt, TokensAreAttendedToAndThenCoded) {
  EXPECT_EQ(PromptCheck<EmulatedDevice>(kEmulatedDevice, GetParam(), 21).run(), "");
  DeviceInfo large = kEmulatedDevice;
  large.shared_bytes = 227 << 10;
  EXPECT_EQ(PromptCheck<EmulatedDevice>(large, GetParam(), 133).run(), "");
}

INSTANTIATE_TEST_SUITE_P(, CudaPrompt, testing::ValuesIn(kPromptCases));

TEST(CudaPromptArguments, AreChecked) {
  PromptArgs args;
  args.batch.n_tokens = 1;
  EXPECT_EQ(prepare_prompt(kEmulatedDevice, args, nullptr).code, Status::Code::invalid_argument);
  EXPECT_EQ(place_staged(kEmulatedDevice, {}, nullptr).code, Status::Code::invalid_argument);
}

}  // namespace
}  // namespace thimble::cuda
