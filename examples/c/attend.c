/* Codes a cache of random keys and values, attends to it from the codes, and compares with attention over the very same
 * keys and values in float. Two sequences of different lengths share a pool of pages, as a server keeps them; their
 * last cells are attended to exactly. Fails where the error is beyond what the rate may cost.
 *
 * Usage: attend [bits]      16, 4, 3, 2, 1.5, 1.25 or 1; all of them when not said */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <thimble/thimble.h>

enum {
  kKvHeads = 2,
  kHeads = 6, /* query heads: three share a KV head */
  kDim = 64,
  kSequences = 2,
  kTokens = 8, /* queries of a sequence at once */
  kBlocks = 5, /* a sequence may have: 320 cells */
  kPages = 11, /* in the pool */
  kLast = 20,  /* cells of a sequence that stay exact */
  kRow = kKvHeads * kDim,
  kNumbers = kSequences * kTokens * kHeads * kDim, /* of all queries */
  kMaxCells = kBlocks * THIMBLE_BLOCK_CELLS
};

static const int64_t n_cells[kSequences] = {300, 150};
/* Pages of the pool that a sequence's blocks are in; -1 behind its last. */
static const int32_t block_table[kSequences * kBlocks] = {7, 2, 9, 0, 4, 10, 3, 5, -1, -1};

static void check(thimble_status status, const char* what) {
  if (status == THIMBLE_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, thimble_status_name(status), thimble_last_error());
  exit(1);
}

static void* memory(size_t bytes) {
  void* p = malloc(bytes);
  if (!p) {
    fprintf(stderr, "no memory\n");
    exit(1);
  }
  return p;
}

/* About Gaussian: the sum of 12 even ones. */
static float gaussian(void) {
  static uint32_t state = 1;
  float sum = -6;
  for (int i = 0; i < 12; i++) {
    state = state * 1664525u + 1013904223u;
    sum += (float)(state >> 8) / (float)(1 << 24);
  }
  return sum;
}

/* Rounds a number of normal size to what an f16 holds, and gives its bits. */
static uint16_t round_to_half(float* x) {
  uint32_t bits;
  memcpy(&bits, x, 4);
  bits = (bits + 0x0fff + ((bits >> 13) & 1)) & ~(uint32_t)0x1fff;
  if ((bits & 0x7fffffff) < 0x38800000) bits &= 0x80000000; /* too small: 0 */
  memcpy(x, &bits, 4);
  if ((bits & 0x7fffffff) == 0) return (uint16_t)(bits >> 16);
  return (uint16_t)(((bits >> 16) & 0x8000) | (((bits & 0x7fffffff) - 0x38000000) >> 13));
}

/* One side of the cache: its numbers, and the pool of pages that hold their codes. */
typedef struct {
  thimble_codec* codec;
  thimble_blocks blocks;
  float* numbers; /* [sequence][cell][KV head][dim] */
  uint16_t* half; /* the same in f16 */
} side;

static side make_side(thimble_context* context, thimble_kind kind, double bits) {
  const size_t n = (size_t)kSequences * kMaxCells * kRow;
  side s;
  s.numbers = memory(n * sizeof *s.numbers);
  s.half = memory(n * sizeof *s.half);
  for (size_t i = 0; i < n; i++) {
    s.numbers[i] = gaussian();
    s.half[i] = round_to_half(&s.numbers[i]);
  }
  thimble_codec_args codec = {.struct_size = sizeof codec};
  codec.kind = kind;
  codec.n_heads = kKvHeads;
  codec.head_dim = kDim;
  codec.bits = bits;
  check(thimble_codec_create(&codec, &s.codec), "making a codec");

  /* Pages: the blocks of all KV heads together. */
  const size_t block_bytes = thimble_codec_block_bytes(s.codec);
  s.blocks.n_blocks = kPages;
  s.blocks.head_stride = block_bytes;
  s.blocks.block_stride = kKvHeads * block_bytes;
  s.blocks.data = memory(kPages * s.blocks.block_stride);

  for (int sequence = 0; sequence < kSequences; sequence++) {
    int64_t in_memory[kMaxCells];
    for (int64_t cell = 0; cell < n_cells[sequence]; cell++) {
      const int64_t page = block_table[sequence * kBlocks + cell / THIMBLE_BLOCK_CELLS];
      in_memory[cell] = page * THIMBLE_BLOCK_CELLS + cell % THIMBLE_BLOCK_CELLS;
    }
    thimble_encode_args encode = {.struct_size = sizeof encode};
    encode.codec = s.codec;
    encode.blocks = s.blocks;
    encode.n_rows = n_cells[sequence] - kLast; /* the others are exact, and coded when they grow old */
    encode.cells = in_memory;
    encode.rows = s.half + (size_t)sequence * kMaxCells * kRow;
    encode.row_stride = kRow;
    encode.type = THIMBLE_F16;
    check(thimble_encode(context, &encode, NULL), "encoding");
  }
  return s;
}

