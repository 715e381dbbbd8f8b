// A layer of a coded cache with random contents, and a team of threads that attends to it: what the benchmarks of the
// CPU's attention share.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>

#include "attention/attention.h"
#include "codec/half.h"
#include "support/random.h"

namespace thimble {

struct Shape {
  int head_dim, group, n_kv_heads;
  int64_t n_cells = 0;
  int n_tokens = 1;
  int latent = 0;  // of the head's numbers, those that are the value too (MLA); 0: values are of their own
  int value_dim() const { return latent > 0 ? latent : head_dim; }
  int n_heads() const { return n_kv_heads * group; }
};

// 64k Gaussian numbers, which benchmarks repeat as they need more.
inline const std::vector<float>& noise() {
  static const std::vector<float> numbers = gaussian(1 << 16, 1);
  return numbers;
}

/// A store for a side of the layer: in RAM, or in a file in `directory`. Every row is written.
inline std::unique_ptr<ExactStore> random_store(const Shape& s, const std::string& directory, unsigned seed) {
  const size_t row_size = size_t(s.n_kv_heads) * s.head_dim;
  auto store =
      directory.empty() ? ExactStore::ram(s.n_cells, row_size) : ExactStore::file(directory, s.n_cells, row_size);
  std::vector<uint16_t> halves(noise().size());
  std::transform(noise().begin(), noise().end(), halves.begin(), float_to_half);
  std::minstd_rand random(seed);
  for (int64_t row = 0; row < s.n_cells; row++) {
    if (!store->reserve(row)) throw std::runtime_error("no room for the store");
    std::copy_n(&halves[random() % (halves.size() - row_size)], row_size, store->row(row));
  }
  return store;
}

inline Format format_of(Kind kind, const Shape& s, double bits) {
  if (s.latent == 0) return make_format(s.head_dim, bits);
  const Format latent = make_format(s.latent, bits);
  return kind == Kind::value ? latent
                             : make_position_format(s.head_dim - s.latent, latent,
                                                    size_t(s.head_dim / 64 * make_format(64, bits).vector_bytes()));
}

inline CacheSide random_side(Kind kind, const Shape& s, double bits, int n_slots, std::vector<uint8_t>& memory,
                             std::unique_ptr<ExactStore> store) {
  const CacheShape shape{s.n_kv_heads, s.n_cells, 1};
  auto codecs =
      std::make_shared<std::vector<HeadCodec>>(s.n_kv_heads, make_uncalibrated_codec(kind, format_of(kind, s, bits)));
  memory.resize(CacheSide::memory_bytes(shape, codecs->front().format, n_slots) + 64);
  void* begin = memory.data();
  size_t size = memory.size();
  std::align(64, size - 64, begin, size);
  CacheSide side(shape, codecs, n_slots, static_cast<uint8_t*>(begin), std::move(store));
  // Random codes, and scales such as those of Gaussian vectors.
  const Format& format = side.format();
  std::minstd_rand random(int(kind) + 1);
  for (int head = 0; head < s.n_kv_heads; head++) {
    for (int64_t cell = 0; cell < s.n_cells; cell += kBlockCells) {
      uint8_t* block = side.block(head, cell);
      if (format.f16) {
        for (size_t i = 0; i < format.block_bytes(); i += 2) {
          const uint16_t h = float_to_half(noise()[random() % noise().size()]);
          std::memcpy(block + i, &h, 2);
        }
        continue;
      }
      for (size_t i = 0; i < format.codes_bytes(); i++) block[i] = uint8_t(random() >> 8);
      for (int i = 0; i < kBlockCells; i++) {
        const uint16_t h = float_to_half(0.9f + 0.2f * float(random() % 1000) / 1000);
        std::memcpy(block + format.codes_bytes() + 2 * i, &h, 2);
      }
    }
  }
  return side;
}

/// With `top`, cells are retrieved for each query from an exact store, which is in RAM or in a file in `directory`.
class Ours {
public:
  Ours(const Shape& s, double bits, int n_threads, const Kernels& kernels, int top = 0,
       const std::string& directory = {})
      : shape_(s),
        n_threads_(n_threads),
        kernels_(kernels),
        retrieval_{top, false},
        q_(gaussian(size_t(s.n_heads()) * s.n_tokens * s.head_dim, 2)),
        out_(size_t(s.n_heads()) * s.n_tokens * s.value_dim()),
        mask_(size_t(s.n_cells) * s.n_tokens) {
    WindowSize window;
    if (top > 0) window = {.last = window.last, .pool = 0, .spare = 0};  // as in CpuCache
    const auto side = [&](Kind kind) {
      return random_side(kind, s, bits, top > 0 ? 0 : window.total(), memory_[int(kind)],
                         top > 0 ? random_store(s, directory, 3 + unsigned(kind)) : nullptr);
    };
    layer_ = std::make_unique<CacheLayer>(side(Kind::key), side(Kind::value), Window(window, window.total(), s.n_cells),
                                          s.latent > 0);
    // Fills the window, all but the token in flight.
    write(s.n_cells - s.n_tokens - window.total(), window.total());
    layer_->commit([](int, int64_t) { return true; });
    write(s.n_cells - s.n_tokens, s.n_tokens);

    p_.n_heads = s.n_heads();
    p_.n_tokens = s.n_tokens;
    p_.n_cells = s.n_cells;
    p_.value_dim = s.value_dim();
    p_.q = q_.data();
    p_.q_token = s.head_dim;
    p_.q_head = size_t(s.head_dim) * s.n_tokens;
    p_.out = out_.data();
    p_.out_head = s.value_dim();
    p_.out_token = size_t(s.value_dim()) * s.n_heads();
    p_.mask = mask_.data();
    p_.mask_token = s.n_cells;
    p_.scale = 1 / std::sqrt(float(s.head_dim));
    for (int t = 0; t < s.n_tokens; t++) {
      for (int64_t i = s.n_cells - s.n_tokens + t + 1; i < s.n_cells; i++) mask_[t * s.n_cells + i] = 0xfc00;
    }
  }

