/* Thimble's coded KV cache as a C99 library: keys and values at 1 to 4 bits a number, and attention straight from the
 * codes. For programs that keep their cache themselves; llama.cpp loads the plugin instead. docs/api.md is a guide.
 *
 * Words. A vector is one token's key or value of one KV head, `head_dim` numbers. A block holds the codes of 64 vectors
 * of one KV head; it is what memory is handed out in. A cell is the place of one token's vectors. A cell of a sequence
 * is numbered from the sequence's first; a cell of the memory through all its blocks: block * 64 + number in the block.
 *
 * Errors. Every call that can fail returns a status; thimble_last_error() then says what to change. A call that fails
 * has made and written nothing, unless it says otherwise. The library prints nothing, never exits, and changes no
 * global state. It reads one environment variable, THIMBLE_ISA (scalar, avx2, avx512, neon), once.
 *
 * Threads. Profiles and codecs do not change: any number of threads may use one. A context serves one call at a time;
 * a second is refused. Threads that work at once have a context each.
 *
 * Arguments come in structures that begin with their own size, so that later versions can add members:
 *   thimble_encode_args args = {.struct_size = sizeof args};
 * What is not set is 0, which always means "none" or the default that stands beside the member.
 *
 * Devices. A context computes on the CPU, where `stream` must be null; or, in a build with CUDA, on a CUDA device.
 * There a call enqueues its work on `stream`, a cudaStream_t (null: the default stream), and returns.
 *   device memory    blocks; rows of encode and decode; q, out, mask, sinks; keys and values of exact rows
 *   host memory      all else: cells, block_table, n_cells, first_tokens, start, cells and rows of exact rows. It is
 *                    copied within the call, and may change when that returns
 * A context's first call with a codec copies the codec's tables to the device and waits until they are there; to free
 * a context waits for the device. No other call waits for a stream, unless CUDA itself does so to copy index arrays of
 * more than 64 KiB. Calls that a CUDA graph captures are refused.
 * What CUDA has no kernels for is refused with THIMBLE_UNSUPPORTED and a sentence that says what to change:
 *                    CPU                                CUDA
 *   bits             16, 4, 3, 2, 1.5, 1.25, 1          4, 2, 1; a profile made with `thimble calibrate --even`
 *   head_dim         even, 2 to 512                     64, 128, 256 (sm_80 and sm_90; at 4 bits sm_90)
 *   values           any codec                          of the keys' head size, at the keys' bits or half of them
 *   query heads      any number to a KV head            at most 64
 *   cells            of a sequence: any number          at most 2^28
 *   vectors          of encode, decode: any number      at most 2^29
 *   blocks           any address and strides            multiples of 16
 *   q                any strides                        aligned to 16 bytes, strides multiples of 4
 *   out              any strides                        aligned to 16 bytes, [token][head][value head size], no gaps
 *   mask             mask_stride from n_cells on        aligned to 16 bytes; mask_stride a multiple of 8, from whole
 *                                                       blocks on: the greatest n_cells rounded up to 64
 *   exact rows       any strides                        aligned to 16 bytes, strides multiples of 8
 * and on CUDA a vector that holds an infinity or a NaN may make the output of every token of its sequence NaN, unless
 * its cell is exact.
 */
#ifndef THIMBLE_THIMBLE_H
#define THIMBLE_THIMBLE_H

#include <stddef.h>
#include <stdint.h>

#define THIMBLE_VERSION_MAJOR 0
#define THIMBLE_VERSION_MINOR 1
#define THIMBLE_VERSION_PATCH 0

#if defined(__GNUC__)
#define THIMBLE_API __attribute__((visibility("default")))
#else
#define THIMBLE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Vectors in a block. */
#define THIMBLE_BLOCK_CELLS 64
/* Of an f16 mask: minus infinity, a cell that is not seen. */
#define THIMBLE_MASK_HIDDEN 0xfc00

/* ---- status ---- */

