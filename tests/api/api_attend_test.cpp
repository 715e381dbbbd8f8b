// thimble_attend is held to the core's attention over a CacheLayer, and to attention in double over the decoded cells;
// paged memory is held to contiguous memory.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "attend_fixture.h"
#include "attention/attention.h"

namespace thimble::test {
namespace {

/// The core's result for one sequence whose blocks lie in a CacheLayer's own memory.
std::vector<float> by_the_core(const Shape& shape, const Cache& cache, int sequence, const Queries& x,
                               const thimble_attend_args& args) {
  std::vector<std::vector<uint8_t>> memory;
  const auto side = [&](const Side& from, Kind kind, double bits, const std::vector<float>& rows) {
    const CacheShape cells{from.n_heads, cache.cells(), 1};
    auto codecs = std::make_shared<std::vector<HeadCodec>>(from.n_heads,
                                                           make_uncalibrated_codec(kind, make_format(from.dim, bits)));
    memory.emplace_back(CacheSide::memory_bytes(cells, codecs->front().format, 0), uint8_t{0xff});
    CacheSide made(cells, codecs, 0, memory.back().data());
    for (int64_t cell = 0; cell < cache.n_cells[sequence]; cell++) {
      const float* row = &rows[size_t(sequence * cache.cells() + cell) * from.row_size()];
      for (int h = 0; h < from.n_heads; h++) made.encode_head(h, row + size_t(h) * from.dim, cell);
    }
    return made;
  };
  const CacheLayer layer(side(*cache.keys, Kind::key, shape.k_bits, cache.k),
                         side(*cache.values, Kind::value, shape.v_bits, cache.v), Window({0, 0, 0}, 0, cache.cells()));
  const int64_t first = x.first_tokens[sequence];
  std::vector<float> out(size_t(x.first_tokens[sequence + 1] - first) * x.n_heads * cache.values->dim, NAN);
  AttentionProblem p;
  p.n_heads = x.n_heads;
  p.n_tokens = int(x.first_tokens[sequence + 1] - first);
  p.n_cells = cache.n_cells[sequence];
  p.value_dim = cache.values->dim;
  p.q = x.q.data() + size_t(first) * args.q_token_stride;
  p.q_token = args.q_token_stride;
  p.q_head = args.q_head_stride;
  p.out = out.data();
  p.out_token = size_t(x.n_heads) * cache.values->dim;
  p.out_head = cache.values->dim;
  p.mask = args.mask ? args.mask + size_t(first) * args.mask_stride : nullptr;
  p.mask_token = args.mask_stride;
  p.scale = args.scale != 0 ? args.scale : 1.0f / std::sqrt(float(cache.keys->dim));
  p.softcap = args.softcap;
  p.max_bias = args.max_bias;
  p.sinks = args.sinks;
  Attention attention;
  attention.prepare(layer, p, {}, 1, kernels());
  attention.attend(0);
  return out;
}

const std::vector<Shape> kShapes{{64, 64, 2, 2, 2},  {64, 64, 1, 4, 4},        {80, 48, 3, 3, 1},   {2, 6, 1, 4, 4},
                                 {100, 34, 2, 1, 2}, {256, 250, 1, 1.25, 1.5}, {64, 64, 2, 16, 16}, {64, 32, 2, 16, 2}};

TEST(ApiAttend, IsTheCoresAttention) {
  const auto context = context_of(1);
  for (const Shape& shape : kShapes) {
    for (const std::vector<int>& n_tokens : {std::vector{1, 1, 1}, {3, 0, 9}}) {
      const Cache cache = cache_of(shape, {130, 1, 64}, Layout::pages, true, context.get());
      Queries x = queries_of(cache, 3, n_tokens);
      const size_t stride = 131;
      const auto mask = mask_of(cache, x, stride, true);
      const auto sinks = gaussian(x.n_heads, 8);
      auto args = attend_args(cache, x);
      args.mask = mask.data();
      args.mask_stride = stride;
      args.softcap = 20;
      args.max_bias = 8;
      args.scale = 0.2f;
      args.sinks = sinks.data();
      ASSERT_TRUE(ok(thimble_attend(context.get(), &args, nullptr)));
      for (int s = 0; s < cache.n_sequences; s++) {
        const auto expected = by_the_core(shape, cache, s, x, args);
        const float* got = x.out.data() + size_t(x.first_tokens[s]) * args.out_token_stride;
        EXPECT_TRUE(std::equal(expected.begin(), expected.end(), got))
            << "sequence " << s << ", " << shape.k_dim << "/" << shape.v_dim << " at " << shape.k_bits;
      }
    }
  }
}

TEST(ApiAttend, PagedAndContiguousGiveTheSameBits) {
  for (const Shape& shape : kShapes) {
    for (int n_threads : {1, 3}) {
      const auto context = context_of(n_threads);
      for (const std::vector<int>& n_tokens : {std::vector{1, 1, 1, 1}, {2, 8, 1, 70}}) {
        std::vector<std::vector<float>> results;
        for (bool paged : {false, true}) {
          for (Layout layout : {Layout::heads, Layout::pages, Layout::odd}) {
            const Cache cache = cache_of(shape, {1100, 63, 65, 70}, layout, paged, context.get());
            Queries x = queries_of(cache, 2, n_tokens);
            auto args = attend_args(cache, x);
            const auto mask = mask_of(cache, x, 1100, false);
            args.mask = mask.data();
            args.mask_stride = 1100;
            ASSERT_TRUE(ok(thimble_attend(context.get(), &args, nullptr)));
            results.push_back(x.out);
          }
        }
        for (size_t i = 1; i < results.size(); i++) EXPECT_EQ(results[0], results[i]) << i;
      }
    }
  }
}

// Bounds as for the core: look-ups and weights of 8 bits at up to 2 bits, of 16 at 3 and 4, floats elsewhere.
TEST(ApiAttend, IsAttentionOverWhatTheCodesStandFor) {
  for (const Shape& shape : kShapes) {
    for (int n_threads : {1, 2, 5}) {
      const auto context = context_of(n_threads);
      const Cache cache = cache_of(shape, {300, 0, 129}, Layout::odd, true, context.get());
      for (const std::vector<int>& n_tokens : {std::vector{1, 1, 1}, {4, 1, 20}}) {
        Queries x = queries_of(cache, 4, n_tokens);
        auto args = attend_args(cache, x);
        const auto mask = mask_of(cache, x, 300, false);
        if (n_tokens[0] > 1) args.mask = mask.data();
        args.mask_stride = 300;
        ASSERT_TRUE(ok(thimble_attend(context.get(), &args, nullptr)));
        const auto k = decoded(cache, *cache.keys, context.get()), v = decoded(cache, *cache.values, context.get());
        EXPECT_LT(nmse(cache, x, args, k, v), 5e-4) << shape.k_dim << " at " << shape.k_bits << "/" << shape.v_bits;
        // A sequence without cells: zeros.
        for (int i = 0; i < x.n_heads * cache.values->dim; i++) {
          ASSERT_EQ(x.out[x.first_tokens[1] * args.out_token_stride + i], 0);
        }
      }
    }
  }
}

TEST(ApiAttend, StridesAreTheCallers) {
  const auto context = context_of(2);
  const Cache cache = cache_of({}, {100}, Layout::heads, false, context.get());
  Queries x = queries_of(cache, 2, {3});
  auto args = attend_args(cache, x);
  ASSERT_TRUE(ok(thimble_attend(context.get(), &args, nullptr)));
  // [head][token][dim] with gaps
  const size_t dim = 64, token = dim + 3, head = 3 * token + 1;
  std::vector<float> q(4 * head), out(4 * head, 7);
  for (int t = 0; t < 3; t++) {
    for (int h = 0; h < 4; h++) std::copy_n(&x.q[(t * 4 + h) * dim], dim, &q[h * head + t * token]);
  }
  args.q = q.data();
  args.out = out.data();
  args.q_token_stride = args.out_token_stride = token;
  args.q_head_stride = args.out_head_stride = head;
  ASSERT_TRUE(ok(thimble_attend(context.get(), &args, nullptr)));
  for (int t = 0; t < 3; t++) {
    for (int h = 0; h < 4; h++) {
      EXPECT_TRUE(std::equal(&out[h * head + t * token], &out[h * head + t * token] + dim, &x.out[(t * 4 + h) * dim]));
      EXPECT_EQ(out[h * head + t * token + dim], 7);
    }
  }
}

TEST(ApiAttend, ExactCellsStandInForTheirCodes) {
  for (int n_threads : {1, 3}) {
    const auto context = context_of(n_threads);
    for (const Shape& shape : {Shape{64, 64, 2, 1, 1}, Shape{80, 48, 3, 2, 4}}) {
      for (const std::vector<int>& n_tokens : {std::vector{1, 1}, {2, 12}}) {
        const Cache cache = cache_of(shape, {200, 90}, Layout::pages, true, context.get());
        Queries x = queries_of(cache, 2, n_tokens);
        // The first 3 and the last 70 of one, all of the other.
        auto k = decoded(cache, *cache.keys, context.get()), v = decoded(cache, *cache.values, context.get());
        const ExactRows exact(
            cache, [](int s, int64_t c) { return s != 0 || c < 3 || c >= 130; }, k, v);
        auto args = attend_args(cache, x);
        const auto mask = mask_of(cache, x, 200, false);
        args.mask = mask.data();
        args.mask_stride = 200;
        args.exact = exact.args();
        ASSERT_TRUE(ok(thimble_attend(context.get(), &args, nullptr)));
        EXPECT_LT(nmse(cache, x, args, k, v), 5e-4);
        const auto with_exact = x.out;
        args.exact = {};
        ASSERT_TRUE(ok(thimble_attend(context.get(), &args, nullptr)));
        EXPECT_NE(x.out, with_exact);
        EXPECT_GT(nmse(cache, x, args, k, v), 1e-2);
      }
    }
  }
}

// Calls reuse a context's memory; data that an earlier call left there does not change a result.
TEST(ApiAttend, CallsDoNotDependOnTheOnesBefore) {
  const auto context = context_of(2), fresh = context_of(2);
  const Cache large = cache_of({128, 128, 2, 4, 4}, {700, 300, 200}, Layout::heads, false, context.get());
  const Cache small = cache_of({}, {70}, Layout::pages, true, context.get());
  Queries x = queries_of(large, 3, {4, 1, 30}), y = queries_of(small, 2, {1}), z = y;
  const auto first = attend_args(large, x), second = attend_args(small, y), alone = attend_args(small, z);
  ASSERT_TRUE(ok(thimble_attend(context.get(), &first, nullptr)));
  ASSERT_TRUE(ok(thimble_attend(context.get(), &second, nullptr)));
  ASSERT_TRUE(ok(thimble_attend(fresh.get(), &alone, nullptr)));
  EXPECT_EQ(y.out, z.out);
}

TEST(ApiAttend, WithoutFirstTokensOneEach) {
  const auto context = context_of(1);
  const Cache cache = cache_of({}, {70, 64, 5}, Layout::heads, false, context.get());
  Queries x = queries_of(cache, 2, {1, 1, 1});
  auto args = attend_args(cache, x);
  ASSERT_TRUE(ok(thimble_attend(context.get(), &args, nullptr)));
  const auto expected = x.out;
  x.out.assign(x.out.size(), NAN);
  args.first_tokens = nullptr;
  ASSERT_TRUE(ok(thimble_attend(context.get(), &args, nullptr)));
  EXPECT_EQ(x.out, expected);
}

TEST(ApiAttend, RefusesWhatIsWrong) {
  const auto context = context_of(1);
  const Cache cache = cache_of({}, {70, 64}, Layout::pages, true, context.get());
  Queries x = queries_of(cache, 2, {1, 2});
  const auto other_heads = codec_of(plain_codec(THIMBLE_VALUE, 64, 1, 2));
  std::vector<int64_t> bad_cells{70, 0}, bad_tokens{0, 2, 1}, negative_tokens{-1, 0, 1};
  std::vector<int32_t> table = cache.table;
  const std::vector<uint16_t> numbers(1000);
  const auto refused = [&](const std::string& part, auto change) {
    auto args = attend_args(cache, x);
    change(args);
    EXPECT_TRUE(invalid(thimble_attend(context.get(), &args, nullptr), part));
  };
  refused("keys is null", [](auto& a) { a.keys = nullptr; });
  refused("values is null", [](auto& a) { a.values = nullptr; });
  refused("keys is a codec of values", [](auto& a) { a.keys = a.values; });
  refused("values is a codec of keys", [](auto& a) { a.values = a.keys; });
  refused("different numbers of heads", [&](auto& a) { a.values = other_heads.get(); });
  refused("key_blocks.data", [](auto& a) { a.key_blocks.data = nullptr; });
  refused("value_blocks.n_blocks", [](auto& a) { a.value_blocks.n_blocks = -1; });
  refused("value_blocks: blocks of", [](auto& a) { a.value_blocks.block_stride = 1; });
  refused("n_heads is 3", [](auto& a) { a.n_heads = 3; });
  refused("n_heads is 0", [](auto& a) { a.n_heads = 0; });
  refused("n_heads is -2", [](auto& a) { a.n_heads = -2; });
  refused("n_sequences", [](auto& a) { a.n_sequences = -1; });
  refused("n_cells is null", [](auto& a) { a.n_cells = nullptr; });
  refused("blocks_per_sequence", [](auto& a) { a.blocks_per_sequence = 0; });
  refused("blocks_per_sequence", [](auto& a) { a.blocks_per_sequence = INT32_MAX; });
  refused("the memory has 11 blocks", [](auto& a) { a.block_table = nullptr, a.blocks_per_sequence = 6; });
  for (int64_t n : {int64_t{-1}, cache.cells() + 1, INT64_MAX}) {
    bad_cells[1] = n;
    refused("n_cells[1]", [&](auto& a) { a.n_cells = bad_cells.data(); });
  }
  for (int32_t page : {-1, 11, INT32_MAX, INT32_MIN}) {
    table[1] = page;
    refused("block 1 of sequence 0", [&](auto& a) { a.block_table = table.data(); });
  }
  refused("first_tokens[2]", [&](auto& a) { a.first_tokens = bad_tokens.data(); });
  refused("first_tokens[0]", [&](auto& a) { a.first_tokens = negative_tokens.data(); });
  refused("q and out", [](auto& a) { a.q = nullptr; });
  refused("q and out", [](auto& a) { a.out = nullptr; });
  refused("out: vectors overlap", [](auto& a) { a.out_head_stride = 63; });
  refused("out: vectors overlap", [](auto& a) { a.out_token_stride = 0; });
  refused("scale, softcap", [](auto& a) { a.scale = NAN; });
  refused("scale, softcap", [](auto& a) { a.softcap = -1; });
  refused("scale, softcap", [](auto& a) { a.max_bias = INFINITY; });
  refused("mask_stride is 69", [&](auto& a) { a.mask = numbers.data(), a.mask_stride = 69; });
  for (const float v : x.out) ASSERT_TRUE(std::isnan(v));  // nothing was written

  auto args = attend_args(cache, x);
  args.n_sequences = 0;
  EXPECT_TRUE(ok(thimble_attend(context.get(), &args, nullptr)));
}

TEST(ApiAttend, RefusesExactCellsThatAreWrong) {
  const auto context = context_of(1);
  const Cache cache = cache_of({}, {70, 64}, Layout::pages, true, context.get());
  Queries x = queries_of(cache, 2, {1, 2});
  const std::vector<uint16_t> numbers(2 * 128);
  const auto refused = [&](const std::string& part, std::vector<int64_t> start, std::vector<int64_t> cells,
                           std::vector<int64_t> rows, auto change) {
    auto args = attend_args(cache, x);
    args.exact = {start.data(), cells.data(), rows.data(), 2, numbers.data(), numbers.data(), 128, 128};
    change(args.exact);
    EXPECT_TRUE(invalid(thimble_attend(context.get(), &args, nullptr), part));
  };
  const auto as_it_is = [](thimble_exact&) {};
  refused("exact.start[0]", {1, 1, 1}, {0}, {0}, as_it_is);
  refused("exact.start[2]", {0, 1, 0}, {0}, {0}, as_it_is);
  refused("exact.cells[0] is 70", {0, 1, 1}, {70}, {0}, as_it_is);
  refused("exact.cells[0] is -1", {0, 1, 1}, {-1}, {0}, as_it_is);
  refused("exact.cells[1] is 5", {0, 2, 2}, {5, 5}, {0, 1}, as_it_is);
  refused("exact.cells[1] is 64", {0, 1, 2}, {5, 64}, {0, 1}, as_it_is);
  refused("exact.rows[0] is 2", {0, 1, 1}, {3}, {2}, as_it_is);
  refused("exact.rows[0] is -1", {0, 1, 1}, {3}, {-1}, as_it_is);
  refused("must not be null", {0, 1, 1}, {3}, {0}, [](thimble_exact& e) { e.cells = nullptr; });
  refused("must not be null", {0, 1, 1}, {3}, {0}, [](thimble_exact& e) { e.rows = nullptr; });
  refused("must not be null", {0, 1, 1}, {3}, {0}, [](thimble_exact& e) { e.keys = nullptr; });
  refused("must not be null", {0, 1, 1}, {3}, {0}, [](thimble_exact& e) { e.values = nullptr; });
  refused("key_stride", {0, 1, 1}, {3}, {0}, [](thimble_exact& e) { e.value_stride = 127; });
  auto args = attend_args(cache, x);
  const std::vector<int64_t> none{0, 0, 0};
  args.exact.start = none.data();
  EXPECT_TRUE(ok(thimble_attend(context.get(), &args, nullptr)));
}

TEST(ApiThreads, AContextServesOneCallAtATime) {
  const auto context = context_of(1);
  const Cache cache = cache_of({128, 128, 4, 2, 2}, {4000}, Layout::heads, false, context.get());
  std::atomic<int> n_served{0}, n_refused{0}, n_other{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; i++) {
    callers.emplace_back([&] {
      Queries x = queries_of(cache, 4, {1});
      const auto args = attend_args(cache, x);
      for (int call = 0; call < 50; call++) {
        const thimble_status status = thimble_attend(context.get(), &args, nullptr);
        if (status == THIMBLE_OK) {
          n_served++;
        } else if (invalid(status, "at work for another call")) {
          n_refused++;
        } else {
          n_other++;
        }
      }
    });
  }
  for (auto& caller : callers) caller.join();
  EXPECT_EQ(n_other, 0);
  EXPECT_GT(n_served, 0);
  EXPECT_EQ(n_served + n_refused, 200);
}

TEST(ApiThreads, ContextsShareCodecsAndBlocks) {
  const auto context = context_of(1);
  const Cache cache = cache_of({}, {500, 70}, Layout::pages, true, context.get());
  Queries expected = queries_of(cache, 2, {1, 1});
  const auto args = attend_args(cache, expected);
  ASSERT_TRUE(ok(thimble_attend(context.get(), &args, nullptr)));
  std::atomic<int> n_same{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; i++) {
    callers.emplace_back([&] {
      const auto own = context_of(1);
      Queries x = queries_of(cache, 2, {1, 1});
      const auto mine = attend_args(cache, x);
      for (int call = 0; call < 20; call++) {
        x.out.assign(x.out.size(), NAN);
        if (thimble_attend(own.get(), &mine, nullptr) == THIMBLE_OK && x.out == expected.out) n_same++;
      }
    });
  }
  for (auto& caller : callers) caller.join();
  EXPECT_EQ(n_same, 60);
}

}  // namespace
}  // namespace thimble::test
