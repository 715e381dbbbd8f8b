// Which cells stay exact: the window's kernels, emulated, against the CPU's layer, which gets the same keys, queries
// and masks. device_check.cu runs the same scripts on a device.
#define THIMBLE_SIMT_HOST
#include <gtest/gtest.h>

#include "judge_pair.h"

namespace thimble::cuda {
namespace {

void expect_equal(const ScriptResult& result, int n_unlike_oldest) {
  EXPECT_EQ(result.failed, -1);
  EXPECT_GT(result.n_unlike_oldest, n_unlike_oldest);  // the judge decides otherwise than age would
}

TEST(CudaJudge, TokenByToken) {
  for (const WindowSize size : {WindowSize{16, 5, 8}, WindowSize{8, 3, 1}, WindowSize{16, 5, 0}}) {
    expect_equal(token_by_token<Emulation>(size), 50);
  }
}

TEST(CudaJudge, Prompts) {
  for (const WindowSize size : {WindowSize{16, 5, 8}, WindowSize{16, 5, 12}}) expect_equal(prompts<Emulation>(size), 5);
}

TEST(CudaJudge, DraftsThatAreTakenBack) {
  expect_equal(drafts<Emulation>(), 30);
}

TEST(CudaJudge, ChatsOfAStream) {
  expect_equal(chats<Emulation>(), 50);
}

TEST(CudaJudge, Streams) {
  expect_equal(streams<Emulation>(), 20);
}

// By means of queries and kept rows, as when all layers of a prompt end together.
TEST(CudaJudge, BehindTheGraph) {
  for (const WindowSize size : {WindowSize{16, 5, 8}, WindowSize{16, 5, 12}}) {
    expect_equal(prompts<Emulation>(size, true), 5);
  }
  expect_equal(chats<Emulation>(true), 50);
  expect_equal(streams<Emulation>(true), 20);
}

TEST(CudaJudge, FinishedBeforeTheNextBatch) {
  expect_equal(finished<Emulation>(), 30);
}

}  // namespace
}  // namespace thimble::cuda