typedef enum thimble_status {
  THIMBLE_OK = 0,
  THIMBLE_INVALID_ARGUMENT = 1, /* the call is wrong, whatever the build and the machine */
  THIMBLE_UNSUPPORTED = 2,      /* this version, build or machine cannot do it */
  THIMBLE_BAD_PROFILE = 3,      /* a file that cannot be read, is damaged, or does not hold what is asked for */
  THIMBLE_OUT_OF_MEMORY = 4,
  THIMBLE_INTERNAL = 5 /* an error inside the library */
} thimble_status;

/* A sentence about the last call of this thread that failed, or "". Valid until the thread's next call that fails. */
THIMBLE_API const char* thimble_last_error(void);
/* "ok", "invalid argument", ...; never null. */
THIMBLE_API const char* thimble_status_name(thimble_status status);
/* The library's version, "0.1.0". */
THIMBLE_API const char* thimble_version(void);

/* ---- profiles ----
 * What calibration learned of a model (`thimble calibrate`): a transform and codebooks for each layer and KV head,
 * which make 2 bits and less good. Codes made with a profile mean nothing without it. */

typedef struct thimble_profile thimble_profile;

/* Reads a file, *.thimble.gguf. On success *profile is the caller's, to be given to thimble_profile_close. The file is
 * checked throughout, so it may come from anywhere. */
THIMBLE_API thimble_status thimble_profile_open(const char* path, thimble_profile** profile);
/* The same for a file's `size` bytes at `data`, which may be freed when this returns. */
THIMBLE_API thimble_status thimble_profile_open_memory(const void* data, size_t size, thimble_profile** profile);
/* Codecs made with the profile stay valid. Does nothing for null. */
THIMBLE_API void thimble_profile_close(thimble_profile* profile);

#define THIMBLE_MAX_RATES 16

typedef struct thimble_profile_info {
  size_t struct_size;
  int32_t n_layers;
  int32_t n_rates;
  double rates[THIMBLE_MAX_RATES]; /* [n_rates] that the profile holds, bits a number, the highest first */
  const char* architecture;        /* of the model; valid until the profile is closed, as is `source` */
  const char* source;              /* what the model was calibrated on */
} thimble_profile_info;
/* Fills *info, whose struct_size the caller has set. */
THIMBLE_API thimble_status thimble_profile_get_info(const thimble_profile* profile, thimble_profile_info* info);

typedef struct thimble_layer_info {
  size_t struct_size;
  int32_t n_kv_heads; /* 0: the layer keeps no keys and values */
  int32_t n_heads;    /* query heads */
  int32_t key_dim;    /* head size of keys */
  int32_t value_dim;  /* head size of values */
} thimble_layer_info;
THIMBLE_API thimble_status thimble_profile_get_layer(const thimble_profile* profile, int32_t layer,
                                                     thimble_layer_info* info);

/* ---- codecs ----
 * How the keys or the values of some KV heads of a layer are coded. */

typedef struct thimble_codec thimble_codec;

typedef enum thimble_kind { THIMBLE_KEY = 0, THIMBLE_VALUE = 1 } thimble_kind;

typedef struct thimble_codec_args {
  size_t struct_size;
  const thimble_profile* profile; /* null: not calibrated */
  double bits;        /* a number: 16 (f16 as it is), 4, 3, 2, 1.5, 1.25, 1; with a profile a rate of it, or 16 */
  int32_t kind;       /* thimble_kind */
  int32_t n_heads;    /* KV heads; 0 with a profile: all from first_head on */
  int32_t head_dim;   /* even, 2 to 512; 0 with a profile: the profile's */
  int32_t layer;      /* of the profile */
  int32_t first_head; /* of the profile's layer; a codec may cover one head, or a device's share of them */
} thimble_codec_args;
/* On success *codec is the caller's, to be given to thimble_codec_free. It takes 50 to 1000 KiB a head. */
THIMBLE_API thimble_status thimble_codec_create(const thimble_codec_args* args, thimble_codec** codec);
/* Does nothing for null. */
THIMBLE_API void thimble_codec_free(thimble_codec* codec);

