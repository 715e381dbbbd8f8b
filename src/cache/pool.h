// Which cells matter most, and so stay exact when they are no longer among the last: those that queries attend to from
// any distance, such as the first token and delimiters (sinks). Coding the keys of these few cells does more harm than
// coding all others.
//
// A cell's score is the greatest over the query heads of
//   z = (q.k - mean) / deviation
// with q the mean of the batch's queries and k the cell's key, both as attention multiplies them; mean and deviation
// are those of q.k over the sequence's last cells. The rule was found by experiment (docs/experiments/quality.md). A
// score needs nothing but rows and queries, so a cache that loads a state goes on as if it had never been saved.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace thimble {

/// The queries of a batch, f32: head h of row r (token r % n_tokens of stream r / n_tokens) at
/// data + h * head + (r % n_tokens) * token + (r / n_tokens) * stream, `dim` numbers. Strides count elements.
struct BatchQueries {
  const float* data = nullptr;
  int n_heads = 0;
  int dim = 0;
  int64_t n_tokens = 0;
  size_t token = 0, head = 0, stream = 0;

  const float* row(int64_t r, int h) const {
    return data + size_t(h) * head + size_t(r % n_tokens) * token + size_t(r / n_tokens) * stream;
  }
};

/// The mean of some rows' queries, at most 64 of them: [n_heads][dim].
std::vector<float> mean_query(const BatchQueries& queries, std::span<const int> rows);

/// Writes the score of each of `cells` to `scores`. `cells` and `recent` (the sequence's last cells) are keys as the
/// model wrote them, rows of [n_kv_heads][dim] f16; `query` is [n_heads][dim]. A score that is not a number becomes
/// -inf.
void score_cells(std::span<const float> query, int n_heads, int n_kv_heads, int dim,
                 std::span<const uint16_t* const> cells, std::span<const uint16_t* const> recent,
                 std::span<float> scores);

}  // namespace thimble
