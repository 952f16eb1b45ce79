// SPDX-License-Identifier: BSD-3-Clause
//
// Weights as the kernels of this folder read them, the same for both memory formats:
//
//   taps    [9][C']   depthwise weights, T     affine1 [2][C']   scale, shift; float
//   product [O][C']   pointwise weights, T     affine2 [2][O']   the same
//
// with u = d * scale1 + shift1 and t = p * scale2 + shift2: BN is not folded into the weights, which may have fewer
// bits than the numbers around them. C' and O' are channels rounded up to kChannelPadding; everything behind the last
// channel is zero.
#pragma once

#include <type_traits>

#include "types.h"

namespace fusedsep::cuda {

constexpr int64_t kChannelPadding = 32;
constexpr int64_t padded(int64_t channels) {
  return (channels + kChannelPadding - 1) / kChannelPadding * kChannelPadding;
}

// Memory is counted in floats and aligned to 16 bytes. T may be const.
template <typename T>
struct Packed {
  using Float = std::conditional_t<std::is_const_v<T>, const float, float>;
  Float *affine1, *affine2;
  T *taps, *product;
  int64_t in_padded, out_padded;

  static constexpr int64_t size(int64_t in_channels, int64_t out_channels) {
    const int64_t in = padded(in_channels);
    return 2 * in + 2 * padded(out_channels) + in * (9 + out_channels) * int64_t(sizeof(T)) / 4;
  }
};

}  // namespace fusedsep::cuda
