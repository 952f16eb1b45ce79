// SPDX-License-Identifier: BSD-3-Clause
//
// Two maps as one, in channels_last, where no convolution could store its result in the right place at once: their sum
// or product, a copy, or their channels in turns, which is what a channel shuffle makes of two maps; and a map with
// factors of its channels or an activation.
#pragma once

#include "join-inl.h"
#include "layout-inl.h"
#include "separable.h"

namespace fusedsep {
namespace {

// y[2c] = x[c], y[2c + 1] = other[c] for `channels` channels of a pixel.
template <class V>
FUSEDSEP_INLINE void interleave_pixel(const typename V::T* x, const typename V::T* other, int64_t channels,
                                      typename V::T* y) {
  constexpr int64_t L = V::kLanes;
  const int64_t whole = channels / L * L, rest = channels - whole;
  for (int64_t c = 0; c < whole; c += L) {
    V low, high;
    V::zip(V::load(x + c), V::load(other + c), low, high);
    low.store(y + 2 * c);
    high.store(y + 2 * c + L);
  }
  if (rest > 0) {
    const auto mask = V::mask(0, rest);
    V low, high;
    V::zip(V::load(x + whole, mask), V::load(other + whole, mask), low, high);
    low.store(y + 2 * whole, V::mask(0, 2 * rest));
    if (2 * rest > L) high.store(y + 2 * whole + L, V::mask(0, 2 * rest - L));
  }
}

template <class V>
void interleave(const SeparableParams<typename V::T>& p, int64_t begin, int64_t end) {
  const int64_t x_pitch = x_pitch_of(p), y_pitch = y_pitch_of(p), channels = p.in_channels;
  const int64_t residual_pitch = p.residual_pitch != 0 ? p.residual_pitch : channels;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    interleave_pixel<V>(p.x + pixel * x_pitch, p.residual + pixel * residual_pitch, channels, p.y + pixel * y_pitch);
  }
}

template <class V>
void combine(const SeparableParams<typename V::T>& p, int64_t begin, int64_t end) {
  if (p.rows == Rows::kInterleaved) return interleave<V>(p, begin, end);
  const int64_t plane = p.out_height * p.out_width;
  while (begin < end) {  // the pixels of an image have the same factors
    const int64_t image_end = p.gate == nullptr ? end : min_of(end, (begin / plane + 1) * plane);
    auto joined = join_of(p, p.x + begin * x_pitch_of(p), x_pitch_of(p), begin, image_end - begin, 0, p.in_channels);
    if (p.gate != nullptr) {
      joined.gate = p.gate + begin / plane * p.in_channels;
      joined.gate_pitch = 0;
    }
    join<V>(joined);
    begin = image_end;
  }
}

}  // namespace
}  // namespace fusedsep
