// SPDX-License-Identifier: BSD-3-Clause
//
// Two maps as one, in channels_last, where no convolution could store its result in the right place at once: their sum,
// a copy, or their channels in turns, which is what a channel shuffle makes of two maps.
#pragma once

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

// y = x + other, or x if there is no other, for `channels` channels of a pixel.
template <class V>
FUSEDSEP_INLINE void add_pixel(const typename V::T* x, const typename V::T* other, int64_t channels, typename V::T* y) {
  constexpr int64_t L = V::kLanes;
  const int64_t whole = channels / L * L;
  const auto mask = V::mask(0, channels - whole);
  if (other == nullptr) {
    for (int64_t c = 0; c < whole; c += L) V::load(x + c).store(y + c);
    if (whole < channels) V::load(x + whole, mask).store(y + whole, mask);
    return;
  }
  for (int64_t c = 0; c < whole; c += L) V::add(V::load(x + c), V::load(other + c)).store(y + c);
  if (whole < channels) V::add(V::load(x + whole, mask), V::load(other + whole, mask)).store(y + whole, mask);
}

template <class V>
void combine(const SeparableParams<typename V::T>& p, int64_t begin, int64_t end) {
  const int64_t x_pitch = x_pitch_of(p), y_pitch = y_pitch_of(p), channels = p.in_channels;
  const int64_t residual_pitch = p.residual_pitch != 0 ? p.residual_pitch : channels;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const auto* const x = p.x + pixel * x_pitch;
    const auto* const residual = p.residual == nullptr ? nullptr : p.residual + pixel * residual_pitch;
    auto* const y = p.y + pixel * y_pitch;
    if (p.rows == Rows::kInterleaved) {
      interleave_pixel<V>(x, residual, channels, y);
    } else {
      add_pixel<V>(x, residual, channels, y);
    }
  }
}

}  // namespace
}  // namespace fusedsep
