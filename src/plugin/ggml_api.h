// Where ggml's versions differ, as far as src/plugin is concerned. src/plugin is compiled once for each backend API
// version, with that version's headers, and each build runs in all versions of ggml that have that API (self_check.h).
//
//   API 2 to API 3   ggml_backend_buffer_type_i got alloc_buffer_n and get_alloc_size_n. Left null, they default to
//                    alloc_buffer and get_alloc_size, which is right for the plugin. ggml_backend_i's graph_optimize
//                    got an argument; the plugin leaves that function null.
//   within API 2     ops were inserted before CUSTOM, so its number depends on the version (91 in 0.15, 95 from 0.20
//   on).
//                    ggml_backend_dev_caps got mmap_support, behind all members that the plugin uses.
//   within API 3     ggml 0.27 has no ggml_graph_view; part_of makes what it made.
//
// Two rules keep this list short: tables of functions are filled by name, never by position; and of structs that the
// host makes, only members before the first difference are used.
#pragma once

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

static_assert(GGML_BACKEND_API_VERSION == 2 || GGML_BACKEND_API_VERSION == 3,
              "src/plugin was not held to this backend API yet: see src/loader/versions.h");

namespace thimble {

/// The number of ggml's op CUSTOM in the host.
ggml_op custom_op();

/// A graph of some nodes of another one, in an array of the caller, without leafs and gradients.
inline ggml_cgraph part_of(const ggml_cgraph& graph, ggml_tensor** nodes, int n_nodes) {
  ggml_cgraph part = graph;
  part.size = 0;
  part.n_nodes = n_nodes;
  part.n_leafs = 0;
  part.nodes = nodes;
  part.grads = part.grad_accs = part.leafs = nullptr;
  part.uid = 0;
  return part;
}

/// A device's properties. The host's struct may have more members than the one in these headers, so there is room
/// behind it.
inline ggml_backend_dev_props props_of(ggml_backend_dev_t device) {
  struct {
    ggml_backend_dev_props known;
    char more[512];
  } props;
  ggml_backend_dev_get_props(device, &props.known);
  return props.known;
}

}  // namespace thimble