static void free_side(side* s) {
  thimble_codec_free(s->codec);
  free(s->blocks.data);
  free(s->numbers);
  free(s->half);
}

static void attend_from_codes(thimble_context* context, const side* keys, const side* values, const float* q,
                              float* out) {
  int64_t start[kSequences + 1] = {0}, cells[kSequences * kLast], rows[kSequences * kLast];
  for (int s = 0; s < kSequences; s++) {
    for (int i = 0; i < kLast; i++) {
      cells[s * kLast + i] = n_cells[s] - kLast + i;
      rows[s * kLast + i] = s * kMaxCells + cells[s * kLast + i];
    }
    start[s + 1] = (s + 1) * kLast;
  }
  const int64_t first_tokens[kSequences + 1] = {0, kTokens, 2 * kTokens};
  thimble_attend_args args = {.struct_size = sizeof args};
  args.keys = keys->codec;
  args.values = values->codec;
  args.key_blocks = keys->blocks;
  args.value_blocks = values->blocks;
  args.n_sequences = kSequences;
  args.blocks_per_sequence = kBlocks;
  args.block_table = block_table;
  args.n_cells = n_cells;
  args.first_tokens = first_tokens;
  args.n_heads = kHeads;
  args.q = q;
  args.q_token_stride = kHeads * kDim;
  args.q_head_stride = kDim;
  args.out = out;
  args.out_token_stride = kHeads * kDim;
  args.out_head_stride = kDim;
  args.exact.start = start;
  args.exact.cells = cells;
  args.exact.rows = rows;
  args.exact.n_rows = kSequences * kMaxCells;
  args.exact.keys = keys->half;
  args.exact.values = values->half;
  args.exact.key_stride = kRow;
  args.exact.value_stride = kRow;
  check(thimble_attend(context, &args, NULL), "attending");
}

static void attend_in_float(const side* keys, const side* values, const float* q, float* out) {
  for (int t = 0; t < kSequences * kTokens; t++) {
    const int s = t / kTokens;
    for (int h = 0; h < kHeads; h++) {
      const size_t first = ((size_t)s * kMaxCells * kKvHeads + h / (kHeads / kKvHeads)) * kDim;
      const float* query = q + (t * kHeads + h) * kDim;
      float* result = out + (t * kHeads + h) * kDim;
      double sums[kDim] = {0}, total = 0;
      for (int64_t cell = 0; cell < n_cells[s]; cell++) {
        const float* k = keys->numbers + first + cell * kRow;
        const float* v = values->numbers + first + cell * kRow;
        double dot = 0;
        for (int d = 0; d < kDim; d++) dot += query[d] * k[d];
        const double weight = exp(dot / sqrt(kDim));
        total += weight;
        for (int d = 0; d < kDim; d++) sums[d] += weight * v[d];
      }
      for (int d = 0; d < kDim; d++) result[d] = (float)(sums[d] / total);
    }
  }
}

/* The squared error over the squared size. Random numbers are the hardest to code: a model's are kinder, and its
 * profile makes them kinder still. */
static int compare(double bits, double bound) {
  thimble_context* context;
  thimble_context_args context_args = {.struct_size = sizeof context_args};
  context_args.n_threads = 2;
  check(thimble_context_create(&context_args, &context), "making a context");
  side keys = make_side(context, THIMBLE_KEY, bits), values = make_side(context, THIMBLE_VALUE, bits);

  static float q[kNumbers], out[kNumbers], expected[kNumbers];
  for (size_t i = 0; i < kNumbers; i++) q[i] = gaussian();
  attend_from_codes(context, &keys, &values, q, out);
  attend_in_float(&keys, &values, q, expected);

  double error = 0, size = 0;
  for (size_t i = 0; i < kNumbers; i++) {
    error += (out[i] - expected[i]) * (out[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  error /= size;
  const int good = error < bound; /* and no NaN */
  printf(
      "%5g bits: %5zu bytes a block of 64 keys, squared error %.2e of the result's size, at most %.2e is right: %s\n",
      bits, thimble_codec_block_bytes(keys.codec), error, bound, good ? "ok" : "FAILED");
  free_side(&keys);
  free_side(&values);
  thimble_context_free(context);
  return good;
}

int main(int argc, char** argv) {
  const double rates[][2] = {{16, 1e-6}, {4, 0.018}, {3, 0.15}, {2, 0.21}, {1.5, 0.42}, {1.25, 0.55}, {1, 0.58}};
  int good = 1, found = 0;
  for (size_t i = 0; i < sizeof rates / sizeof *rates; i++) {
    if (argc > 1 && atof(argv[1]) != rates[i][0]) continue;
    found = 1;
    good &= compare(rates[i][0], rates[i][1]);
  }
  if (!found) fprintf(stderr, "no such rate: 16, 4, 3, 2, 1.5, 1.25 or 1\n");
  return good && found ? 0 : 1;
}
