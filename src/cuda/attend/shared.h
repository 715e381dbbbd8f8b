// Decode attention: a thread block's shared memory.
//
// The kernels get at a member by its place, simt::shared_at<its type, offsetof(Shared, its name)>(), or, where they
// count in bytes, by simt::shared() + offsetof(...): indexing a struct's members compiles to other and more
// instructions.
//
// Two tables take most of it. The keys' table is used up when the warps' results are added up, so the results go in its
// place. Arrays have one dimension, with their shape beside them, so that an address is one product and one sum.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/attend/shape.h"
#include "cuda/layout.h"

namespace thimble::cuda {

/// The blocks of 64 cells that a warp takes of one item of a batch: `index` is the first; every n-th follows, n being
/// the number of warps that share the item; `left` is how many there are.
struct alignas(16) CellBlocks {
  const uint8_t *keys, *values;
  int batch, index, left, padding;
};
static_assert(sizeof(CellBlocks) == 32);

/// An array that only some shapes have.
template <bool Has, typename T, int N>
struct ArrayIf {
  alignas(16) T data[N];
};
template <typename T, int N>
struct ArrayIf<false, T, N> {};

template <typename S>
struct AttendShared {
  static constexpr int kQueryRows = S::kSlots * S::kRows, kRowFloats = kQueryRows * S::kHeadDim;
  static constexpr int kSumStride = S::kHeadDim + 8;  // floats; keeps warps' rows in different banks
  /// Whether outputs have memory of their own, so that the next item's table need not wait for their readers.
  static constexpr bool kOwnOutputs = S::kLarge && S::kSlots == 1;

  /// What warps leave for one another, in the place of the keys' table.
  struct Results {
    float sums[S::kWarps * S::kRows * kSumStride];  // [warp][row][kSumStride]; products with matrices take this place
    float states[S::kWarps * 2 * S::kRows];         // [warp][maximum, weight][row]
    union {
      uint16_t split_queries[2 * kRowFloats];             // f16 [slot][2][row][D], while exact rows are attended to
      float outputs[(kOwnOutputs ? 1 : 2) * kRowFloats];  // see coded_outputs
    };
  };
  static constexpr size_t kFrontBytes = std::max(size_t(S::kKeyTableBytes), (sizeof(Results) + 1023) / 1024 * 1024);

  union {
    uint8_t key_table[kFrontBytes];
    Results results;
  };
  uint8_t value_table[S::kValueTableBytes];
  float queries[kRowFloats];  // [slot][row][D]: as the model wrote them, then transformed
  float value_scales[S::kValueSubspaces], key_scales[S::kKeySubspaces];  // of the head's codewords
  CellBlocks next_blocks[S::kWarps];                                     // where each warp goes on
  // Of query rows, [slot][row]:
  float factors[kQueryRows];        // from sums of table entries to logits in units of log2 e
  float offsets[kQueryRows];        // what the logits of all coded cells lack, in these units
  float coded_weights[kQueryRows];  // the share of all weight that coded cells have
  float slopes[S::kRows];           // on the mask, in units of log2 e
  [[no_unique_address]] ArrayIf<!S::kDirect, uint32_t, S::kSlots * S::kWarps * S::kRows>
      greatest_products;    // [slot][warp][row], bits of floats: for score tables of bytes
  alignas(16) int is_last;  // whether this thread block is the last one of a stream's splits
  // The mask, the hidden cells' bits and the scales of each warp's block of 64 cells, on their way from global memory.
  [[no_unique_address]] ArrayIf<S::kStaged, uint8_t, S::kWarps * 32 * 16> masks;         // [warp][lane][16]
  [[no_unique_address]] ArrayIf<S::kStaged, uint32_t, S::kWarps * 32> hidden;            // [warp][lane]
  [[no_unique_address]] ArrayIf<S::kStagesScales, uint8_t, S::kWarps * 2 * 128> scales;  // f16 [warp][keys, values][64]
  [[no_unique_address]] ArrayIf<kOwnOutputs, float, 2 * kRowFloats> own_outputs;         // see coded_outputs

  // Places of the outputs of coded cells and of exact rows, float [slot][row][D] each, before the values' transform is
  // undone. Where memory is short they lie behind the warps' sums, and the next item's table must wait until they are
  // read. Those of many items take the place of the queries.
  THIMBLE_HOST_DEVICE static constexpr size_t coded_outputs() {
    return S::kDirect    ? offsetof(AttendShared, queries)
           : kOwnOutputs ? offsetof(AttendShared, own_outputs)
                         : offsetof(AttendShared, results.outputs);
  }
  THIMBLE_HOST_DEVICE static constexpr size_t exact_outputs() {
    return S::kDirect ? offsetof(AttendShared, results.outputs) : coded_outputs() + kRowFloats * sizeof(float);
  }
};

/// Bytes of shared memory that a kernel of this shape is launched with.
template <typename S>
constexpr size_t shared_bytes() {
  using Shared = AttendShared<S>;
  static_assert(offsetof(Shared, key_table) == 0 && offsetof(Shared, value_table) % 1024 == 0);
  static_assert(offsetof(Shared, queries) == offsetof(Shared, value_table) + size_t(S::kValueTableBytes));
  static_assert(offsetof(Shared, next_blocks) % 32 == 0 && offsetof(Shared, factors) % 16 == 0);
  static_assert(offsetof(Shared, is_last) % 16 == 0 && sizeof(typename Shared::Results) <= Shared::kFrontBytes);
  constexpr size_t kBytes = sizeof(Shared), kHopper = 227 * 1024, kSm86 = 99 * 1024;
  static_assert(kBytes % 16 == 0 && kBytes <= kHopper && (S::kLarge || S::kHeadDim == 256 || kBytes <= kSm86));
  return kBytes;
}

}  // namespace thimble::cuda
