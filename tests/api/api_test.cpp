// The C API's calls: their results, and that every wrong call gives a status and a sentence.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <thread>

#include "codec/head_codec.h"
#include "cuda/layout.h"
#include "fixture.h"
#include "profile/profile.h"

namespace thimble::test {
namespace {

const std::string kProfile = std::string(THIMBLE_SOURCE) + "/profiles/SmolLM2-135M-Instruct.Q4_1.thimble.gguf";

Handle<thimble_profile> shipped_profile() {
  thimble_profile* profile = nullptr;
  EXPECT_TRUE(ok(thimble_profile_open(kProfile.c_str(), &profile)));
  return Handle<thimble_profile>(profile);
}

TEST(Api, VersionIsTheProjects) {
  EXPECT_STREQ(thimble_version(), THIMBLE_PROJECT_VERSION);
  EXPECT_EQ(std::to_string(THIMBLE_VERSION_MAJOR) + "." + std::to_string(THIMBLE_VERSION_MINOR) + "." +
                std::to_string(THIMBLE_VERSION_PATCH),
            THIMBLE_PROJECT_VERSION);
}

TEST(Api, EveryStatusHasAName) {
  std::vector<std::string> names;
  for (int status = THIMBLE_OK; status <= THIMBLE_INTERNAL; status++) {
    names.emplace_back(thimble_status_name(thimble_status(status)));
  }
  std::sort(names.begin(), names.end());
  EXPECT_EQ(std::adjacent_find(names.begin(), names.end()), names.end());
  EXPECT_EQ(std::count(names.begin(), names.end(), "unknown status"), 0);
  EXPECT_STREQ(thimble_status_name(thimble_status(99)), "unknown status");
}

TEST(Api, AnErrorIsItsThreadsOwn) {
  EXPECT_TRUE(invalid(thimble_profile_open(nullptr, nullptr), "the place for the profile is null"));
  const std::string mine = thimble_last_error();
  std::string at_first, later;
  std::thread([&] {
    at_first = thimble_last_error();
    thimble_context_create(nullptr, nullptr);
    later = thimble_last_error();
  }).join();
  EXPECT_EQ(at_first, "");
  EXPECT_NE(later, mine);
  EXPECT_EQ(thimble_last_error(), mine);
  EXPECT_NE(context_of(1), nullptr);  // a call that succeeds says nothing
  EXPECT_EQ(thimble_last_error(), mine);
}

TEST(Api, NullIsFreed) {
  thimble_profile_close(nullptr);
  thimble_codec_free(nullptr);
  thimble_context_free(nullptr);
  EXPECT_EQ(thimble_codec_block_bytes(nullptr), 0u);
  EXPECT_STREQ(thimble_context_instruction_set(nullptr), "");
}

TEST(Api, StructuresOfAnotherVersion) {
  thimble_codec* codec = nullptr;
  auto args = plain_codec();
  args.struct_size = 0;
  EXPECT_TRUE(invalid(thimble_codec_create(&args, &codec), "set it to sizeof(thimble_codec_args)"));
  // A longer structure: members behind those of this version must be 0.
  struct {
    thimble_codec_args args;
    double later;
  } longer{plain_codec(), 0};
  longer.args.struct_size = sizeof longer;
  ASSERT_TRUE(ok(thimble_codec_create(&longer.args, &codec)));
  thimble_codec_free(codec);
  longer.later = 1;
  EXPECT_TRUE(fails(thimble_codec_create(&longer.args, &codec), THIMBLE_UNSUPPORTED, "use a newer library"));
  EXPECT_EQ(codec, nullptr);

  const auto made = codec_of(plain_codec());
  struct {
    thimble_codec_info info;
    double later;
  } filled{args_of<thimble_codec_info>(), 7};
  filled.info.struct_size = sizeof filled;
  ASSERT_TRUE(ok(thimble_codec_get_info(made.get(), &filled.info)));
  EXPECT_EQ(filled.later, 0);
  EXPECT_EQ(filled.info.struct_size, sizeof filled);
  EXPECT_EQ(filled.info.head_dim, 64);
}

TEST(ApiProfile, TellsWhatItHolds) {
  const auto profile = shipped_profile();
  const Profile expected = read_profile(kProfile);
  auto info = args_of<thimble_profile_info>();
  ASSERT_TRUE(ok(thimble_profile_get_info(profile.get(), &info)));
  EXPECT_EQ(info.architecture, expected.shape.architecture);
  EXPECT_EQ(info.source, expected.source);
  EXPECT_EQ(info.n_layers, int(expected.shape.layers.size()));
  EXPECT_EQ(std::vector<double>(info.rates, info.rates + info.n_rates), expected.bits);
  auto layer = args_of<thimble_layer_info>();
  ASSERT_TRUE(ok(thimble_profile_get_layer(profile.get(), 3, &layer)));
  EXPECT_EQ(layer.n_kv_heads, expected.shape.layers[3].n_kv_heads);
  EXPECT_EQ(layer.n_heads, expected.shape.layers[3].n_heads);
  EXPECT_EQ(layer.key_dim, expected.shape.layers[3].key_dim);
  EXPECT_EQ(layer.value_dim, expected.shape.layers[3].value_dim);
}

TEST(ApiProfile, FromMemoryIsTheSame) {
  std::ifstream file(kProfile, std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  thimble_profile* opened = nullptr;
  ASSERT_TRUE(ok(thimble_profile_open_memory(bytes.data(), bytes.size(), &opened)));
  const Handle<thimble_profile> profile(opened);
  bytes.assign(bytes.size(), 0);  // not needed any longer
  auto args = plain_codec(THIMBLE_VALUE, 0, 0);
  args.profile = profile.get();
  args.layer = 5;
  const auto first = shipped_profile();
  auto other = args;
  other.profile = first.get();
  const auto a = codec_of(args), b = codec_of(other);
  EXPECT_EQ(thimble_codec_block_bytes(a.get()), thimble_codec_block_bytes(b.get()));
}

TEST(ApiProfile, RefusesWhatIsNone) {
  thimble_profile* profile = reinterpret_cast<thimble_profile*>(1);
  EXPECT_TRUE(fails(thimble_profile_open("/nonexistent/x.gguf", &profile), THIMBLE_BAD_PROFILE, "/nonexistent/x.gguf"));
  EXPECT_EQ(profile, nullptr);
  EXPECT_TRUE(fails(thimble_profile_open("/", &profile), THIMBLE_BAD_PROFILE, "cannot read the profile"));
  EXPECT_TRUE(fails(thimble_profile_open_memory("GGUF", 4, &profile), THIMBLE_BAD_PROFILE, "not a usable profile"));
  EXPECT_TRUE(fails(thimble_profile_open_memory("", 0, &profile), THIMBLE_BAD_PROFILE, "not a usable profile"));
  EXPECT_TRUE(invalid(thimble_profile_open(nullptr, &profile), "path is null"));
  EXPECT_TRUE(invalid(thimble_profile_open_memory(nullptr, 9, &profile), "bytes are null"));
  EXPECT_TRUE(invalid(thimble_profile_open_memory("GGUF", 4, nullptr), "place for the profile"));
  auto info = args_of<thimble_profile_info>();
  EXPECT_TRUE(invalid(thimble_profile_get_info(nullptr, &info), "the profile is null"));
  const auto good = shipped_profile();
  EXPECT_TRUE(invalid(thimble_profile_get_info(good.get(), nullptr), "thimble_profile_info is null"));
  auto layer = args_of<thimble_layer_info>();
  EXPECT_TRUE(invalid(thimble_profile_get_layer(good.get(), -1, &layer), "layers 0 to 29"));
  EXPECT_TRUE(invalid(thimble_profile_get_layer(good.get(), 30, &layer), "layers 0 to 29"));
}

TEST(ApiCodec, BlocksAreTheFormats) {
  for (double bits : {16.0, 4.0, 3.0, 2.0, 1.5, 1.25, 1.0}) {
    for (int dim : {2, 6, 64, 80, 96, 128, 250, 256}) {
      const auto codec = codec_of(plain_codec(THIMBLE_VALUE, dim, 1, bits));
      auto info = args_of<thimble_codec_info>();
      ASSERT_TRUE(ok(thimble_codec_get_info(codec.get(), &info)));
      const Format format = make_format(dim, bits);
      EXPECT_EQ(info.block_bytes, format.block_bytes());
      EXPECT_EQ(thimble_codec_block_bytes(codec.get()), format.block_bytes());
      EXPECT_EQ(info.bits, format.bits());
      EXPECT_EQ(info.kind, THIMBLE_VALUE);
      EXPECT_EQ(info.n_heads, 1);
      EXPECT_EQ(info.head_dim, dim);
    }
  }
}

TEST(ApiCodec, RefusesWhatThereIsNoCodecFor) {
  const auto refused = [](const std::string& part, auto change) {
    auto args = plain_codec();
    change(args);
    thimble_codec* codec = reinterpret_cast<thimble_codec*>(1);
    EXPECT_TRUE(invalid(thimble_codec_create(&args, &codec), part));
    EXPECT_EQ(codec, nullptr);
  };
  refused("choose 16, 4, 3, 2", [](auto& args) { args.bits = 5; });
  refused("choose 16, 4, 3, 2", [](auto& args) { args.bits = NAN; });
  refused("head size 63", [](auto& args) { args.head_dim = 63; });
  refused("head size 514", [](auto& args) { args.head_dim = 514; });
  refused("head size 0", [](auto& args) { args.head_dim = 0; });
  refused("n_heads", [](auto& args) { args.n_heads = 0; });
  refused("n_heads", [](auto& args) { args.n_heads = 1 << 30; });
  refused("kind", [](auto& args) { args.kind = 2; });
  refused("of a profile", [](auto& args) { args.layer = 1; });
  refused("of a profile", [](auto& args) { args.first_head = 1; });
  const auto args = plain_codec();
  EXPECT_TRUE(invalid(thimble_codec_create(&args, nullptr), "place for the codec"));
  thimble_codec* codec = nullptr;
  EXPECT_TRUE(invalid(thimble_codec_create(nullptr, &codec), "thimble_codec_args is null"));
  auto info = args_of<thimble_codec_info>();
  EXPECT_TRUE(invalid(thimble_codec_get_info(nullptr, &info), "the codec is null"));
}

TEST(ApiCodec, RefusesWhatTheProfileDoesNotHold) {
  const auto profile = shipped_profile();  // 30 layers, 3 KV heads of 64, at 4, 2 and 1 bits
  const auto refused = [&](thimble_status status, const std::string& part, auto change) {
    auto args = plain_codec(THIMBLE_KEY, 0, 0);
    args.profile = profile.get();
    change(args);
    thimble_codec* codec = nullptr;
    EXPECT_TRUE(fails(thimble_codec_create(&args, &codec), status, part));
  };
  refused(THIMBLE_INVALID_ARGUMENT, "layers 0 to 29", [](auto& args) { args.layer = 30; });
  refused(THIMBLE_INVALID_ARGUMENT, "layers 0 to 29", [](auto& args) { args.layer = -1; });
  refused(THIMBLE_INVALID_ARGUMENT, "3 KV heads", [](auto& args) { args.first_head = 3; });
  refused(THIMBLE_INVALID_ARGUMENT, "3 KV heads", [](auto& args) { args.first_head = 2, args.n_heads = 2; });
  refused(THIMBLE_INVALID_ARGUMENT, "3 KV heads", [](auto& args) { args.n_heads = INT32_MAX; });
  refused(THIMBLE_INVALID_ARGUMENT, "made for 64", [](auto& args) { args.head_dim = 128; });
  refused(THIMBLE_BAD_PROFILE, "not 3: choose", [](auto& args) { args.bits = 3; });
}

TEST(ApiCodec, OutlivesItsProfileAndTakesAShareOfTheHeads) {
  auto profile = shipped_profile();
  const Profile expected = read_profile(kProfile);
  auto args = plain_codec(THIMBLE_KEY, 0, 1);
  args.profile = profile.get();
  args.layer = 7;
  args.first_head = 2;
  Side side(args, 1, Layout::heads);
  profile.reset();
  const auto x = gaussian(64, 5);
  const std::vector<int64_t> cells{9};
  const auto context = context_of(1);
  const auto encode = side.encode_args(x, cells);
  ASSERT_TRUE(ok(thimble_encode(context.get(), &encode, nullptr)));
  const HeadCodec codec = expected.codec(7, 2, Kind::key, 2);
  std::vector<float> y(64);
  std::vector<uint8_t> block(codec.format.block_bytes(), 0xff);
  codec.transform.forward(x.data(), y.data());
  encode_cell(codec, y.data(), block.data(), 9);
  EXPECT_EQ(std::memcmp(block.data(), side.blocks.data, block.size()), 0);
}

TEST(ApiBlocks, GoToTheOrderOfCudaAndBack) {
  constexpr int kCpu = THIMBLE_DEVICE_CPU, kCuda = THIMBLE_DEVICE_CUDA;
  const auto codec = codec_of(plain_codec(THIMBLE_VALUE, 128, 1, 2));
  const size_t bytes = thimble_codec_block_bytes(codec.get());
  std::vector<uint8_t> cpu(3 * bytes), cuda(cpu.size()), back(cpu.size());
  for (size_t i = 0; i < cpu.size(); i++) cpu[i] = uint8_t(i * 37 + i / 256);
  ASSERT_TRUE(ok(thimble_convert_blocks(codec.get(), kCpu, cpu.data(), kCuda, cuda.data(), 3)));
  EXPECT_NE(cpu, cuda);
  for (int block = 0; block < 3; block++) {
    std::vector<uint8_t> expected(bytes);
    cuda::block_to_cuda(make_format(128, 2), Kind::value, &cpu[block * bytes], expected.data());
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), &cuda[block * bytes])) << block;
  }
  ASSERT_TRUE(ok(thimble_convert_blocks(codec.get(), kCuda, cuda.data(), kCpu, back.data(), 3)));
  EXPECT_EQ(back, cpu);
  ASSERT_TRUE(ok(thimble_convert_blocks(codec.get(), kCuda, cuda.data(), kCuda, back.data(), 3)));
  EXPECT_EQ(back, cuda);
  EXPECT_TRUE(ok(thimble_convert_blocks(codec.get(), kCpu, nullptr, kCuda, nullptr, 0)));

