// What a prompt's dense attention needs besides decoded cells: the kernels' bodies. One writes the exact rows, those of
// the batch's tokens and of the window, to where attention reads them, keeps the tokens' rows until they are coded and
// what their queries say of the cells in question, and transforms the queries. Another puts kept rows into the window.
#pragma once

#include "cuda/encode/hadamard.h"
#include "cuda/encode/judge.h"
#include "cuda/simt/simt.h"
#include "cuda/types.h"

namespace thimble::cuda {

/// Grid [n_kv_heads][groups]: the means of queries, one each; then groups of kRows rows: of queries, tokens' keys and
/// values, then the window's. A Hadamard rotation takes a warp for a row and no shared memory; of a matrix, a thread
/// computes one component of all rows.
template <int HeadDim>
struct PromptKernel {
  static constexpr int D = HeadDim, kRows = 16, kThreads = D, kWarps = D / 32, N = D / 32;
  static constexpr size_t kSharedBytes = size_t(kRows) * D * sizeof(float);

  THIMBLE_HOST_DEVICE static int groups(int rows) { return (rows + kRows - 1) / kRows; }
  THIMBLE_HOST_DEVICE static int n_queries(const PromptArgs& a) {
    return a.queries.n_streams * a.queries.n_tokens * a.queries.group;
  }
  THIMBLE_HOST_DEVICE static int n_means(const PromptArgs& a) {
    return a.judge.means.data ? a.judge.n_batch_streams * a.judge.means.n_jobs * a.judge.group : 0;
  }
  THIMBLE_HOST_DEVICE static int n_groups(const PromptArgs& a) {
    return n_means(a) + groups(n_queries(a)) + 2 * groups(a.batch.n_tokens) + 2 * groups(a.n_window_rows);
  }

  /// Where a row comes from and what becomes of it; null: nothing.
  struct Row {
    const float* floats;
    const uint16_t* halves;
    float* out;
    uint16_t *staged, *dense;

    SIMT bool is_any() const { return floats || halves; }
  };

  struct Queries {
    const TransformArgs& a;
    int head;

    SIMT Row row(int i) const {
      const int token = i / a.group % a.n_tokens, stream = i / a.group / a.n_tokens;
      const int query_head = head * a.group + i % a.group;
      return {a.in + stream * a.stream_stride + token * a.token_stride + query_head * a.head_stride, nullptr,
              a.out + ((size_t(stream) * a.n_tokens + token) * a.n_kv_heads * a.group + query_head) * D, nullptr,
              nullptr};
    }
  };

  struct Tokens {
    const PromptArgs& a;
    bool is_key;
    int head;

    SIMT Row row(int i) const {
      const EncodeArgs& b = a.batch;
      const int64_t cell = b.cells[i];
      if (cell < 0 || !(is_key ? b.keys : b.values)) return {};
      const float* from = is_key ? b.keys + i * b.key_token_stride + head * b.key_head_stride
                                 : b.values + i * b.value_token_stride + head * b.value_head_stride;
      uint16_t* staged = is_key ? a.staged_keys : a.staged_values;
      return {from, nullptr, nullptr, staged + (size_t(head) * b.n_tokens + i) * D,
              dense(b, is_key, head, int(cell / b.cells_per_stream), int(cell % b.cells_per_stream))};
    }
  };

  struct WindowRow {
    const PromptArgs& a;
    bool is_key;
    int head;

    SIMT Row row(int i) const {
      const EncodeArgs& b = a.batch;
      i += a.first_window_row;
      const int cell = b.window_cells[i], stream = i / b.window.capacity;
      if (cell < 0) return {};
      const uint16_t* rows = is_key ? b.window.keys : b.window.values;
      uint16_t* to = dense(b, is_key, head, stream, cell);
      if (!to) return {};
      return {nullptr, rows + ((size_t(stream) * b.n_kv_heads + head) * b.window.capacity + i % b.window.capacity) * D,
              nullptr, nullptr, to};
    }
  };

  SIMT static uint16_t* dense(const EncodeArgs& b, bool is_key, int head, int stream, int cell) {
    const DenseRows& rows = b.dense;
    const int in_rows = stream - rows.first_stream;
    uint16_t* to = is_key ? rows.keys : rows.values;
    if (!to || in_rows < 0 || in_rows >= rows.n_streams || cell >= rows.n_cells) return nullptr;
    return to + ((size_t(in_rows) * b.n_kv_heads + head) * rows.n_cells + cell) * D;
  }

  SIMT static void run(const PromptArgs& a) {
    simt::launch_dependents();
    if (!a.early) simt::wait_for_previous_grid();
    if (is_idle(a)) return;  // most thread blocks of means: while they waited, they would keep others from starting
    write(a);
    // The next grid waits for this one alone, which must not end before one that it overtook.
    simt::wait_for_previous_grid();
  }

private:
  /// Whether this thread block is there for the mean of a job that its stream does not have. The first job's is never:
  /// it keeps queries.
  SIMT static bool is_idle(const PromptArgs& a) {
    if (simt::block_x() >= n_means(a)) return false;
    const int job = simt::block_x() / a.judge.group, number = job % a.judge.means.n_jobs;
    return number > 0 && number >= a.judge.list.n_jobs[a.judge.first_stream + job / a.judge.means.n_jobs];
  }