typedef struct thimble_codec_info {
  size_t struct_size;
  size_t block_bytes; /* of one block: 64 vectors of one KV head */
  double bits;        /* a number as coded here, without scales; a profile may spend more on one layer than another */
  int32_t kind;
  int32_t n_heads;
  int32_t head_dim;
} thimble_codec_info;
THIMBLE_API thimble_status thimble_codec_get_info(const thimble_codec* codec, thimble_codec_info* info);
/* The same as thimble_codec_info.block_bytes; 0 for null. */
THIMBLE_API size_t thimble_codec_block_bytes(const thimble_codec* codec);

/* ---- contexts ----
 * A device's threads and working memory. */

typedef struct thimble_context thimble_context;

typedef enum thimble_device { THIMBLE_DEVICE_CPU = 0, THIMBLE_DEVICE_CUDA = 1 } thimble_device;

typedef struct thimble_context_args {
  size_t struct_size;
  int32_t device;       /* thimble_device */
  int32_t device_index; /* as CUDA numbers devices; 0 on the CPU */
  int32_t n_threads;    /* the calling thread is one of them; 0: as many as the machine runs at once. At most 512.
                           0 on CUDA */
} thimble_context_args;
/* `args` may be null: all 0. On success *context is the caller's, to be given to thimble_context_free. It fails with
 * THIMBLE_UNSUPPORTED where the build has no CUDA or the machine has no such device. */
THIMBLE_API thimble_status thimble_context_create(const thimble_context_args* args, thimble_context** context);
/* Ends the context's threads, or waits for its device. Does nothing for null. */
THIMBLE_API void thimble_context_free(thimble_context* context);
/* "avx512", "avx2", "neon" or "scalar"; on CUDA "sm_90" or the like; "" for null. */
THIMBLE_API const char* thimble_context_instruction_set(const thimble_context* context);

/* ---- memory ----
 * Blocks lie where the caller says: block b of KV head h at data + b * block_stride + h * head_stride, both strides in
 * bytes and such that no two blocks overlap. For example, with B = thimble_codec_block_bytes and n heads:
 *   all blocks of a head together     block_stride = B      head_stride = n_blocks * B
 *   pages, all heads in each          block_stride = n * B  head_stride = B
 *   pages that also hold values (V bytes a block)   block_stride = n * (B + V); the values' data = keys' data + n * B
 * Any alignment will do; multiples of 64 are fastest. Memory need not be cleared: a cell that no token sees is not
 * read. Codes do not depend on the machine: blocks may be saved on one and read on another. Their order in a block is
 * one on all CPUs and another on all CUDA devices; thimble_convert_blocks leads from one to the other. */

typedef struct thimble_blocks {
  void* data;
  int64_t n_blocks; /* of each head */
  size_t block_stride;
  size_t head_stride;
} thimble_blocks;

/* Copies n_blocks blocks, one behind another in host memory, from the order of one kind of device (thimble_device) to
 * that of another. `from` and `to` must not overlap. Needs no device and no CUDA in the build. */
THIMBLE_API thimble_status thimble_convert_blocks(const thimble_codec* codec, int32_t from_device, const void* from,
                                                  int32_t to_device, void* to, int64_t n_blocks);

typedef enum thimble_type { THIMBLE_F32 = 0, THIMBLE_F16 = 1 } thimble_type;

/* Rows of numbers, a vector of each of the codec's heads: head h of row r at element r * row_stride + h * head_dim. */
typedef struct thimble_encode_args {
  size_t struct_size;
  const thimble_codec* codec;
  thimble_blocks blocks; /* written */
  int64_t n_rows;
  const int64_t* cells; /* [n_rows], of the memory, each at most once: where the row goes; negative: nowhere */
  const void* rows;
  size_t row_stride; /* elements */
  int32_t type;      /* thimble_type of rows */
} thimble_encode_args;
/* Codes rows into cells. Other cells of the blocks do not change. Keys are taken as attention multiplies them, after
 * RoPE. A vector that holds an infinity or a NaN makes the output of every token that sees its cell NaN. */
THIMBLE_API thimble_status thimble_encode(thimble_context* context, const thimble_encode_args* args, void* stream);

