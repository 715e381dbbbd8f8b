#include "codec/format.h"

#include <algorithm>
#include <stdexcept>

namespace thimble {

int Format::offset(int subspace) const {
  const int wide4 = subspace - n_width2;
  const int wide8 = wide4 - n_width4;
  if (wide4 <= 0) return 2 * subspace;
  if (wide8 <= 0) return 2 * n_width2 + 4 * wide4;
  return 2 * n_width2 + 4 * n_width4 + 8 * wide8;
}

Format make_format(int head_dim, double bits) {
  if (head_dim < 2 || head_dim > kMaxHeadDim || head_dim % 2 != 0) {
    throw std::invalid_argument("head size " + std::to_string(head_dim) +
                                " cannot be coded: it must be even and between 2 and " + std::to_string(kMaxHeadDim));
  }
  Format format;
  format.head_dim = head_dim;
  if (bits == 16) {
    format.f16 = true;
    return format;
  }
  // Numbers that go to subspaces of width 2 and 4; the rest goes to width 8. What a width cannot cover evenly falls to
  // the next narrower one, so a head size that the widths do not divide costs a few bits more, never less.
  int in_width2 = 0, in_width4 = 0;
  if (bits == 4) {
    in_width2 = head_dim;
  } else if (bits == 3) {
    in_width2 = head_dim / 2;
    in_width4 = head_dim - in_width2;
  } else if (bits == 2) {
    in_width4 = head_dim;
  } else if (bits == 1.5) {
    in_width4 = head_dim / 2;
  } else if (bits == 1.25) {
    in_width4 = head_dim / 4;
  } else if (bits != 1) {
    throw std::invalid_argument("no format of " + std::to_string(bits) + " bits: choose 16, 4, 3, 2, 1.5, 1.25 or 1");
  }
  format.n_width8 = (head_dim - in_width2 - in_width4) / 8;
  format.n_width4 = (head_dim - in_width2 - format.n_width8 * 8) / 4;
  format.n_width2 = (head_dim - format.n_width8 * 8 - format.n_width4 * 4) / 2;
  return format;
}

Format make_position_format(int head_dim, const Format& latent, size_t bytes) {
  Format format = make_format(head_dim, latent.f16 ? 16 : 4);
  if (format.f16) return format;
  const size_t other = size_t(latent.vector_bytes()) + sizeof(uint16_t);  // what is not codes of this part
  const int codes = std::clamp(int(bytes > other ? bytes - other : 0), (head_dim + 3) / 4, head_dim / 2);
  format.n_width2 = 2 * codes - head_dim / 2;
  format.n_width4 = head_dim / 2 - codes;
  return format;
}

}  // namespace thimble
