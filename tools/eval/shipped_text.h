// The text that `thimble` has inside, for tasks that are given none.
#pragma once

#include <string>

namespace thimble {

/// The GNU General Public License, examples/gpl-3.0.txt: some 7600 tokens.
const std::string& shipped_text();

}  // namespace thimble
