// The calls on a CUDA context against the same calls on the CPU: encode and decode bit for bit, attention to the error
// that the kernels' arithmetic may add (tests/cuda/fixture.h). Built twice: with the kernels' own source emulated, and,
// where THIMBLE_ON_DEVICE is defined, for a device.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "attend_fixture.h"
#include "device_memory.h"
#include "profile/profile.h"

namespace thimble::test {
namespace {

const char* const kProfile = THIMBLE_SOURCE "/profiles/SmolLM2-135M-Instruct.Q4_1.thimble.gguf";

/// Emulated: with Hopper's tables (0), and with those of devices with less shared memory (1).
#ifdef THIMBLE_ON_DEVICE
constexpr int kDevices = 1;
#else
constexpr int kDevices = 2;
#endif

Handle<thimble_context> cuda_context(int index = 0) {
  auto args = args_of<thimble_context_args>();
  args.device = THIMBLE_DEVICE_CUDA;
  args.device_index = index;
  thimble_context* context = nullptr;
  EXPECT_TRUE(ok(thimble_context_create(&args, &context)));
  return Handle<thimble_context>(context);
}

class ApiCuda : public testing::Test {
protected:
  void SetUp() override {
    auto args = args_of<thimble_context_args>();
    args.device = THIMBLE_DEVICE_CUDA;
    thimble_context* context = nullptr;
    const thimble_status status = thimble_context_create(&args, &context);
    if (status == THIMBLE_UNSUPPORTED) GTEST_SKIP() << thimble_last_error();
    ASSERT_TRUE(ok(status));
    cuda.reset(context);
  }

  Handle<thimble_context> cuda;
  const Handle<thimble_context> cpu = context_of(1);
};

testing::AssertionResult unsupported(thimble_status status, const std::string& part) {
  return fails(status, THIMBLE_UNSUPPORTED, part);
}

/// A side's memory with each block in another device's order.
std::vector<uint8_t> converted(const Side& side, std::vector<uint8_t> memory, int32_t from, int32_t to) {
  const size_t bytes = thimble_codec_block_bytes(side.codec.get());
  std::vector<uint8_t> block(bytes);
  for (int64_t b = 0; b < side.blocks.n_blocks; b++) {
    for (int h = 0; h < side.n_heads; h++) {
      uint8_t* at = memory.data() + size_t(b) * side.blocks.block_stride + h * side.blocks.head_stride;
      EXPECT_TRUE(ok(thimble_convert_blocks(side.codec.get(), from, at, to, block.data(), 1)));
      std::copy(block.begin(), block.end(), at);
    }
  }
  return memory;
}

/// The blocks of a side that was encoded on the CPU, on the device.
struct DeviceBlocks {
  DeviceArray<uint8_t> memory;
  thimble_blocks blocks;