  void step() {
    attention_.prepare(*layer_, p_, retrieval_, n_threads_, kernels_);
    if (attention_.retrieves()) {
      all([this](int thread) { attention_.retrieve(thread); });
    }
    all([this](int thread) { attention_.attend(thread); });
  }
  /// Other queries choose other cells.
  void new_queries(unsigned seed) { std::ranges::copy(gaussian(q_.size(), seed), q_.begin()); }
  const CacheLayer& layer() const { return *layer_; }
  const std::vector<float>& out() const { return out_; }

private:
  void write(int64_t first, int n) {
    std::vector<int64_t> cells;
    for (int i = 0; i < n; i++) cells.push_back(std::max<int64_t>(0, first) + i);
    for (Kind kind : {Kind::key, Kind::value}) {
      std::vector<uint16_t> row(layer_->side(kind).row_size());
      layer_->begin_write(kind, cells);
      for (int i = 0; i < n; i++) {
        for (size_t d = 0; d < row.size(); d++) row[d] = float_to_half(noise()[(i * 977 + d) % noise().size()]);
        layer_->write_row(kind, i, row.data());
      }
    }
  }

  // Threads of our own. They spin while they wait, as ggml's do, but only for a while, as other processes may need the
  // cores.
  static constexpr int kSpins = 20000;
  void all(const std::function<void(int)>& work) {
    if (n_threads_ == 1) return work(0);
    if (team_.empty()) {
      for (int i = 1; i < n_threads_; i++) {
        team_.emplace_back([this, i](std::stop_token stop) {
          for (int seen = 0, idle = 0; !stop.stop_requested();) {
            const int now = round_.load(std::memory_order_acquire);
            if (now == seen) {
              if (++idle > kSpins) std::this_thread::yield();
              continue;
            }
            idle = 0;
            seen = now;
            (*work_)(i);
            done_.fetch_add(1, std::memory_order_acq_rel);
          }
        });
      }
    }
    work_ = &work;
    done_.store(0);
    round_.fetch_add(1, std::memory_order_acq_rel);
    work(0);
    for (int idle = 0; done_.load(std::memory_order_acquire) < n_threads_ - 1;) {
      if (++idle > kSpins) std::this_thread::yield();
    }
  }

  Shape shape_;
  int n_threads_;
  const Kernels& kernels_;
  Retrieval retrieval_;
  std::vector<uint8_t> memory_[2];
  std::unique_ptr<CacheLayer> layer_;
  std::vector<float> q_, out_;
  std::vector<uint16_t> mask_;
  AttentionProblem p_;
  Attention attention_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<int> round_{0}, done_{0};
  std::vector<std::jthread> team_;
};

}  // namespace thimble