  const auto mixed = codec_of(plain_codec(THIMBLE_KEY, 128, 1, 3));
  EXPECT_TRUE(fails(thimble_convert_blocks(mixed.get(), kCpu, cpu.data(), kCuda, cuda.data(), 1), THIMBLE_UNSUPPORTED,
                    "never on CUDA"));
  EXPECT_TRUE(invalid(thimble_convert_blocks(nullptr, kCpu, cpu.data(), kCuda, cuda.data(), 1), "the codec is null"));
  EXPECT_TRUE(invalid(thimble_convert_blocks(codec.get(), 2, cpu.data(), kCuda, cuda.data(), 1), "from_device"));
  EXPECT_TRUE(invalid(thimble_convert_blocks(codec.get(), kCpu, cpu.data(), -1, cuda.data(), 1), "to_device"));
  EXPECT_TRUE(invalid(thimble_convert_blocks(codec.get(), kCpu, cpu.data(), kCuda, cuda.data(), -1), "n_blocks"));
  EXPECT_TRUE(invalid(thimble_convert_blocks(codec.get(), kCpu, nullptr, kCuda, cuda.data(), 1), "must not be null"));
}

TEST(ApiContext, RefusesWhatItCannotBe) {
  const auto refused = [](thimble_status status, const std::string& part, auto change) {
    auto args = args_of<thimble_context_args>();
    change(args);
    thimble_context* context = reinterpret_cast<thimble_context*>(1);
    EXPECT_TRUE(fails(thimble_context_create(&args, &context), status, part));
    EXPECT_EQ(context, nullptr);
  };
  // This build has none, or this machine has no such device.
  refused(THIMBLE_UNSUPPORTED, "no CUDA",
          [](auto& args) { args.device = THIMBLE_DEVICE_CUDA, args.device_index = 99; });
  refused(THIMBLE_INVALID_ARGUMENT, "device", [](auto& args) { args.device = 2; });
  refused(THIMBLE_INVALID_ARGUMENT, "device_index", [](auto& args) { args.device_index = 1; });
  refused(THIMBLE_INVALID_ARGUMENT, "n_threads", [](auto& args) { args.n_threads = -1; });
  refused(THIMBLE_INVALID_ARGUMENT, "n_threads", [](auto& args) { args.n_threads = 513; });
  EXPECT_TRUE(invalid(thimble_context_create(nullptr, nullptr), "place for the context"));
  thimble_context* context = nullptr;
  ASSERT_TRUE(ok(thimble_context_create(nullptr, &context)));  // all defaults
  EXPECT_STRNE(thimble_context_instruction_set(context), "");
  thimble_context_free(context);
}

