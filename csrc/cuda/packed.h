// SPDX-License-Identifier: BSD-3-Clause
//
// Weights as the kernels of this folder read them, the same for both memory formats:
//
//   taps    [9][C']     depthwise weights                 affine1 [3][C']   center, scale, shift
//   product [C'][O']    pointwise weights, transposed     affine2 [3][O']
//
// with u = (d - center1) * scale1 + shift1 and t = (p - center2) * scale2 + shift2 as in csrc/kernels/training.h: BN is
// not folded into the weights, which may have fewer bits than the numbers around them. C' and O' are channels rounded
// up to kChannelPadding; everything behind the last channel is zero.
#pragma once

#include "../kernels/training.h"

namespace fusedsep::cuda {

constexpr int64_t kChannelPadding = 32;
constexpr int64_t padded(int64_t channels) {
  return (channels + kChannelPadding - 1) / kChannelPadding * kChannelPadding;
}

template <class W>  // float or const float
struct Packed {
  W *taps, *product, *affine1, *affine2;
  int64_t in_padded, out_padded;

  constexpr Packed(W* memory, int64_t in_channels, int64_t out_channels)
      : taps(memory),
        product(taps + 9 * padded(in_channels)),
        affine1(product + padded(in_channels) * padded(out_channels)),
        affine2(affine1 + 3 * padded(in_channels)),
        in_padded(padded(in_channels)),
        out_padded(padded(out_channels)) {}

  static constexpr int64_t size(int64_t in_channels, int64_t out_channels) {
    const int64_t in = padded(in_channels), out = padded(out_channels);
    return (9 + 3 + out) * in + 3 * out;
  }
};

}  // namespace fusedsep::cuda
