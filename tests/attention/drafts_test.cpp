// Tokens that are decoded at once, drafts among them that are taken back: each gets what it would have got alone.
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <memory>
#include <random>
#include <utility>

#include "attention/attention.h"
#include "codec/half.h"
#include "support/random.h"

namespace thimble {
namespace {

constexpr int kDim = 64, kKvHeads = 2, kGroup = 2, kHeads = kKvHeads * kGroup, kCells = 1024, kPrompt = 100;

struct Shape {
  double bits = 2;
  WindowSize window{32, 8, 16};
  int top = 0;
  int n_sequences = 1;
  bool unified = true;

  bool shares_stream() const { return unified && n_sequences > 1; }
  /// In a stream that sequences share, cells lie elsewhere than alone. Where weights have 8 bits, they then share their
  /// scales with other cells, so the plain kernels are taken.
  const Kernels& kernels() const { return shares_stream() ? scalar_kernels() : thimble::kernels(); }
};

// A layer of random tokens: a token's number decides its key, value and queries.
class Decoder {
public:
  explicit Decoder(const Shape& shape) : shape_(shape), n_streams_(shape.unified ? 1 : shape.n_sequences) {
    const CacheShape cache{kKvHeads, kCells, n_streams_};
    const int n_slots = Window::slots_of_stream(shape.window, kCells, n_streams_) * n_streams_;
    std::vector<CacheSide> sides;
    for (Kind kind : {Kind::key, Kind::value}) {
      auto codecs = std::make_shared<std::vector<HeadCodec>>(
          kKvHeads, make_uncalibrated_codec(kind, make_format(kDim, shape.bits)));
      auto store = shape.top > 0 ? ExactStore::ram(cache.n_cells(), kKvHeads * kDim) : nullptr;
      memory_[int(kind)].resize(CacheSide::memory_bytes(cache, codecs->front().format, n_slots));
      sides.emplace_back(cache, codecs, shape.top > 0 ? 0 : n_slots, memory_[int(kind)].data(), std::move(store));
    }
    layer_ = std::make_unique<CacheLayer>(std::move(sides[0]), std::move(sides[1]),
                                          Window(shape.window, n_slots, kCells, n_streams_));
  }

  /// Decodes a batch of tokens, `numbers` by sequence; without `unified` they must be equally many. Returns the output
  /// of each token, sequence by sequence.
  std::vector<std::vector<float>> run(const std::vector<std::vector<int>>& numbers) {
    std::vector<int64_t> cells;
    std::vector<float> queries;
    std::vector<std::vector<float>> rows[2];
    for (int s = 0; s < int(numbers.size()); s++) {
      for (int number : numbers[s]) {
        cells.push_back(free_cell(shape_.unified ? 0 : s));
        owner_[cells.back()] = {s, length_[s]++};
        const std::vector<float> all = gaussian((2 * kKvHeads + kHeads) * kDim, unsigned(number));
        for (int kind : {0, 1}) {
          const auto first = all.begin() + ptrdiff_t(kind) * kKvHeads * kDim;
          rows[kind].emplace_back(first, first + kKvHeads * kDim);
        }
        queries.insert(queries.end(), all.end() - kHeads * kDim, all.end());
      }
    }
    const int n = int(cells.size());
    const auto sees = [&](int row, int64_t cell) {
      const auto it = owner_.find(cell);
      const auto& mine = owner_.at(cells[row]);
      return it != owner_.end() && it->second.first == mine.first && it->second.second <= mine.second;
    };
    for (Kind kind : {Kind::key, Kind::value}) {
      layer_->begin_write(kind, cells);
      for (int i = 0; i < n; i++) {
        std::vector<uint16_t> row;
        for (float x : rows[int(kind)][i]) row.push_back(float_to_half(x));
        layer_->write_row(kind, i, row.data());
      }
    }
    layer_->settle(sees);
    exact_.clear();
    for (const Window::Row& row : layer_->window().rows()) {
      const auto it = owner_.find(row.cell);
      if (!row.in_flight && it != owner_.end()) exact_.insert(it->second);
    }

    AttentionProblem p;
    p.n_heads = kHeads;
    p.n_streams = n_streams_;
    p.n_tokens = n / n_streams_;
    p.n_cells = kCells;
    p.value_dim = kDim;
    p.q = queries.data();
    p.q_head = kDim;
    p.q_token = size_t(kHeads) * kDim;
    p.q_stream = p.q_token * p.n_tokens;
    std::vector<float> out(size_t(n) * kHeads * kDim, NAN);
    p.out = out.data();
    p.out_head = p.q_head;
    p.out_token = p.q_token;
    p.out_stream = p.q_stream;
    std::vector<uint16_t> mask;
    for (int i = 0; i < n; i++) {
      const int64_t first = cells[i] / kCells * kCells;
      for (int64_t cell = first; cell < first + kCells; cell++) mask.push_back(sees(i, cell) ? 0 : 0xfc00);
    }
    p.mask = mask.data();
    p.mask_token = kCells;
    p.mask_stream = size_t(kCells) * p.n_tokens;
    p.scale = 1 / std::sqrt(float(kDim));
    layer_->begin_commit(sees, {p.q, kHeads, kDim, p.n_tokens, p.q_token, p.q_head, p.q_stream});
    attention_.prepare(*layer_, p, {shape_.top, false}, 1, shape_.kernels());
    layer_->code_leaving(0, 1);
    if (attention_.retrieves()) attention_.retrieve(0);
    attention_.attend(0);
    layer_->end_commit();

    std::vector<std::vector<float>> outputs;
    for (int i = 0; i < n; i++) {
      outputs.emplace_back(out.begin() + ptrdiff_t(i) * kHeads * kDim, out.begin() + ptrdiff_t(i + 1) * kHeads * kDim);
    }
    return outputs;
  }

