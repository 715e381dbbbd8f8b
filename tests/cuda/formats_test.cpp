// Which formats run on which cards, by their shared memory, and by which kernels.
#define THIMBLE_SIMT_HOST
#include "cuda/attend/formats.h"

#include <gtest/gtest.h>

#include <string>

#include "cuda/rows/rows_kernel.h"

namespace thimble::cuda {
namespace {

constexpr Card kTuring{75, 64 << 10}, kA100{80, 163 << 10}, kAmpere{86, 99 << 10}, kAda{89, 99 << 10},
    kHopper{90, 227 << 10}, kB200{100, 227 << 10}, kBlackwell{120, 99 << 10};

AttendBy by(const Card& card, int head_dim, double key_bits, double value_bits, bool scores = false) {
  return attend_by(card, make_format(head_dim, key_bits), make_format(head_dim, value_bits), scores);
}

TEST(CudaFormats, EveryRateOfEveryHeadSizeRunsOnEveryCard) {
  const double rates[] = {4, 3, 2, 1.5, 1.25, 1};
  for (const Card& card : {kTuring, kA100, kAmpere, kAda, kHopper, kB200, kBlackwell}) {
    for (int head_dim : {64, 128, 256}) {
      for (double keys : rates) {
        for (double values : rates) {
          EXPECT_NE(by(card, head_dim, keys, values, true), AttendBy::nothing)
              << card.capability << ": " << head_dim << " at " << keys << "/" << values;
        }
      }
    }
  }
}

// By which kernels, for a letter each of 4/4, 2/2, 1/1, 4/2, 2/1, 3/3, 1.5/1.5, 1.25/1.25 and 4/1 bits: tables (T) or
// tiles (.).
std::string kernels(const Card& card, int head_dim) {
  std::string all;
  for (const auto& [keys, values] :
       {std::pair{4.0, 4.0}, {2, 2}, {1, 1}, {4, 2}, {2, 1}, {3, 3}, {1.5, 1.5}, {1.25, 1.25}, {4, 1}}) {
    all += by(card, head_dim, keys, values) == AttendBy::tables ? 'T' : '.';
  }
  return all;
}

TEST(CudaFormats, OfEachCard) {
  for (const Card& card : {kA100, kAmpere, kAda, kHopper, kB200, kBlackwell}) {
    EXPECT_EQ(kernels(card, 64), "TTTTT....") << card.capability;
    EXPECT_EQ(kernels(card, 128), "TTTTT....") << card.capability;
  }
  EXPECT_EQ(kernels(kHopper, 256), "TTTTT....");
  EXPECT_EQ(kernels(kB200, 256), "TTTTT....");
  EXPECT_EQ(kernels(kA100, 256), ".TT.T....");
  for (const Card& card : {kAmpere, kAda, kBlackwell}) EXPECT_EQ(kernels(card, 256), ".........");
  for (int head_dim : {64, 128, 256}) EXPECT_EQ(kernels(kTuring, head_dim), ".........");
}

// The shapes that people run. By kernels over codes, or else from decoded rows, for which any card has room.
TEST(CudaFormats, ShapesThatPeopleRun) {
  struct Shape {
    const char* models;
    int keys, values;
    bool from_codes;
  };
  const Shape shapes[] = {{"gpt-oss, SmolLM2", 64, 64, true},
                          {"Llama 3, Qwen3, Mistral", 128, 128, true},
                          {"Gemma 3, Gemma 4's windows, Qwen3.5", 256, 256, true},
                          {"Gemma 4's global layers", 512, 512, false},
                          {"Phi-3", 96, 96, false},
                          {"StableLM", 80, 80, false},
                          {"MLA: what RoPE rotates, and what is the value", 64, 512, false}};
  for (const Card& card : {kTuring, kA100, kAmpere, kAda, kHopper, kB200, kBlackwell}) {
    for (const Shape& shape : shapes) {
      for (double bits : {4.0, 3.0, 2.0, 1.5, 1.25, 1.0}) {
        const Format keys = make_format(shape.keys, bits), values = make_format(shape.values, bits);
        SCOPED_TRACE(testing::Message() << card.capability << ": " << shape.models << " at " << bits);
        EXPECT_EQ(attend_by(card, keys, values, false) != AttendBy::nothing, shape.from_codes);
        for (int dim : {shape.keys, shape.values}) {
          EXPECT_LE(dim, kMaxRowDim);
          EXPECT_LE(RowsOfAnySize::shared_bytes(dim), size_t(48) << 10);  // without asking for more
        }
      }
    }
  }
}

TEST(CudaFormats, OtherShapesDoNot) {
  EXPECT_EQ(attend_by(kHopper, make_format(64, 2), make_format(128, 2), false), AttendBy::nothing);
  EXPECT_EQ(by(kHopper, 96, 2, 2), AttendBy::nothing);
  EXPECT_EQ(by(kHopper, 128, 16, 4), AttendBy::nothing);
  EXPECT_EQ(by({75, 48 << 10}, 256, 2, 2), AttendBy::nothing);
}

TEST(CudaFormats, CodewordsAreInSharedMemoryWhereTheyFit) {
  EXPECT_LE(tile_shared_bytes(64, true), kTuring.shared_bytes);
  EXPECT_LE(tile_shared_bytes(128, true), kTuring.shared_bytes);
  EXPECT_GT(tile_shared_bytes(256, true), kTuring.shared_bytes);
  EXPECT_LE(tile_shared_bytes(256, false), kTuring.shared_bytes);
  EXPECT_LE(tile_shared_bytes(256, true), kAmpere.shared_bytes);
}

}  // namespace
}  // namespace thimble::cuda