typedef struct thimble_decode_args {
  size_t struct_size;
  const thimble_codec* codec;
  thimble_blocks blocks; /* only read */
  int64_t n_rows;
  const int64_t* cells; /* [n_rows], of the memory; negative: the row is not written */
  void* rows;           /* written; laid out as in thimble_encode_args */
  size_t row_stride;    /* elements; rows must not overlap */
  int32_t type;
} thimble_decode_args;
/* Writes the vectors that the codes of cells stand for. Cells that were never encoded give arbitrary numbers. */
THIMBLE_API thimble_status thimble_decode(thimble_context* context, const thimble_decode_args* args, void* stream);

/* ---- attention ---- */

/* Cells that are attended to from f16 rows of the caller's, whatever their blocks hold: a sequence's last cells, say.
 * Those of sequence s are entries start[s] to start[s + 1] - 1. */
typedef struct thimble_exact {
  const int64_t* start; /* [n_sequences + 1], from 0 on; null: there are none */
  const int64_t* cells; /* of the sequence, ascending */
  const int64_t* rows;  /* each cell's row in `keys` and `values` */
  int64_t n_rows;       /* that `keys` and `values` have */
  const uint16_t* keys; /* f16: head h of row r at element r * key_stride + h * key head size */
  const uint16_t* values;
  size_t key_stride; /* elements */
  size_t value_stride;
} thimble_exact;

/* For query token t of a sequence and query head h, with the KV head h / (n_heads / KV heads):
 *   score[cell] = softcap(scale * q.k) + slope(h) * mask[t][cell]
 *   out         = sum over the sequence's cells of softmax(score) * v
 * where softcap(x) = softcap * tanh(x / softcap), or x where softcap is 0, and slope(h) is 1, or where max_bias is
 * above 0 ALiBi's (arXiv 2108.12409). A token that sees no cell gets zeros. */
typedef struct thimble_attend_args {
  size_t struct_size;
  const thimble_codec* keys; /* both of the same number of heads */
  const thimble_codec* values;
  thimble_blocks key_blocks; /* only read, as are the next */
  thimble_blocks value_blocks;

  /* Sequences: cell c of sequence s is in block block_table[s][c / 64] of the keys' and of the values' memory; or,
   * where block_table is null, in block s * blocks_per_sequence + c / 64. */
  int32_t n_sequences;
  int32_t blocks_per_sequence;
  const int32_t* block_table;  /* [n_sequences][blocks_per_sequence]; not read beyond a sequence's last cell */
  const int64_t* n_cells;      /* [n_sequences], at most blocks_per_sequence * 64; 0 is allowed */
  const int64_t* first_tokens; /* [n_sequences + 1]: query tokens of s are first_tokens[s] to first_tokens[s + 1] - 1;
                                  null: one each */

  /* Head h of query token t is at element t * token_stride + h * head_stride. */
  int32_t n_heads; /* query heads, a multiple of the codecs' */
  const float* q;
  size_t q_token_stride;
  size_t q_head_stride;
  float* out; /* written; vectors must not overlap one another */
  size_t out_token_stride;
  size_t out_head_stride;

  const uint16_t* mask; /* f16, of token t and cell c at element t * mask_stride + c; null: tokens see all cells */
  size_t mask_stride;   /* elements, at least the greatest of n_cells */
  float scale;          /* 0: 1 / sqrt(key head size) */
  float softcap;        /* 0: none */
  float max_bias;       /* 0: no ALiBi */
  const float* sinks;   /* [n_heads]: a score that joins the sum of each softmax and adds no value; null: none */

  thimble_exact exact;
} thimble_attend_args;
/* On failure `out` may hold anything. Contiguous and paged memory give the same bits, and so do contexts with the same
 * number of threads, or on devices of one model. On the CPU, up to 8 tokens of a sequence are attended to by look-ups
 * of codes, more through decoded tiles. On CUDA each token reads its sequence's codes: long prompts take long. */
THIMBLE_API thimble_status thimble_attend(thimble_context* context, const thimble_attend_args* args, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* THIMBLE_THIMBLE_H */