TEST(ApiContext, StreamsAreForDevices) {
  const auto context = context_of(1);
  int stream = 0;
  const auto encode = args_of<thimble_encode_args>();
  const auto decode = args_of<thimble_decode_args>();
  const auto attend = args_of<thimble_attend_args>();
  EXPECT_TRUE(fails(thimble_encode(context.get(), &encode, &stream), THIMBLE_UNSUPPORTED, "no stream"));
  EXPECT_TRUE(fails(thimble_decode(context.get(), &decode, &stream), THIMBLE_UNSUPPORTED, "no stream"));
  EXPECT_TRUE(fails(thimble_attend(context.get(), &attend, &stream), THIMBLE_UNSUPPORTED, "no stream"));
  EXPECT_TRUE(invalid(thimble_encode(nullptr, &encode, nullptr), "the context is null"));
  EXPECT_TRUE(invalid(thimble_decode(nullptr, &decode, nullptr), "the context is null"));
  EXPECT_TRUE(invalid(thimble_attend(nullptr, &attend, nullptr), "the context is null"));
  EXPECT_TRUE(invalid(thimble_encode(context.get(), nullptr, nullptr), "thimble_encode_args is null"));
  EXPECT_TRUE(invalid(thimble_decode(context.get(), nullptr, nullptr), "thimble_decode_args is null"));
  EXPECT_TRUE(invalid(thimble_attend(context.get(), nullptr, nullptr), "thimble_attend_args is null"));
}

