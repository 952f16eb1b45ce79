// SPDX-License-Identifier: BSD-3-Clause
//
// Each pixel as two in a row and two in a column, in channels_last.
#pragma once

#include "layout-inl.h"
#include "separable.h"

namespace fusedsep {
namespace {

template <class V>
void upsample(const SeparableParams<typename V::T>& p, int64_t row_begin, int64_t row_end) {
  using T = typename V::T;
  constexpr int64_t L = V::kLanes;
  const int64_t pitch = x_pitch_of(p), y_pitch = y_pitch_of(p), channels = p.in_channels;
  const int64_t residual_pitch = residual_pitch_of(p);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t image = row / p.out_height, i = row % p.out_height / 2;
    const T* x = p.x + (image * p.height + i) * p.width * pitch;
    for (int64_t j = 0; j < p.width; ++j, x += pitch) {
      const int64_t pixel = row * p.out_width + 2 * j;
      T* const y = p.y + pixel * y_pitch;
      const T* const residual = p.residual == nullptr ? nullptr : p.residual + pixel * residual_pitch;
      const auto write = [&](int64_t c, auto... mask) __attribute__((always_inline)) {
        const V value = V::load(x + c, mask...);
        V left = value, right = value;
        if (residual != nullptr) {
          left = V::add(V::load(residual + c, mask...), value);
          right = V::add(V::load(residual + residual_pitch + c, mask...), value);
        }
        left.store(y + c, mask...);
        right.store(y + y_pitch + c, mask...);
      };
      int64_t c = 0;
      for (; c + L <= channels; c += L) write(c);
      if (c < channels) write(c, V::mask(0, channels - c));
    }
  }
}

}  // namespace
}  // namespace fusedsep
