// The caches of a program that uses a device over ggml's RPC. Its rpc-server, which has loaded the plugin, passes on
// what the program sends. Three things are other than in one process:
//
//   - Nobody asks how much memory a cache tensor takes. The program reserves f16's size and lays its tensors out in it.
//     Codes are placed at the beginning; the rest is never touched, and so takes no memory where pages come with use.
//   - Nobody calls init_tensor for a cache, and nobody asks what is supported. Caches are found in the first graph that
//     writes to them. What cannot be coded is left f16, as it can no longer be refused, and the log says so.
//   - Each message has tensors of its own, and a view that is set or read comes without the tensor that it is a view
//     of. So a cache is known by its address.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "ggml.h"

struct ggml_cgraph;

namespace thimble {

/// The cache tensors of one buffer, as they were first seen.
class FarCaches {
public:
  /// Memory that was set before its cache tensor was seen.
  struct Early {
    char* data;
    size_t size;
  };

  bool empty() const { return tensors_.empty(); }
  /// The cache tensor in whose memory a tensor lies, or null.
  const ggml_tensor* find(const ggml_tensor* tensor) const;
  /// Keeps a copy of a cache tensor.
  ggml_tensor* add(const ggml_tensor* tensor);

  /// A place for codes in the memory of a cache tensor and of those that lie directly before it and were given places
  /// before, or null where there is no room. `end_run` makes the next place begin in its own tensor's memory.
  uint8_t* place(const ggml_tensor* tensor, size_t bytes);
  void end_run() { run_end_ = nullptr; }

  /// To be called for each tensor that is set and not known here: rows of a state may come before the first graph.
  void note_set(const ggml_tensor* tensor, size_t offset, size_t size);
  /// The memory that was set before, in the order of the calls; it is forgotten.
  std::vector<Early> take_early();

private:
  std::map<const char*, ggml_tensor> tensors_;  // by address
  std::vector<Early> early_;
  char* next_ = nullptr;     // behind the last place
  char* run_end_ = nullptr;  // of the memory of the tensor that got it
};

/// Finds the caches that a graph writes to and that came over RPC, and gives them to their buffers. To be called before
/// the graph is run.
void take_far_caches(const ggml_cgraph* graph);

}  // namespace thimble
