// An emulation of simt.h on the host, with which tests run the kernels' own source. Every thread of a block is a fiber;
// a warp's collective operation waits until its 32 fibers have called it. Blocks run one after the other, in one
// thread.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "codec/half.h"
#include "cuda/simt/fiber.h"

#define SIMT inline
#define SIMT_CALL inline
#define SIMT_UNROLL
#define SIMT_UNROLL_BY(n)
#define SIMT_NO_UNROLL

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) {
  return {x, y};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

namespace thimble::cuda::simt {

/// Runs blocks of `threads` fibers (a multiple of 32).
class Machine {
public:
  struct Slot {  // the words that a lane shows its warp; of two rounds, as some lanes may still read the last round's
    uint32_t word[2][12];
  };

  static Machine*& current() {
    static thread_local Machine* machine = nullptr;
    return machine;
  }

  struct Grid {
    int x = 1, y = 1, z = 1;  // blocks
  };

  /// Runs `body` once for every thread of every block of a grid.
  /// Throws std::logic_error where some threads of a warp or block wait for others that have ended.
  static void launch(Grid grid, int threads, size_t shared_bytes, const std::function<void()>& body) {
    Machine machine(threads, shared_bytes, body);
    current() = &machine;
    machine.blocks_x = grid.x;
    for (int i = 0; i < grid.x * grid.y * grid.z; i++) {
      machine.block_x = i % grid.x;
      machine.block_y = i / grid.x % grid.y;
      machine.block_z = i / grid.x / grid.y;
      machine.run_block();
    }
    current() = nullptr;
  }

  int thread = 0, threads, block_x = 0, block_y = 0, block_z = 0, blocks_x = 1;
  uint8_t* shared = nullptr;

  void sync() {
    block_arrived_++;
    const int round = block_round_;
    if (block_arrived_ == threads) {
      block_arrived_ = 0;
      block_round_++;
      count_result_ = std::exchange(count_, 0);
      progress_++;
    }
    while (block_round_ == round) yield();
  }

  /// Of how many threads of the block x holds.
  int count(bool x) {
    count_ += x;
    sync();
    return count_result_;
  }

  /// Shows `n` words to the warp and waits until all 32 lanes have. Returns the warp's first slot and which half holds
  /// this round's words.
  std::pair<const Slot*, int> exchange(const uint32_t* words, int n) {
    Warp& warp = warps_[thread / 32];
    const int half = warp.round & 1, round = warp.round;
    std::copy_n(words, n, slots_[thread].word[half]);
    if (++warp.arrived == 32) {
      warp.arrived = 0;
      warp.round++;
      progress_++;
    }
    while (warp.round == round) yield();
    return {&slots_[thread / 32 * 32], half};
  }

private:
  struct Warp {
    int arrived = 0, round = 0;
  };
  struct Thread {
    Fiber fiber;
    bool done = false;
  };

  Machine(int n, size_t shared_bytes, const std::function<void()>& body)
      : threads(n), body_(body), fibers_(n), slots_(n), warps_(n / 32) {
    memory_.resize(shared_bytes + 1024);
    shared = memory_.data() + (1024 - reinterpret_cast<uintptr_t>(memory_.data()) % 1024) % 1024;
  }

  void run_block() {
    std::fill(memory_.begin(), memory_.end(), uint8_t{0xcd});  // shared memory is not cleared between blocks
    for (Thread& each : fibers_) {
      each.done = false;
      each.fiber.begin(&Machine::start);
    }
    for (int left = threads; left > 0;) {
      const long before = progress_;
      const int left_before = left;
      for (int i = 0; i < threads; i++) {
        if (fibers_[i].done) continue;
        thread = i;
        scheduler_.switch_to(fibers_[i].fiber);
        if (fibers_[i].done) left--;
      }
      if (progress_ == before && left == left_before) throw std::logic_error("threads wait for others in vain");
    }
  }

  static void start() {
    Machine& machine = *current();
    const int self = machine.thread;
    machine.body_();
    machine.fibers_[self].done = true;
    machine.fibers_[self].fiber.switch_to(machine.scheduler_);
  }

  void yield() {
    const int self = thread;
    fibers_[self].fiber.switch_to(scheduler_);
    thread = self;
  }

  const std::function<void()>& body_;
  std::vector<Thread> fibers_;
  std::vector<Slot> slots_;
  std::vector<Warp> warps_;
  std::vector<uint8_t> memory_;
  Fiber scheduler_;
  int block_arrived_ = 0, block_round_ = 0;
  int count_ = 0, count_result_ = 0;
  long progress_ = 0;
};

inline int thread() {
  return Machine::current()->thread;
}
inline int thread_again() {
  return thread();
}
template <typename T>
void keep(T&) {}
inline uint32_t after(uint32_t) {
  return 0;
}
inline int block_x() {
  return Machine::current()->block_x;
}
inline int block_y() {
  return Machine::current()->block_y;
}
inline int block_z() {
  return Machine::current()->block_z;
}
inline int blocks_x() {
  return Machine::current()->blocks_x;
}
inline uint8_t* shared() {
  return Machine::current()->shared;
}
template <typename T, int Offset>
T* shared_at() {
  return reinterpret_cast<T*>(shared() + Offset);
}
inline uint32_t shared_address() {
  return 0;
}
template <typename T>
T load_shared(uint32_t address) {
  return *reinterpret_cast<const T*>(shared() + address);
}
inline void sync() {
  Machine::current()->sync();
}
inline bool any_in_block(bool x) {
  return Machine::current()->count(x) > 0;
}
inline int count_in_block(bool x) {
  return Machine::current()->count(x);
}

template <typename T>
uint32_t to_word(T x) {
  static_assert(sizeof(T) == 4);
  return std::bit_cast<uint32_t>(x);
}
template <typename T>
T shuffle(T x, int lane) {
  const uint32_t word = to_word(x);
  const auto [slots, half] = Machine::current()->exchange(&word, 1);
  return std::bit_cast<T>(slots[lane & 31].word[half][0]);
}
template <typename T>
T shuffle_xor(T x, int mask) {
  return shuffle(x, (thread() & 31) ^ mask);
}
inline double shuffle_xor(double x, int mask) {
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  const uint32_t words[2] = {uint32_t(bits), uint32_t(bits >> 32)};
  const auto [slots, half] = Machine::current()->exchange(words, 2);
  const auto& other = slots[(thread() & 31) ^ mask].word[half];
  return std::bit_cast<double>(uint64_t(other[1]) << 32 | other[0]);
}
inline uint32_t ballot(bool x) {
  const uint32_t word = x;
  const auto [slots, half] = Machine::current()->exchange(&word, 1);
  uint32_t r = 0;
  for (int i = 0; i < 32; i++) r |= slots[i].word[half][0] << i;
  return r;
}
inline bool any(bool x) {
  return ballot(x) != 0;
}
inline int popcount(uint32_t x) {
  return std::popcount(x);
}
inline void sync_warp() {
  ballot(false);
}
inline uint32_t max_of_warp(uint32_t x) {
  for (int mask = 1; mask < 32; mask *= 2) x = std::max(x, shuffle_xor(x, mask));
  return x;
}

inline int atomic_add(int* p, int x) {
  const int old = *p;
  *p += x;
  return old;
}
inline int atomic_add_ordered(int* p, int x) {
  return atomic_add(p, x);
}
inline void atomic_or(uint32_t* p, uint32_t x) {
  *p |= x;
}
inline void atomic_and(uint32_t* p, uint32_t x) {
  *p &= x;
}
inline void atomic_max(uint32_t* p, uint32_t x) {
  *p = std::max(*p, x);
}
inline void launch_dependents() {}
inline void wait_for_previous_grid() {}

inline uint32_t multiply_high(uint32_t a, uint32_t b) {
  return uint32_t(uint64_t(a) * b >> 32);
}
inline uint32_t scale_byte(uint32_t bytes, int i, uint32_t stride, uint32_t base) {
  return base + stride * (bytes >> (8 * i) & 255);
}
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t pick = selector >> (4 * i) & 15;
    uint32_t byte = uint32_t(bytes >> (8 * (pick & 7))) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << (8 * i);
  }
  return r;
}
inline float exp2_fast(float x) {
  return std::exp2(x);
}
inline float reciprocal_fast(float x) {
  return 1.0f / x;
}
inline float max_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? std::numeric_limits<float>::quiet_NaN() : std::max(a, b);
}
inline float fma_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline float add_rn(float a, float b) {
  return a + b;
}
inline float sub_rn(float a, float b) {
  return a - b;
}
inline float mul_rn(float a, float b) {
  return a * b;
}
inline float div_rn(float a, float b) {
  return a / b;
}
inline float sqrt_rn(float a) {
  return std::sqrt(a);
}
inline float bits_to_float(uint32_t x) {
  return std::bit_cast<float>(x);
}
inline uint32_t float_to_bits(float x) {
  return std::bit_cast<uint32_t>(x);
}
inline float half_to_float(uint16_t x) {
  return thimble::half_to_float(x);
}
inline uint16_t float_to_half(float x) {
  return thimble::float_to_half(x);
}
inline float2 unpack_half2(uint32_t x) {
  return {half_to_float(uint16_t(x)), half_to_float(uint16_t(x >> 16))};
}
inline uint32_t pack_half2(float low, float high) {
  return uint32_t(float_to_half(high)) << 16 | float_to_half(low);
}
inline uint32_t subtract_halves(uint32_t a, uint32_t b) {
  const float2 x = unpack_half2(a), y = unpack_half2(b);
  return pack_half2(x.x - y.x, x.y - y.y);
}
inline uint32_t multiply_halves(uint32_t a, uint32_t b) {
  const float2 x = unpack_half2(a), y = unpack_half2(b);
  return pack_half2(x.x * y.x, x.y * y.y);
}
inline uint2 load_stream_8(const uint8_t* p) {
  uint2 r;
  std::memcpy(&r, p, 8);
  return r;
}
inline uint4 load_stream(const uint8_t* p) {
  uint4 r;
  std::memcpy(&r, p, 16);
  return r;
}
inline uint4 load_vector(const void* p) {
  uint4 r;
  std::memcpy(&r, p, 16);
  return r;
}
inline uint2 load_8(const void* p) {
  uint2 r;
  std::memcpy(&r, p, 8);
  return r;
}
inline void prefetch_line(const uint8_t*) {}
template <int Bytes>
void prefetch_l2(const uint8_t*, uint32_t, int) {}
template <int Bytes>
void copy_async(void* shared_to, const void* from) {
  std::memcpy(shared_to, from, Bytes);
}
inline void wait_for_copies() {}
template <typename T>
T load_constant(const T* p) {
  return *p;
}
template <typename T>
T load_l2(const T* p) {
  return *p;
}

