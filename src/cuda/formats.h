// Which head sizes and widths there are kernels for: the one place that turns them into template arguments. No CUDA in
// it.
//
// Each function returns what f.template operator()<...>() returns, or `none` where there is no kernel.
#pragma once

namespace thimble::cuda {

template <typename F, typename Result>
Result for_head_dim(int head_dim, const F& f, Result none) {
  switch (head_dim) {
    case 64:
      return f.template operator()<64>();
    case 128:
      return f.template operator()<128>();
    case 256:
      return f.template operator()<256>();
    default:
      return none;
  }
}

/// Numbers a subspace has, of keys or of values.
template <typename F, typename Result>
Result for_width(int width, const F& f, Result none) {
  switch (width) {
    case 2:
      return f.template operator()<2>();
    case 4:
      return f.template operator()<4>();
    case 8:
      return f.template operator()<8>();
    default:
      return none;
  }
}

/// Widths of keys and values together: equal ones, and keys at twice the bits of values.
template <typename F, typename Result>
Result for_widths(int key_width, int value_width, const F& f, Result none) {
  return for_width(
      key_width,
      [&]<int KeyWidth>() {
        if (value_width == KeyWidth) return f.template operator()<KeyWidth, KeyWidth>();
        if constexpr (KeyWidth < 8) {
          if (value_width == 2 * KeyWidth) return f.template operator()<KeyWidth, 2 * KeyWidth>();
        }
        return none;
      },
      none);
}

}  // namespace thimble::cuda