  void take_back(int sequence, int n) {
    const int end = length_[sequence] -= n;
    std::erase_if(owner_,
                  [&](const auto& entry) { return entry.second.first == sequence && entry.second.second >= end; });
  }

  /// Sequence and position of the cells that the last batch found exact.
  const std::set<std::pair<int, int>>& exact() const { return exact_; }

private:
  int64_t free_cell(int stream) const {
    int64_t cell = int64_t(stream) * kCells;
    while (owner_.count(cell)) cell++;
    return cell;
  }

  Shape shape_;
  int n_streams_;
  std::vector<uint8_t> memory_[2];
  std::unique_ptr<CacheLayer> layer_;
  Attention attention_;
  std::map<int64_t, std::pair<int, int>> owner_;  // sequence, position
  std::map<int, int> length_;
  std::set<std::pair<int, int>> exact_;
};

int number_of(int sequence, int position) {
  return 1 + 10000 * sequence + position;
}

double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0, size = 0;
  for (size_t i = 0; i < a.size(); i++) {
    error += std::pow(double(a[i]) - b[i], 2);
    size += std::pow(double(a[i]), 2);
  }
  return error / size;
}

// Decodes 150 tokens of each sequence in batches of 1 to 16 tokens of a sequence, of which some are taken back.
void expect_as_alone(const Shape& shape, unsigned seed) {
  const int end = kPrompt + 150;
  const double bound = shape.shares_stream() ? 1e-9 : 1e-12;
  Decoder alone(shape), together(shape);
  std::vector<std::vector<int>> prompts(shape.n_sequences);
  for (int s = 0; s < shape.n_sequences; s++) {
    for (int p = 0; p < kPrompt; p++) prompts[s].push_back(number_of(s, p));
  }
  alone.run(prompts);
  together.run(prompts);
  std::map<int, std::vector<std::vector<float>>> expected;  // by position: of each sequence
  std::map<int, std::set<std::pair<int, int>>> exact;
  for (int p = kPrompt; p < end; p++) {
    std::vector<std::vector<int>> tokens(shape.n_sequences);
    for (int s = 0; s < shape.n_sequences; s++) tokens[s] = {number_of(s, p)};
    expected[p] = alone.run(tokens);
    exact[p] = alone.exact();
  }

  std::mt19937 random(seed);
  std::vector<int> at(shape.n_sequences, kPrompt);
  double worst = 0;
  while (*std::min_element(at.begin(), at.end()) < end) {
    std::vector<std::vector<int>> tokens(shape.n_sequences);
    std::vector<int> right(shape.n_sequences), wrong(shape.n_sequences);
    const int n_of_all = 1 + int(random() % 16);
    for (int s = 0; s < shape.n_sequences; s++) {
      const int n = shape.unified ? 1 + int(random() % 16) : n_of_all;
      right[s] = std::min(1 + int(random() % n), end - at[s]);
      wrong[s] = n - right[s];
      if (right[s] == 0 && shape.unified) continue;
      for (int i = 0; i < right[s]; i++) tokens[s].push_back(number_of(s, at[s] + i));
      for (int i = 0; i < wrong[s]; i++) tokens[s].push_back(int(1000000 + random() % 1000000));
    }
    const std::vector<std::vector<float>> outputs = together.run(tokens);
    size_t first = 0;
    for (int s = 0; s < shape.n_sequences; s++) {
      const auto of_sequence = [&](const std::set<std::pair<int, int>>& all) {
        std::set<int> positions;
        for (const auto& [sequence, position] : all) {
          if (sequence == s) positions.insert(position);
        }
        return positions;
      };
      if (right[s] > 0) {
        ASSERT_EQ(of_sequence(together.exact()), of_sequence(exact[at[s]])) << s << " at " << at[s];
      }
      for (int i = 0; i < right[s]; i++) {
        const double error = difference(expected[at[s] + i][s], outputs[first + i]);
        worst = std::max(worst, error);
        ASSERT_LT(error, bound) << "sequence " << s << ", token " << i << " of " << right[s] << " at " << at[s];
      }
      first += tokens[s].size();
      if (tokens[s].empty()) continue;
      together.take_back(s, wrong[s]);
      at[s] += right[s];
    }
  }
  std::printf("%g bits, top %d, %d sequences: squared error %.1e at most\n", shape.bits, shape.top, shape.n_sequences,
              worst);
}

class Drafts : public testing::TestWithParam<double> {};

TEST_P(Drafts, OfASequence) {
  for (unsigned seed = 0; seed < 4; seed++) expect_as_alone({.bits = GetParam()}, seed);
}

TEST_P(Drafts, OfSequencesThatShareAStream) {
  expect_as_alone({.bits = GetParam(), .n_sequences = 3}, 1);
}

TEST_P(Drafts, OfStreams) {
  expect_as_alone({.bits = GetParam(), .n_sequences = 2, .unified = false}, 1);
}

TEST_P(Drafts, WithRetrieval) {
  const WindowSize window{32, 0, 0, 16};
  for (unsigned seed = 0; seed < 4; seed++) {
    expect_as_alone({.bits = GetParam(), .window = window, .top = 16}, seed);
  }
  expect_as_alone({.bits = GetParam(), .window = window, .top = 16, .n_sequences = 3}, 1);
}

// Cells that wait may be more than the window's last, and tokens may leave with others of their batch.
TEST_P(Drafts, WithASmallWindow) {
  expect_as_alone({.bits = GetParam(), .window = {4, 2, 1, 16}}, 1);
}

INSTANTIATE_TEST_SUITE_P(, Drafts, testing::Values(4.0, 2.0, 1.0));

}  // namespace
}  // namespace thimble