  explicit DeviceBlocks(const Side& side)
      : memory(converted(side, side.memory, THIMBLE_DEVICE_CPU, THIMBLE_DEVICE_CUDA)), blocks(side.blocks) {
    blocks.data = memory.data();
  }
};

/// Runs what `args` says, with host pointers, on the device.
std::vector<float> attend(thimble_context* context, const Cache& cache, const Queries& x, thimble_attend_args args) {
  const DeviceBlocks keys(*cache.keys), values(*cache.values);
  const DeviceArray<float> q(x.q), out(std::vector<float>(x.out.size(), NAN));
  args.key_blocks = keys.blocks;
  args.value_blocks = values.blocks;
  args.q = q.data();
  args.out = out.data();
  std::optional<DeviceArray<uint16_t>> mask, exact_keys, exact_values;
  std::optional<DeviceArray<float>> sinks;
  if (args.mask) {
    const size_t n = size_t(x.first_tokens.back()) * args.mask_stride;
    args.mask = mask.emplace(std::vector<uint16_t>(args.mask, args.mask + n)).data();
  }
  if (args.sinks) args.sinks = sinks.emplace(std::vector<float>(args.sinks, args.sinks + x.n_heads)).data();
  thimble_exact& exact = args.exact;
  if (exact.keys) {
    const auto array = [&](const uint16_t* rows, size_t stride) {
      return std::vector<uint16_t>(rows, rows + size_t(exact.n_rows) * stride);
    };
    exact.keys = exact_keys.emplace(array(exact.keys, exact.key_stride)).data();
    exact.values = exact_values.emplace(array(exact.values, exact.value_stride)).data();
  }
  EXPECT_TRUE(ok(thimble_attend(context, &args, stream())));
  return out.host();
}

/// The squared error that a format's arithmetic may add.
double bound(const Shape& shape) {
  const double error = shape.k_bits < 4 ? 0.03162 : shape.v_bits < 4 ? 0.015 : 1.5e-3;
  return error * error;
}

enum Option : unsigned { kMask = 1, kExact = 2, kSoftcap = 4, kAlibi = 8, kSinks = 16 };

struct Case {
  Shape shape;
  std::vector<int64_t> n_cells;
  std::vector<int> n_tokens;
  int group = 4;
  unsigned options = 0;
  std::vector<HeadCodec> codecs{};  // of keys by KV head, where a profile has them
  double allowed = 1;               // of the squared error that a format's arithmetic may add
};

/// The first layer of a profile whose keys and values fulfil `wanted` where the cache has 2 bits.
template <typename Wanted>
int layer_with(const Profile& profile, Wanted wanted) {
  for (int i = 0; i < int(profile.shape.layers.size()); i++) {
    if (wanted(profile.format(i, Kind::key, 2), profile.format(i, Kind::value, 2))) return i;
  }
  ADD_FAILURE() << "no such layer";
  return 0;
}

/// Contiguous and paged, against attention in double over what the codes stand for and the exact rows.
void check(const Case& c, int device = 0) {
  const auto cuda = cuda_context(device), cpu = context_of(1);
  std::vector<float> first;
  for (bool paged : {false, true}) {
    const Cache cache = cache_of(c.shape, c.n_cells, paged ? Layout::pages : Layout::heads, paged, cpu.get());
    Queries x = queries_of(cache, c.group, c.n_tokens);
    auto args = attend_args(cache, x);
    args.scale = 0.2f;
    const size_t stride = (*std::max_element(c.n_cells.begin(), c.n_cells.end()) + 63) / 64 * 64 + 8;
    const auto mask = mask_of(cache, x, stride, c.options & kAlibi);
    if (c.options & kMask) args.mask = mask.data();
    args.mask_stride = stride;
    if (c.options & kSoftcap) args.softcap = 2;
    if (c.options & kAlibi) args.max_bias = 8;
    const auto sinks = gaussian(x.n_heads, 8);
    if (c.options & kSinks) args.sinks = sinks.data();
    auto k = decoded(cache, *cache.keys, cpu.get()), v = decoded(cache, *cache.values, cpu.get());
    std::optional<ExactRows> exact;
    ScoreBias bias{c.codecs};
    if (c.options & kExact) {
      bias.is_exact = [](int s, int64_t cell) { return s == 1 || cell < 3 || cell % 5 == 4; };
      exact.emplace(cache, bias.is_exact, k, v);
      args.exact = exact->args();
    }
    const auto out = attend(cuda.get(), cache, x, args);
    std::copy(out.begin(), out.end(), x.out.begin());
    EXPECT_LT(nmse(cache, x, args, k, v, bias), c.allowed * bound(c.shape))
        << c.shape.k_dim << " at " << c.shape.k_bits << "/" << c.shape.v_bits << (paged ? ", paged" : "");
    if (paged) {
      EXPECT_EQ(out, first);
    }
    first = out;
  }
}

TEST_F(ApiCuda, CodesAreTheCpus) {
  for (const auto& [dim, bits] : {std::pair{64, 4.0}, {64, 2.0}, {64, 1.0}, {128, 4.0}, {128, 1.0}, {256, 2.0}}) {
    for (int kind : {THIMBLE_KEY, THIMBLE_VALUE}) {
      const Layout layout = kind == THIMBLE_KEY ? Layout::heads : Layout::pages;
      Side side(plain_codec(kind, dim, 2, bits), 4, layout);
      const DeviceBlocks to(side);  // nothing yet
      // Cells of several blocks in no order; one row is left out.
      const std::vector<int64_t> cells{200, 0, 63, 64, 255, -1, 7, 130, 65};
      const size_t stride = side.row_size() + 5;
      auto x = gaussian(cells.size() * stride, 4);
      std::fill_n(x.begin(), dim, 0.0f);
      x[stride + 3] = INFINITY;
      auto encode = side.encode_args(x, cells);
      encode.row_stride = stride;
      ASSERT_TRUE(ok(thimble_encode(cpu.get(), &encode, nullptr)));
      const DeviceArray<float> rows(x);
      encode.blocks = to.blocks;
      encode.rows = rows.data();
      ASSERT_TRUE(ok(thimble_encode(cuda.get(), &encode, stream())));
      EXPECT_EQ(converted(side, to.memory.host(), THIMBLE_DEVICE_CUDA, THIMBLE_DEVICE_CPU), side.memory)
          << dim << " at " << bits;
    }
  }
}

TEST_F(ApiCuda, RowsOfHalvesAndRowsDecodedAreTheCpus) {
  thimble_profile* opened = nullptr;
  ASSERT_TRUE(ok(thimble_profile_open(kProfile, &opened)));
  const Handle<thimble_profile> profile(opened);
  for (const Shape& shape : {Shape{128, 128, 2, 2, 2}, Shape{64, 64, 2, 2, 2, profile.get(), 2}}) {
    for (int kind : {THIMBLE_KEY, THIMBLE_VALUE}) {
      Side side(shape.codec(kind), 3, Layout::pages);
      const DeviceBlocks to(side);
      std::vector<int64_t> cells(70);
      std::iota(cells.begin(), cells.end(), 60);
      const size_t stride = side.row_size() + 6;
      const auto half = halves(gaussian(cells.size() * stride, 4));
      auto encode = side.encode_args({}, cells);
      encode.row_stride = stride;
      encode.type = THIMBLE_F16;
      encode.rows = half.data();
      ASSERT_TRUE(ok(thimble_encode(cpu.get(), &encode, nullptr)));
      const DeviceArray<uint16_t> rows(half);
      encode.blocks = to.blocks;
      encode.rows = rows.data();
      ASSERT_TRUE(ok(thimble_encode(cuda.get(), &encode, stream())));
      EXPECT_EQ(converted(side, to.memory.host(), THIMBLE_DEVICE_CUDA, THIMBLE_DEVICE_CPU), side.memory);

      cells[5] = -1;  // a row that is not written
      std::vector<float> numbers(half.size(), 7);
      std::vector<uint16_t> rounded(half.size(), float_to_half(7));
      const DeviceArray<float> device_numbers(numbers);
      const DeviceArray<uint16_t> device_rounded(rounded);
      auto decode = side.decode_args(numbers, cells);
      decode.row_stride = stride;
      ASSERT_TRUE(ok(thimble_decode(cpu.get(), &decode, nullptr)));
      decode.blocks = to.blocks;
      decode.rows = device_numbers.data();
      ASSERT_TRUE(ok(thimble_decode(cuda.get(), &decode, stream())));
      EXPECT_EQ(device_numbers.host(), numbers);
      decode.rows = device_rounded.data();
      decode.type = THIMBLE_F16;
      ASSERT_TRUE(ok(thimble_decode(cuda.get(), &decode, stream())));
      EXPECT_EQ(device_rounded.host(), halves(numbers));
    }
  }
}

const Shape kBytes{64, 64, 2, 2, 2}, kWide{64, 64, 2, 4, 4};

TEST_F(ApiCuda, AttendsInEveryFormat) {
  for (const Shape& shape : {kBytes, kWide, Shape{64, 64, 1, 1, 1}, Shape{64, 64, 1, 2, 1}, Shape{64, 64, 1, 4, 2},
                             Shape{128, 128, 1, 4, 4}, Shape{128, 128, 1, 2, 2}, Shape{256, 256, 1, 1, 1}}) {
    check({.shape = shape, .n_cells = {130, 64}, .n_tokens = {1, 1}});
  }
}

TEST_F(ApiCuda, AttendsToAwkwardNumbersOfCells) {
  for (const Shape& shape : {kBytes, kWide}) {
    check({.shape = shape, .n_cells = {1, 63, 64, 65, 0, 129}, .n_tokens = {1, 1, 1, 1, 1, 1}, .group = 3});
    check({.shape = shape, .n_cells = {65, 1}, .n_tokens = {1, 1}, .group = 1});
    check({.shape = shape, .n_cells = {64}, .n_tokens = {1}, .group = 8});
  }
}

// A long sequence, which several thread blocks share, alone and beside short ones.
TEST_F(ApiCuda, AttendsToSequencesOfVeryDifferentLengths) {
  check({.shape = kBytes, .n_cells = {64 * 43 + 7}, .n_tokens = {1}, .options = kExact});
  check({.shape = kBytes, .n_cells = {64 * 70 + 1, 5, 200}, .n_tokens = {1, 1, 1}});
  check({.shape = kWide, .n_cells = {70, 64 * 20 - 1}, .n_tokens = {1, 1}, .options = kExact});
}

TEST_F(ApiCuda, AttendsWithSeveralTokensOfASequence) {
  for (const Shape& shape : {kBytes, kWide}) {
    check({.shape = shape, .n_cells = {130, 1, 64}, .n_tokens = {3, 0, 5}, .group = 2, .options = kMask});
    check({.shape = shape, .n_cells = {200, 90}, .n_tokens = {2, 9}, .group = 1, .options = kMask | kExact});
  }
}

TEST_F(ApiCuda, AttendsWithEveryOption) {
  for (const Shape& shape : {kBytes, kWide}) {
    for (unsigned options : {unsigned(kExact), kMask | kAlibi, unsigned(kSoftcap), unsigned(kSinks),
                             kMask | kExact | kAlibi | kSoftcap | kSinks}) {
      check({.shape = shape, .n_cells = {150, 65}, .n_tokens = {2, 1}, .group = 3, .options = options});
    }
  }
}

TEST_F(ApiCuda, AttendsWithAProfile) {
  thimble_profile* opened = nullptr;
  ASSERT_TRUE(ok(thimble_profile_open(kProfile, &opened)));
  const Handle<thimble_profile> profile(opened);
  const Profile shipped = read_profile(kProfile);
  const auto codecs = [&](int layer, double bits) {
    std::vector<HeadCodec> of_heads;
    for (int h = 0; h < 3; h++) of_heads.push_back(shipped.codec(layer, h, Kind::key, bits));
    return of_heads;
  };
  for (unsigned options : {0u, unsigned(kExact), kMask | kExact | kSinks, kExact | kSoftcap | kSinks}) {
    // Random numbers are nothing that it was calibrated for: the bytes of the kernels' tables are spread over scores of
    // a greater range.
    const int layer = layer_with(shipped, [](const Format& keys, const Format& values) {
      return keys == make_format(64, 2) && values == make_format(64, 1);
    });
    check({.shape = {64, 64, 3, 2, 2, profile.get(), layer},
           .n_cells = {150, 65},
           .n_tokens = {1, 2},
           .options = options,
           .codecs = codecs(layer, 2),
           .allowed = 2});
    check({.shape = {64, 64, 3, 4, 4, profile.get(), 5},
           .n_cells = {70, 65},
           .n_tokens = {1, 2},
           .options = options,
           .codecs = codecs(5, 4)});
  }
}

TEST_F(ApiCuda, AttendsWithLessSharedMemory) {
  if (kDevices < 2) GTEST_SKIP() << "the device is what it is";
  for (const Shape& shape : {kBytes, kWide, Shape{128, 128, 1, 2, 2}}) {
    check({.shape = shape, .n_cells = {64 * 20 + 9, 64}, .n_tokens = {1, 2}, .options = kMask | kExact}, 1);
    check({.shape = shape, .n_cells = {1, 300}, .n_tokens = {1, 1}}, 1);
  }
}

// More query tokens than one launch takes.
TEST_F(ApiCuda, AttendsInSeveralLaunches) {
  const Cache cache = cache_of({64, 64, 1, 2, 2}, {64}, Layout::heads, false, cpu.get());
  Queries x = queries_of(cache, 1, {kDevices > 1 ? 9 : 300});
  const auto args = attend_args(cache, x);
  const auto out = attend(cuda.get(), cache, x, args);
  std::copy(out.begin(), out.end(), x.out.begin());
  const auto k = decoded(cache, *cache.keys, cpu.get()), v = decoded(cache, *cache.values, cpu.get());
  EXPECT_LT(nmse(cache, x, args, k, v), bound(kBytes));
}

TEST_F(ApiCuda, RefusesWhatThereAreNoKernelsFor) {
  thimble_profile* opened = nullptr;
  ASSERT_TRUE(ok(thimble_profile_open(kProfile, &opened)));
  const Handle<thimble_profile> profile(opened);
  const auto refused = [&](const std::string& part, const Shape& shape, Layout layout, auto change) {
    const Cache cache = cache_of(shape, {70, 64}, layout, true, cpu.get());
    Queries x = queries_of(cache, 2, {1, 2});
    auto args = attend_args(cache, x);
    change(args);
    EXPECT_TRUE(unsupported(thimble_attend(cuda.get(), &args, stream()), part));
    for (const float v : x.out) ASSERT_TRUE(std::isnan(v));
  };
  const auto as_it_is = [](auto&) {};
  refused("another rate", {64, 64, 2, 3, 3}, Layout::pages, as_it_is);
  refused("another rate", {64, 64, 2, 16, 16}, Layout::pages, as_it_is);
  refused("another rate", {80, 80, 2, 2, 2}, Layout::pages, as_it_is);
  const int mixed = layer_with(read_profile(kProfile), [](const Format&, const Format& values) {
    return values == make_format(64, 3) || values == make_format(64, 1.5);
  });
  refused("--even", {64, 64, 2, 2, 2, profile.get(), mixed}, Layout::pages, as_it_is);
  refused("the keys' head size", {64, 128, 2, 2, 2}, Layout::pages, as_it_is);
  refused("the keys' rate or half", {64, 64, 2, 2, 4}, Layout::pages, as_it_is);
  refused("the keys' rate or half", {64, 64, 2, 4, 1}, Layout::pages, as_it_is);
  refused("multiples of 16", kBytes, Layout::odd, as_it_is);
  refused("q must be aligned", kBytes, Layout::pages, [](auto& a) { a.q++; });
  refused("q must be aligned", kBytes, Layout::pages, [](auto& a) { a.q_token_stride++; });
  refused("without gaps", kBytes, Layout::pages, [](auto& a) { a.out_token_stride += 4; });
  refused("without gaps", kBytes, Layout::pages, [](auto& a) { a.out++; });
  const std::vector<uint16_t> numbers(4096);
  refused("whole blocks: 128", kBytes, Layout::pages, [&](auto& a) { a.mask = numbers.data(), a.mask_stride = 120; });
  refused("multiple of 8", kBytes, Layout::pages, [&](auto& a) { a.mask = numbers.data(), a.mask_stride = 130; });
  const std::vector<int64_t> start{0, 1, 1}, one{0};
  refused("strides multiples of 8", kBytes, Layout::pages, [&](auto& a) {
    a.exact = {start.data(), one.data(), one.data(), 1, numbers.data(), numbers.data(), 129, 128};
  });
  if (kDevices > 1) {
    const auto small = cuda_context(1);
    const Cache cache = cache_of({256, 256, 1, 4, 4}, {64}, Layout::heads, false, cpu.get());
    Queries x = queries_of(cache, 2, {1});
    const auto args = attend_args(cache, x);
    EXPECT_TRUE(unsupported(thimble_attend(small.get(), &args, stream()), "more shared memory"));
  }

  Side side(plain_codec(THIMBLE_KEY, 80, 2, 2), 1, Layout::heads);
  std::vector<float> rows(side.row_size());
  const auto encode = side.encode_args(rows, one);
  const auto decode = side.decode_args(rows, one);
  EXPECT_TRUE(unsupported(thimble_encode(cuda.get(), &encode, stream()), "another rate"));
  EXPECT_TRUE(unsupported(thimble_decode(cuda.get(), &decode, stream()), "another rate"));
}

TEST_F(ApiCuda, TakesWhatIsEmpty) {
  Side side(plain_codec(), 1, Layout::heads);
  const DeviceBlocks to(side);
  std::vector<float> none;
  const std::vector<int64_t> no_cells;
  auto encode = side.encode_args(none, no_cells);
  encode.blocks = to.blocks;
  EXPECT_TRUE(ok(thimble_encode(cuda.get(), &encode, stream())));
  auto decode = side.decode_args(none, no_cells);
  decode.blocks = to.blocks;
  EXPECT_TRUE(ok(thimble_decode(cuda.get(), &decode, stream())));
  const Cache cache = cache_of({}, {70, 0}, Layout::pages, true, cpu.get());
  Queries nobody = queries_of(cache, 2, {0, 0}), nothing = queries_of(cache, 2, {0, 1});
  attend(cuda.get(), cache, nobody, attend_args(cache, nobody));
  const std::vector<uint16_t> mask(128);
  auto args = attend_args(cache, nothing);
  args.mask = mask.data();
  args.mask_stride = mask.size();
  EXPECT_EQ(attend(cuda.get(), cache, nothing, args), std::vector<float>(nothing.out.size()));
  const Cache empty = cache_of({}, {0}, Layout::pages, true, cpu.get());
  Queries y = queries_of(empty, 2, {1});
  args = attend_args(empty, y);
  args.mask = mask.data();
  args.mask_stride = 0;
  EXPECT_EQ(attend(cuda.get(), empty, y, args), std::vector<float>(y.out.size()));
}

// A codec's tables stay on the device until the codec is gone; another codec in its place has its own.
TEST_F(ApiCuda, CodecsComeAndGo) {
  for (double bits : {4.0, 2.0, 1.0, 2.0}) {
    Side side(plain_codec(THIMBLE_KEY, 64, 2, bits), 1, Layout::heads);
    const DeviceBlocks to(side);
    const std::vector<int64_t> cells{5};
    const auto x = gaussian(side.row_size(), 4);
    auto encode = side.encode_args(x, cells);
    ASSERT_TRUE(ok(thimble_encode(cpu.get(), &encode, nullptr)));
    const DeviceArray<float> rows(x);
    encode.blocks = to.blocks;
    encode.rows = rows.data();
    ASSERT_TRUE(ok(thimble_encode(cuda.get(), &encode, stream())));
    EXPECT_EQ(converted(side, to.memory.host(), THIMBLE_DEVICE_CUDA, THIMBLE_DEVICE_CPU), side.memory) << bits;
  }
}

TEST_F(ApiCuda, ContextsSayWhatTheyAre) {
  EXPECT_EQ(std::string(thimble_context_instruction_set(cuda.get())).substr(0, 3), "sm_");
  const auto refused = [](thimble_status status, const std::string& part, auto change) {
    auto args = args_of<thimble_context_args>();
    args.device = THIMBLE_DEVICE_CUDA;
    change(args);
    thimble_context* context = reinterpret_cast<thimble_context*>(1);
    EXPECT_TRUE(fails(thimble_context_create(&args, &context), status, part));
    EXPECT_EQ(context, nullptr);
  };
  refused(THIMBLE_UNSUPPORTED, "no CUDA device 99", [](auto& args) { args.device_index = 99; });
  refused(THIMBLE_INVALID_ARGUMENT, "device_index", [](auto& args) { args.device_index = -1; });
  refused(THIMBLE_INVALID_ARGUMENT, "n_threads", [](auto& args) { args.n_threads = 2; });
}

}  // namespace
}  // namespace thimble::test
