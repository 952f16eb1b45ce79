// SPDX-License-Identifier: BSD-3-Clause
//
// The largest numbers of neighbouring pixels, in channels_last.
#pragma once

#include "layout-inl.h"
#include "separable.h"

namespace fusedsep {
namespace {

// The taps of one output row or column that lie inside a map of `size`.
struct Inside {
  int64_t begin, end;

  Inside(int64_t first, int64_t kernel, int64_t size) : begin(max_of(0, first)), end(min_of(size, first + kernel)) {}
};

template <class V>
void max_pool(const SeparableParams<typename V::T>& p, int64_t row_begin, int64_t row_end) {
  using T = typename V::T;
  constexpr int64_t L = V::kLanes;
  const int64_t pitch = x_pitch_of(p), y_pitch = y_pitch_of(p), channels = p.in_channels;
  const auto all = V::mask(0, L);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* const image = p.x + row / p.out_height * p.height * p.width * pitch;
    const Inside rows(row % p.out_height * p.stride - p.pad_top, p.kernel, p.height);
    for (int64_t j = 0; j < p.out_width; ++j) {
      const Inside columns(j * p.stride - p.pad_left, p.kernel, p.width);
      T* const y = p.y + (row * p.out_width + j) * y_pitch;
      for (int64_t c = 0; c < channels; c += L) {
        const bool whole = c + L <= channels;
        const auto mask = whole ? all : V::mask(0, channels - c);
        V most = V::broadcast(T(-__builtin_inf())), nan = V::zero();
        for (int64_t u = rows.begin; u < rows.end; ++u) {
          const T* x = image + (u * p.width + columns.begin) * pitch + c;
          for (int64_t v = columns.begin; v < columns.end; ++v, x += pitch) {
            const V value = whole ? V::load(x) : V::load(x, mask);
            most = V::max(most, value);
            nan = V::select_above(value, value, value, nan);  // of a NaN alone it is not false
          }
        }
        const V result = V::select_above(nan, nan, nan, most);
        if (whole) {
          result.store(y + c);
        } else {
          result.store(y + c, mask);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fusedsep