// -- encode and decode --

class ApiCells : public testing::TestWithParam<Layout> {};

TEST_P(ApiCells, CodesAreTheCodecsOwn) {
  for (int kind : {THIMBLE_KEY, THIMBLE_VALUE}) {
    for (double bits : {16.0, 3.0, 1.0}) {
      for (int n_threads : {1, 3}) {
        const int n_heads = 3, dim = 80;
        Side side(plain_codec(kind, dim, n_heads, bits), 4, GetParam());
        const HeadCodec codec =
            make_uncalibrated_codec(kind == THIMBLE_KEY ? Kind::key : Kind::value, make_format(dim, bits));
        // Cells of several blocks in no order; one row is left out.
        const std::vector<int64_t> cells{200, 0, 63, 64, 255, -1, 7, 130};
        const auto x = gaussian(cells.size() * side.row_size(), 4);
        std::vector<uint8_t> expected = side.memory;
        std::vector<float> decoded(x.size(), 7), expected_decoded = decoded;
        for (size_t row = 0; row < cells.size(); row++) {
          for (int h = 0; h < n_heads && cells[row] >= 0; h++) {
            float y[kMaxHeadDim];
            const size_t at = row * side.row_size() + size_t(h) * dim;
            codec.transform.forward(&x[at], y);
            uint8_t* block = expected.data() + (static_cast<uint8_t*>(side.blocks.data) - side.memory.data()) +
                             size_t(cells[row] / 64) * side.blocks.block_stride + h * side.blocks.head_stride;
            encode_cell(codec, y, block, int(cells[row] % 64));
            decode_cell(codec, block, int(cells[row] % 64), y);
            codec.transform.inverse(y, &expected_decoded[at]);
          }
        }
        const auto context = context_of(n_threads);
        const auto encode = side.encode_args(x, cells);
        ASSERT_TRUE(ok(thimble_encode(context.get(), &encode, nullptr)));
        EXPECT_EQ(side.memory, expected);  // nor was anything else written
        const auto decode = side.decode_args(decoded, cells);
        ASSERT_TRUE(ok(thimble_decode(context.get(), &decode, nullptr)));
        EXPECT_EQ(decoded, expected_decoded);
      }
    }
  }
}

