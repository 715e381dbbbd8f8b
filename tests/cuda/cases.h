// Cases of decode attention that the emulated tests (attend_test.cpp) and the check on a device (device_check.cu)
// share.
#pragma once

namespace thimble::cuda {

struct AttendCase {
  const char* name = "";
  int n_streams = 1, n_tokens = 1, n_kv_heads = 1, group = 4;
  int n_cells = 128;
  bool dense = false, mask = false, alibi = false, sinks = false;
  bool dense_keys = false;  // keys alone, as without a profile (key_stretch)
  float softcap = 0;
  int n_exact = 0;  // exact rows of a stream
  int n_fresh = 0;  // of these: new, not in the window yet
  // Set by emulated tests; on a device the launcher chooses these.
  int n_splits = 1, blocks_x = 1, batch_shift = 0;
  bool nothing_coded = false;  // emulated only: all coded cells are hidden
};

/// Bits a number.
struct Rates {
  double keys, values;
};

/// Formats that are attended to by tiles.
struct TileCase {
  int head_dim;
  Rates rates;
};
inline constexpr TileCase kTileCases[] = {{64, {3, 3}},    {64, {1.5, 1.25}},  {64, {1.25, 1.5}}, {64, {4, 1}},
                                          {128, {3, 1.5}}, {128, {1.5, 3}},    {128, {1.25, 1}},  {128, {1, 1.25}},
                                          {128, {1, 4}},   {128, {2, 4}},      {128, {4, 1.25}},  {256, {3, 3}},
                                          {256, {1.5, 2}}, {256, {1.25, 1.5}}, {256, {4, 4}}};

/// Head size and numbers a subspace of a format.
struct FormatCase {
  int head_dim, key_width, value_width;
};

inline constexpr FormatCase kFormatCases[] = {{64, 8, 8},  {64, 4, 4},  {64, 2, 2},  {128, 8, 8},
                                              {128, 4, 4}, {128, 2, 2}, {128, 2, 4}, {128, 4, 8},
                                              {256, 8, 8}, {256, 4, 4}, {256, 2, 2}};
/// The same for devices with less shared memory than sm_90.
inline constexpr FormatCase kSmallFormatCases[] = {{64, 8, 8},  {64, 4, 4},  {64, 2, 2},  {128, 8, 8},
                                                   {128, 4, 4}, {128, 2, 2}, {256, 8, 8}, {256, 4, 4}};

/// Run in both kinds of format: tables of bytes, and wide ones.
inline constexpr FormatCase kBytes{64, 4, 4}, kWide{64, 2, 2};

inline constexpr AttendCase kManyOptions{.name = "many options",
                                         .n_streams = 3,
                                         .n_tokens = 3,
                                         .n_kv_heads = 2,
                                         .group = 3,
                                         .n_cells = 256,
                                         .dense = true,
                                         .mask = true,
                                         .alibi = true,
                                         .n_exact = 21,
                                         .n_fresh = 5,
                                         .blocks_x = 2};

inline constexpr AttendCase kAttendCases[] = {
    {.name = "splits", .n_kv_heads = 2, .n_cells = 64 * 21, .n_splits = 3, .blocks_x = 3},
    {.name = "streams", .n_streams = 3, .n_cells = 64 * 18, .blocks_x = 2},
    {.name = "streams that are split", .n_streams = 2, .n_cells = 64 * 5, .n_splits = 2, .blocks_x = 3},
    {.name = "one head a group", .group = 1},
    {.name = "two heads", .group = 2},
    {.name = "eight heads", .group = 8},
    {.name = "three tokens of one head", .n_tokens = 3, .group = 1, .dense = true, .mask = true},
    {.name = "three tokens of two heads", .n_tokens = 3, .group = 2, .dense = true, .mask = true},
    {.name = "three tokens of four heads", .n_tokens = 3, .dense = true, .mask = true},
    {.name = "three tokens of eight heads", .n_tokens = 3, .group = 8, .dense = true, .mask = true},
    {.name = "eight tokens", .n_streams = 2, .n_tokens = 8, .group = 1, .mask = true},
    {.name = "mask", .mask = true},
    {.name = "softcap", .softcap = 1.5f},
    {.name = "ALiBi", .mask = true, .alibi = true},
    {.name = "sinks", .n_kv_heads = 2, .dense = true, .sinks = true},
    {.name = "mask, softcap, ALiBi, sinks",
     .n_streams = 2,
     .n_tokens = 2,
     .dense = true,
     .mask = true,
     .alibi = true,
     .sinks = true,
     .softcap = 2},
    {.name = "exact rows", .n_exact = 20},
    // More splits than blocks of coded cells, so that some splits have exact rows alone.
    {.name = "more splits than blocks", .n_cells = 128, .mask = true, .n_exact = 80, .n_splits = 5, .blocks_x = 5},
    {.name = "exact rows of streams that are split",
     .n_streams = 2,
     .n_kv_heads = 2,
     .n_cells = 64 * 4,
     .dense = true,
     .mask = true,
     .sinks = true,
     .n_exact = 40,
     .n_splits = 2,
     .blocks_x = 4},
    {.name = "new rows", .n_streams = 2, .n_cells = 64 * 20, .n_exact = 90, .n_fresh = 2, .n_splits = 4, .blocks_x = 3},
    kManyOptions,
};

}  // namespace thimble::cuda
