// Which head sizes and widths there are kernels for: the one place that turns them into template arguments. No CUDA in
// it.
//
// Each function returns what f.template operator()<...>() returns, or `none` where there is no kernel.
#pragma once

namespace thimble::cuda {

template <int... Values, typename F, typename Result>
Result for_value(int value, const F& f, Result none) {
  Result result = none;
  (void)((value == Values ? (result = f.template operator()<Values>(), true) : false) || ...);
  return result;
}

template <typename F, typename Result>
Result for_head_dim(int head_dim, const F& f, Result none) {
  return for_value<64, 128, 256>(head_dim, f, none);
}

/// Numbers a subspace has, of keys or of values, where all have the same.
template <typename F, typename Result>
Result for_width(int width, const F& f, Result none) {
  return for_value<2, 4, 8>(width, f, none);
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