TEST_P(ApiCells, RowsOfHalvesAreTheSameNumbers) {
  const auto context = context_of(2);
  Side a(plain_codec(), 2, GetParam()), b(plain_codec(), 2, GetParam());
  std::vector<int64_t> cells(100);
  std::iota(cells.begin(), cells.end(), 3);
  const size_t stride = a.row_size() + 5;
  auto x = gaussian(cells.size() * stride, 4);
  const auto half = halves(x);
  for (size_t i = 0; i < x.size(); i++) x[i] = half_to_float(half[i]);
  auto encode = a.encode_args(x, cells);
  encode.row_stride = stride;
  ASSERT_TRUE(ok(thimble_encode(context.get(), &encode, nullptr)));
  encode.blocks = b.blocks;
  encode.rows = half.data();
  encode.type = THIMBLE_F16;
  ASSERT_TRUE(ok(thimble_encode(context.get(), &encode, nullptr)));
  EXPECT_EQ(a.memory, b.memory);

  std::vector<float> decoded(x.size(), 7);
  std::vector<uint16_t> decoded_half(x.size(), float_to_half(7));
  auto decode = a.decode_args(decoded, cells);
  decode.row_stride = stride;
  ASSERT_TRUE(ok(thimble_decode(context.get(), &decode, nullptr)));
  decode.rows = decoded_half.data();
  decode.type = THIMBLE_F16;
  ASSERT_TRUE(ok(thimble_decode(context.get(), &decode, nullptr)));
  EXPECT_EQ(halves(decoded), decoded_half);
  EXPECT_EQ(decoded[a.row_size()], 7);  // between rows
}

