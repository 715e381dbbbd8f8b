// The settings of a cache: the environment variable THIMBLE_KV, e.g. "bits=2,window=128".
//
//   - bits=4: bits a number: 16 (f16, nothing coded), 4, 3, 2, 1.5, 1.25 or 1; bits=K/V gives keys and values rates of
//     their own.
//   - window=128: the last cells of each sequence, by order of writing, that stay exact (and up to 16 more, which are
//     then coded together); with window=0 there is no pool unless pool= asks for one.
//   - pool=40: other cells of each sequence that stay exact because they matter most (cache/pool.h).
//   - small=1024: caches of at most this many cells, all streams together, stay f16, and so do sliding windows of at
//     most 4096 cells and caches of which exact rows and codes would take more than three quarters of f16's memory. 0
//     codes all.
//   - profile=PATH: calibration of the model; without it the uncalibrated codec is used. profile=auto takes
//     <model>.thimble.gguf beside the model that the process was started with, if it is there.
//   - device=NAME: ggml devices to run on, by their names or their backend's, with a + between them (CUDA0+CUDA1,
//     CUDA); read when the plugin is loaded. Each gets a THIMBLE device. Without it, all CUDA devices where there are
//     any and the plugin is built for them, else the CPU.
//   - top=64: cells that each KV head attends to exactly when decoding, chosen at every step from an exact store of all
//     cells; 0, the default, keeps no store.
//   - store=auto: where the exact store is: RAM (store=ram) or a file (store=file) in the directory path=DIR for the
//     CPU, pinned RAM (store=pinned) for a CUDA device; auto is the RAM that the device reads.
//   - tail=quantized: cells that are neither retrieved nor in the window are attended to from their codes; with
//     tail=drop they are not attended to, and values have no codes.
//   - policy=all: which layers retrieve: all that are coded; auto, those that the profile calls sparse, or all where
//     there is no profile; none.
//   - calibrate=PATH: codes nothing, but reads the keys, values and queries of what the program runs off an f16 cache,
//     and writes a profile to PATH when the context ends. The keys above but device= have no meaning with it; these
//     have none without it:
//   - tokens=24576: tokens to read; what the program runs afterwards is not looked at.
//   - context=N: the longest context that the profile is to serve; without it that which the model was trained for.
//   - rates=4+2+1: the rates that the profile holds.
//   - even=no: with even=yes all layers, keys and values get the same rate.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cache/window.h"

namespace thimble {

struct Settings {
  double key_bits = 4;
  double value_bits = 4;
  WindowSize window;
  int small_cells = 1024;
  std::string profile;
  std::string device;
  int top = 0;
  enum class Store { automatic, ram, file, pinned } store = Store::automatic;
  std::string path;
  bool drop_tail = false;
  enum class Policy { automatic, all, none } policy = Policy::all;
  struct Calibrate {
    std::string path;  // empty: no calibration
    int tokens = 24576;
    int context = 0;  // 0: the model's
    std::vector<double> rates = {4, 2, 1};
    bool even = false;
  } calibrate;

  /// Throws std::invalid_argument that names the key or value which is wrong. Its sentence begins with `where`, the
  /// place that the user typed the text into.
  static Settings parse(const std::string& text, const std::string& where = "THIMBLE_KV");
  /// parse(THIMBLE_KV), or the defaults where it is not set.
  static Settings from_environment();

  bool calibrates() const { return !calibrate.path.empty(); }
  bool passthrough() const { return key_bits == 16 && value_bits == 16; }
  std::string to_string() const;
  /// A hash of the rates. CodecSource::hash adds the profile.
  uint64_t hash() const;
};

}  // namespace thimble