// The fragments, after the PTX manual: (g, t) = (lane / 4, lane % 4); a0 holds row g, a1 row g + 8, both in the first
// half of the columns, a2 and a3 the same rows in the second; b0 and b1 the halves of column g; d0, d1 row g, d2, d3
// row g + 8, columns 2t and 2t + 1.
template <typename T, int Depth, typename ElementA, typename ElementB>
void mma(T (&d)[4], const uint32_t (&operands)[6], ElementA element_a, ElementB element_b) {
  const auto [slots, half] = Machine::current()->exchange(operands, 6);
  const int lane = thread() & 31, g = lane / 4, t = lane % 4;
  constexpr int kPerWord = Depth / 8;
  for (int i = 0; i < 4; i++) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    T sum = d[i];
    for (int k = 0; k < Depth; k++) {
      const int second = k / (Depth / 2), owner = k % (Depth / 2) / kPerWord, part = k % kPerWord;
      const uint32_t a = slots[row % 8 * 4 + owner].word[half][second * 2 + row / 8];
      const uint32_t b = slots[column * 4 + owner].word[half][4 + second];
      sum += element_a(a, part) * element_b(b, part);
    }
    d[i] = sum;
  }
}
inline float half_of(uint32_t word, int i) {
  return half_to_float(uint16_t(word >> (16 * i)));
}
inline int signed_byte(uint32_t word, int i) {
  return int8_t(word >> (8 * i));
}
inline int unsigned_byte(uint32_t word, int i) {
  return uint8_t(word >> (8 * i));
}
inline void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  mma<float, 16>(d, {a0, a1, a2, a3, b0, b1}, half_of, half_of);
}
inline void mma_s8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  mma<int, 32>(d, {a0, a1, a2, a3, b0, b1}, signed_byte, signed_byte);
}
inline void mma_s8u8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  mma<int, 32>(d, {a0, a1, a2, a3, b0, b1}, signed_byte, unsigned_byte);
}

}  // namespace thimble::cuda::simt