std::string name_of(const testing::TestParamInfo<Layout>& info) {
  return info.param == Layout::heads ? "Heads" : info.param == Layout::pages ? "Pages" : "Odd";
}

INSTANTIATE_TEST_SUITE_P(Layouts, ApiCells, testing::Values(Layout::heads, Layout::pages, Layout::odd), name_of);

TEST(ApiCells, RefusesWhatIsWrong) {
  const auto context = context_of(1);
  Side side(plain_codec(), 2, Layout::heads);
  const std::vector<uint8_t> before = side.memory;
  auto x = gaussian(3 * side.row_size(), 4);
  const std::vector<int64_t> cells{0, 5, 127};
  // The same for both directions.
  const auto refused = [&](const std::string& part, auto change) {
    auto encode = side.encode_args(x, cells);
    change(encode);
    EXPECT_TRUE(invalid(thimble_encode(context.get(), &encode, nullptr), part));
    auto decode = side.decode_args(x, cells);
    change(decode);
    EXPECT_TRUE(invalid(thimble_decode(context.get(), &decode, nullptr), part));
  };
  const std::vector<int64_t> beyond{0, 128, 1};
  refused("the codec is null", [](auto& args) { args.codec = nullptr; });
  refused("blocks.data is null", [](auto& args) { args.blocks.data = nullptr; });
  refused("n_blocks", [](auto& args) { args.blocks.n_blocks = 0; });
  refused("n_blocks", [](auto& args) { args.blocks.n_blocks = INT64_MAX; });
  refused("overlap", [](auto& args) { args.blocks.block_stride--; });
  refused("overlap", [](auto& args) { args.blocks.head_stride = 0; });
  refused("overlap", [](auto& args) { args.blocks.head_stride = SIZE_MAX; });
  refused("overlap", [](auto& args) { args.blocks.block_stride = SIZE_MAX / 2; });
  refused("n_rows", [](auto& args) { args.n_rows = -1; });
  refused("cells and rows", [](auto& args) { args.cells = nullptr; });
  refused("cells and rows", [](auto& args) { args.rows = nullptr; });
  refused("row_stride", [](auto& args) { args.row_stride--; });
  refused("type", [](auto& args) { args.type = 2; });
  refused("cells[1] is 128", [&](auto& args) { args.cells = beyond.data(); });
  const std::vector<int64_t> twice{5, -1, 5};
  auto encode = side.encode_args(x, twice);
  EXPECT_TRUE(invalid(thimble_encode(context.get(), &encode, nullptr), "cell 5 is there twice"));
  EXPECT_EQ(side.memory, before);
  const std::vector<int64_t> left_out{-1, -1, -7};
  encode = side.encode_args(x, left_out);
  EXPECT_TRUE(ok(thimble_encode(context.get(), &encode, nullptr)));
  encode.n_rows = 0;
  encode.rows = nullptr;
  encode.cells = nullptr;
  EXPECT_TRUE(ok(thimble_encode(context.get(), &encode, nullptr)));
  EXPECT_EQ(side.memory, before);
}

}  // namespace
}  // namespace thimble::test