  SIMT static void write(const PromptArgs& a) {
    const int head = simt::block_y(), n_tokens = a.batch.n_tokens;
    int group = simt::block_x();
    if (group < n_means(a)) {
      const int n_jobs = a.judge.means.n_jobs, of_group = group % a.judge.group, job = group / a.judge.group;
      const JudgeQueries<kThreads> queries{a.judge, a.judge.first_stream + job / n_jobs, head};
      return queries.keep_mean(reinterpret_cast<int*>(simt::shared()), job % n_jobs, of_group);
    }
    group -= n_means(a);
    if (group < groups(n_queries(a))) {
      return transform(Queries{a.queries, head}, group * kRows, n_queries(a), {a.queries.codec.undo});
    }
    group -= groups(n_queries(a));
    const bool of_tokens = group < 2 * groups(n_tokens);
    if (!of_tokens) group -= 2 * groups(n_tokens);
    const int n = of_tokens ? n_tokens : a.n_window_rows;
    const bool is_key = group < groups(n);
    if (!is_key) group -= groups(n);
    const CodecTables& codec = is_key ? a.batch.key_codec : a.batch.value_codec;
    Change change;
    change.shift = is_key ? a.batch.dense.key_shift : a.batch.dense.value_shift;
    change.matrices = codec.forward;
    change.mean = codec.forward ? codec.mean : nullptr;
    change.is_none = a.is_restored[is_key ? 0 : 1];
    if (change.shift) change.shift += head * D;
    if (change.mean) change.mean += head * D;
    if (of_tokens) {
      transform(Tokens{a, is_key, head}, group * kRows, n, change);
    } else {
      transform(WindowRow{a, is_key, head}, group * kRows, n, change);
    }
  }

  /// What becomes of rows' numbers: their product with a head's matrix, or else the Hadamard rotation, or nothing.
  /// `mean` is subtracted before, `shift` added behind; null: none.
  struct Change {
    const float* matrices = nullptr;
    const float *mean = nullptr, *shift = nullptr;
    bool is_none = false;
  };

  /// Rows `first` to first + kRows - 1 of n.
  template <typename Rows>
  SIMT static void transform(const Rows& rows, int first, int n, const Change& change) {
    if (change.matrices) {
      multiply(rows, first, n, change.matrices + size_t(rows.head) * D * D, change.mean, change.shift);
    } else {
      rotate(rows, first, n, change);
    }
  }

  /// A number of a row that is rounded to f16 where it is kept as such.
  SIMT static float rounded(const Row& row, float x) {
    return row.out ? x : simt::half_to_float(simt::float_to_half(x));
  }

  template <typename Rows>
  SIMT static void multiply(const Rows& rows, int first, int n, const float* matrix, const float* mean,
                            const float* shift) {
    const int d = simt::thread();
    float* x = reinterpret_cast<float*>(simt::shared());  // [kRows][D]
    bool any = false;
    SIMT_NO_UNROLL
    for (int i = 0; i < kRows; i++) {
      const Row row = first + i < n ? rows.row(first + i) : Row{};
      float number = 0;
      if (row.is_any()) {
        any = true;
        number = row.halves ? simt::half_to_float(row.halves[d]) : rounded(row, row.floats[d]);
        if (row.staged) row.staged[d] = simt::float_to_half(number);
        if (mean) number -= simt::load_constant(mean + d);
      }
      x[i * D + d] = number;
    }
    simt::sync();
    if (!any) return;  // in all threads alike
    float y[kRows] = {};
    for (int k = 0; k < D; k++) {
      const float m = simt::load_constant(matrix + k * D + d);
      SIMT_UNROLL
      for (int i = 0; i < kRows; i++) y[i] += x[i * D + k] * m;
    }
    const float add = shift ? simt::load_constant(shift + d) : 0.0f;
    simt::wait_for_previous_grid();
    SIMT_UNROLL
    for (int i = 0; i < kRows; i++) {
      const Row row = first + i < n ? rows.row(first + i) : Row{};
      if (row.out) row.out[d] = y[i];
      if (row.dense) row.dense[d] = simt::float_to_half(y[i] + add);
    }
  }

