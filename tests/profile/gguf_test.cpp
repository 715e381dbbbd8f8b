// GGUF files: the reader returns what the writer wrote, and refuses values that are missing or of another type.
#include "profile/gguf.h"

#include <gtest/gtest.h>

#include <stdexcept>

namespace thimble::gguf {
namespace {

std::vector<uint8_t> small_file() {
  Writer out;
  out.text("name", "a file");
  out.value("count", uint32_t{7});
  out.value("offset", int32_t{-7});
  out.array("list", std::vector<float>{1, 2.5f});
  out.array("empty", std::vector<int32_t>{});
  out.tensor("flat", std::vector<int8_t>{1, -2, 3}, 1);
  out.tensor("halves", std::vector<uint16_t>{0x3c00, 0xc000}, 1);
  out.tensor("rows", std::vector<float>{1, 2, 3, 4, 5, 6}, 2);
  return out.file();
}

template <typename F>
std::string refusal(F f) {
  try {
    f();
  } catch (const std::runtime_error& e) {
    return e.what();
  }
  return "";
}

std::string refusal_of(const std::vector<uint8_t>& file) {
  return refusal([&] { const Reader reader(file.data(), file.size()); });
}

template <typename T>
void put(std::vector<uint8_t>& file, size_t at, T value) {
  std::memcpy(file.data() + at, &value, sizeof value);
}

TEST(Gguf, IsReadAsWritten) {
  const auto file = small_file();
  const Reader in(file.data(), file.size());
  EXPECT_EQ(in.text("name"), "a file");
  EXPECT_EQ(in.value<uint32_t>("count"), 7u);
  EXPECT_EQ(in.value<int32_t>("offset"), -7);
  EXPECT_EQ(in.array<float>("list", 2), (std::vector<float>{1, 2.5f}));
  EXPECT_TRUE(in.array<int32_t>("empty", 0).empty());
  EXPECT_EQ(in.tensor<int8_t>("flat", 3), (std::vector<int8_t>{1, -2, 3}));
  EXPECT_EQ(in.tensor<uint16_t>("halves", 2), (std::vector<uint16_t>{0x3c00, 0xc000}));
  EXPECT_EQ(in.tensor<float>("rows", 6), (std::vector<float>{1, 2, 3, 4, 5, 6}));
}

TEST(Gguf, RefusesWhatIsNotThereOrDoesNotFit) {
  const auto file = small_file();
  const Reader in(file.data(), file.size());
  EXPECT_EQ(refusal([&] { in.text("nothing"); }), "nothing is missing");
  EXPECT_EQ(refusal([&] { in.text("count"); }), "count has the wrong type");
  EXPECT_EQ(refusal([&] { in.value<float>("count"); }), "count has the wrong type");
  EXPECT_EQ(refusal([&] { in.array<float>("name", 9); }), "name has the wrong type");
  EXPECT_EQ(refusal([&] { in.array<int32_t>("list", 9); }), "list has the wrong type");
  EXPECT_EQ(refusal([&] { in.array<float>("list", 1); }), "list is too long");
  EXPECT_EQ(refusal([&] { in.tensor<float>("nothing", 3); }), "nothing is missing");
  EXPECT_EQ(refusal([&] { in.tensor<float>("flat", 3); }), "flat has the wrong type");
  EXPECT_EQ(refusal([&] { in.tensor<int8_t>("flat", 4); }), "flat has the wrong size");
}

TEST(Gguf, RefusesEveryTruncation) {
  const auto file = small_file();
  for (size_t size = 0; size < file.size() - 8; size++) {
    // Exactly as long as it says, so that a read beyond the end is seen.
    const std::vector<uint8_t> cut(file.begin(), file.begin() + ptrdiff_t(size));
    EXPECT_NE(refusal([&] { Reader(cut.data(), cut.size()).tensor<float>("rows", 6); }), "") << size;
  }
}

TEST(Gguf, RefusesLengthsBeyondTheFile) {
  // "GGUF", version, tensors, keys, length of the first key
  auto file = small_file();
  put(file, 4, uint32_t{1});
  EXPECT_EQ(refusal_of(file), "its GGUF version is neither 2 nor 3");
  for (size_t at : {8, 16}) {
    file = small_file();
    put(file, at, int64_t{-1});
    EXPECT_EQ(refusal_of(file), "it has an absurd number of keys or tensors");
    put(file, at, INT64_MAX);
    EXPECT_NE(refusal_of(file), "");
  }
  for (uint64_t length : {uint64_t{1} << 20, UINT64_MAX, UINT64_MAX - 30}) {
    file = small_file();
    put(file, 24, length);
    EXPECT_EQ(refusal_of(file), "it is cut short");
  }
  EXPECT_EQ(refusal_of({}), "it is no GGUF file");
}

// A file of one tensor: name "t", 2 dimensions, type, offset; its description begins at byte 24.
std::vector<uint8_t> one_tensor() {
  Writer out;
  out.tensor("t", std::vector<float>{1, 2, 3, 4}, 2);
  return out.file();
}

TEST(Gguf, RefusesTensorsThatLieOrLeadOutside) {
  constexpr size_t kDimensions = 24 + 9, kFirst = kDimensions + 4, kOffset = kFirst + 2 * 8 + 4;
  const auto ask = [](const std::vector<uint8_t>& file) {
    return refusal([&] { Reader(file.data(), file.size()).tensor<float>("t", 4); });
  };
  EXPECT_EQ(ask(one_tensor()), "");
  auto file = one_tensor();
  put(file, kDimensions, uint32_t{9});
  EXPECT_EQ(ask(file), "a tensor has too many dimensions");
  file = one_tensor();
  put(file, kFirst, int64_t{-2});
  EXPECT_EQ(ask(file), "a tensor has an absurd size");
  file = one_tensor();
  put(file, kFirst, INT64_MAX);  // times 2
  put(file, kFirst + 8, int64_t{4});
  EXPECT_EQ(ask(file), "a tensor has an absurd size");
  for (uint64_t offset : {uint64_t{24}, uint64_t{1} << 40, UINT64_MAX}) {
    file = one_tensor();
    put(file, kOffset, offset);
    EXPECT_EQ(ask(file), "it is cut short") << offset;
  }
}

TEST(Gguf, RefusesKeysTwiceAndOddAlignments) {
  Writer twice;
  twice.value("a", uint32_t{1});
  twice.value("a", uint32_t{2});
  EXPECT_EQ(refusal_of(twice.file()), "a is there twice");
  for (uint32_t alignment : {0u, 24u}) {
    Writer odd;
    odd.value("general.alignment", alignment);
    EXPECT_EQ(refusal_of(odd.file()), "its alignment is no power of two");
  }
}

TEST(Gguf, KeysOfEveryTypeArePassedBy) {
  // Those that profiles do not use, by hand: a string array and a double.
  std::vector<uint8_t> file;
  const auto bytes = [&](const void* data, size_t size) {
    const auto* p = static_cast<const uint8_t*>(data);
    file.insert(file.end(), p, p + size);
  };
  const auto u32 = [&](uint32_t v) { bytes(&v, 4); };
  const auto u64 = [&](uint64_t v) { bytes(&v, 8); };
  const auto text = [&](const std::string& s) {
    u64(s.size());
    bytes(s.data(), s.size());
  };
  bytes("GGUF", 4);
  u32(2);
  u64(0);
  u64(3);
  text("words");
  u32(uint32_t(Type::array));
  u32(uint32_t(Type::string));
  u64(2);
  text("one");
  text("two");
  text("pi");
  u32(uint32_t(Type::f64));
  u64(0x400921fb54442d18);
  text("last");
  u32(uint32_t(Type::u32));
  u32(5);
  EXPECT_EQ(Reader(file.data(), file.size()).value<uint32_t>("last"), 5u);
  put(file, 24 + 8 + 5 + 4, uint32_t{99});  // the elements' type
  EXPECT_EQ(refusal_of(file), "a key has an unknown type");
}

}  // namespace
}  // namespace thimble::gguf
