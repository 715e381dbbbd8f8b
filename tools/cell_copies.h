// Fills a sequence with copies of its own cells, which takes seconds where a prompt of that length takes minutes. For
// measurements of speed: what a token costs does not depend on what its cells hold.
#pragma once

#include "model.h"

namespace thimble {

/// Sequence 0 of a context has the positions 0 to n - 1, and there are no others. Appends as many copies of all n cells
/// as n_cells have room for, by a state that libllama saves and loads again at other positions. Needs a context for two
/// sequences in one stream. Throws std::runtime_error where the context has too few cells, and where the positions are
/// not what they should be.
void fill_with_copies(llama_context* context, int n, int n_cells);

}  // namespace thimble