  template <typename Rows>
  SIMT static void rotate(const Rows& rows, int first, int n, const Change& change) {
    constexpr int kTogether = kRows / kWarps < 4 ? kRows / kWarps : 4;
    const int lane = simt::thread() % 32;
    SIMT_NO_UNROLL
    for (int i = simt::thread() / 32 * kTogether; i < kRows; i += kWarps * kTogether) {
      Row row[kTogether];
      float v[kTogether][N];
      bool any = false;
      SIMT_UNROLL
      for (int r = 0; r < kTogether; r++) {
        row[r] = first + i + r < n ? rows.row(first + i + r) : Row{};
        any = any || row[r].is_any();
      }
      if (!any) continue;  // in all lanes alike
      SIMT_UNROLL
      for (int r = 0; r < kTogether; r++) {
        SIMT_UNROLL
        for (int k = 0; k < N; k++) v[r][k] = 0;
        if (row[r].floats) load(v[r], row[r].floats + lane * N);
        if (row[r].halves) load(v[r], row[r].halves + lane * N);
        SIMT_UNROLL
        for (int k = 0; k < N; k++) v[r][k] = rounded(row[r], v[r][k]);
        if (row[r].staged) store(row[r].staged + lane * N, v[r]);
      }
      if (!change.is_none) hadamard_warp<D>(v, lane);
      simt::wait_for_previous_grid();
      SIMT_UNROLL
      for (int r = 0; r < kTogether; r++) {
        if (row[r].out) store(row[r].out + lane * N, v[r]);
        SIMT_UNROLL
        for (int k = 0; k < N; k++) v[r][k] += change.shift ? simt::load_constant(change.shift + lane * N + k) : 0.0f;
        if (row[r].dense) store(row[r].dense + lane * N, v[r]);
      }
    }
  }

  SIMT static bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }
  template <typename T, int Size>
  struct alignas(sizeof(T) * Size) Vector {
    T x[Size];
  };

  /// A lane's numbers. The rows of a model begin at multiples of 16 bytes, but need not.
  SIMT static void load(float (&to)[N], const float* from) {
    constexpr int kSize = N < 4 ? N : 4;
    if (aligned(from, kSize * sizeof(float))) {
      SIMT_UNROLL
      for (int k = 0; k < N; k += kSize) {
        const auto v = *reinterpret_cast<const Vector<float, kSize>*>(from + k);
        SIMT_UNROLL
        for (int j = 0; j < kSize; j++) to[k + j] = v.x[j];
      }
    } else {
      SIMT_UNROLL
      for (int k = 0; k < N; k++) to[k] = from[k];
    }
  }
  SIMT static void store(float* to, const float (&from)[N]) {
    constexpr int kSize = N < 4 ? N : 4;
    SIMT_UNROLL
    for (int k = 0; k < N; k += kSize) {
      Vector<float, kSize> v;
      SIMT_UNROLL
      for (int j = 0; j < kSize; j++) v.x[j] = from[k + j];
      *reinterpret_cast<Vector<float, kSize>*>(to + k) = v;
    }
  }
  /// Rows of the cache's own memory.
  SIMT static void load(float (&to)[N], const uint16_t* from) {
    const auto pairs = *reinterpret_cast<const Vector<uint32_t, N / 2>*>(from);
    SIMT_UNROLL
    for (int k = 0; k < N; k += 2) {
      const float2 two = simt::unpack_half2(pairs.x[k / 2]);
      to[k] = two.x;
      to[k + 1] = two.y;
    }
  }
  SIMT static void store(uint16_t* to, const float (&from)[N]) {
    Vector<uint32_t, N / 2> pairs;
    SIMT_UNROLL
    for (int k = 0; k < N; k += 2) pairs.x[k / 2] = simt::pack_half2(from[k], from[k + 1]);
    *reinterpret_cast<Vector<uint32_t, N / 2>*>(to) = pairs;
  }
};

/// Puts the kept rows of tokens that stay into the windows, behind the coding of what leaves them. Grid [n_layers][KV
/// heads][keys, values][groups of kTokens tokens].
struct PlaceKernel {
  static constexpr int kThreads = 256, kWarps = kThreads / 32, kTokens = 64;
  static constexpr size_t kSharedBytes = 0;

  SIMT static void run(const LeaveArgs& a) {
    simt::launch_dependents();
    const StagedRows& staged = a.staged;
    const int part = simt::block_y() % 2, head = simt::block_y() / 2 % a.n_kv_heads;
    const int index = simt::block_y() / 2 / a.n_kv_heads;
    const EncodeArgs& layer = a.layers[index];
    const int dim = layer.head_dim, n_kv_heads = layer.n_kv_heads, capacity = layer.window.capacity;
    if (dim == 0 || head >= n_kv_heads || !staged.has(index, part == 0)) return;
    uint16_t* window = part == 0 ? layer.window.keys : layer.window.values;
    const int cells_per_stream = layer.cells_per_stream;
    simt::wait_for_previous_grid();
    const int first = simt::block_x() * kTokens, lane = simt::thread() % 32;
    SIMT_NO_UNROLL
    for (int i = first + simt::thread() / 32; i < first + kTokens && i < staged.n_tokens; i += kWarps) {
      const int slot = staged.slots[size_t(index) * staged.n_tokens + i];
      const int64_t cell = staged.cells[i];
      if (cell < 0 || slot < 0) continue;
      const uint16_t* from = staged.of(index, part == 0) + (size_t(head) * staged.n_tokens + i) * dim;
      uint16_t* to = window + ((size_t(cell / cells_per_stream) * n_kv_heads + head) * capacity + slot) * dim;
      for (int d = lane * 2; d < dim; d += 64) {
        *reinterpret_cast<uint32_t*>(to + d) = *reinterpret_cast<const uint32_t*>(from + d);
      }
    }
  }
};

}  // namespace thimble::cuda
