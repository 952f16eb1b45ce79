// SPDX-License-Identifier: BSD-3-Clause
//
// Rows of gd, the gradient of the depthwise map (training.h), as both memory formats keep them for gx.
//
// Rows of gd are formed one after the other, from g1 and from d, which is computed again (of a depthwise convolution
// alone, from grad_y and p, which are in memory). Each is used while it is in the cache: for the weight gradient, and
// for the rows of gx that it completes. gx is the transposed convolution, which is a convolution of stride 1: of gd
// with stride - 1 zeros put between its columns (and rows, which are left out), by the taps in reverse order, with
// padding (kernel - 1) * dilation - padding.
#pragma once

#include "training-inl.h"

namespace fusedsep {
namespace {

// From the first tap of a row or column to the last.
template <typename T>
FUSEDSEP_INLINE int64_t reach_of(const SeparableParams<T>& conv) {
  return (conv.kernel - 1) * conv.dilation;
}

// Rows of gd that a row of gx can reach, and so the rows that must be kept.
template <typename T>
int64_t kept_rows(const SeparableParams<T>& conv) {
  return min_of(conv.out_height, reach_of(conv) / conv.stride + 1);
}

// Columns of gd with zeros in between.
template <typename T>
int64_t spread_width(const SeparableParams<T>& conv) {
  return (conv.out_width - 1) * conv.stride + 1;
}

// The transposed convolution as a convolution of stride 1 over spread rows; `x` is not used.
template <typename T>
SeparableParams<T> transposed(const SeparableParams<T>& conv) {
  SeparableParams<T> result = conv;
  result.stride = 1;
  result.pad_top = reach_of(conv) - conv.pad_top;
  result.pad_left = reach_of(conv) - conv.pad_left;
  result.width = spread_width(conv);
  result.out_height = conv.height;
  result.out_width = conv.width;
  return result;
}

// The kept row of gd for tap row `u` of row `i` of gx; null where there is none.
template <typename T>
FUSEDSEP_INLINE const T* row_of_gd(const SeparableParams<T>& conv, const T* rows, int64_t pitch, int64_t i, int64_t u) {
  // Among rows with zeros in between.
  const int64_t spread = i + conv.pad_top - (conv.kernel - 1 - u) * conv.dilation;
  if (spread < 0 || spread % conv.stride != 0 || spread / conv.stride >= conv.out_height) return nullptr;
  return rows + spread / conv.stride % kept_rows(conv) * pitch;
}

// Rows [begin, end) of gx are complete once row `i` of gd is: calls f(row) for them.
template <typename T, class F>
FUSEDSEP_INLINE void completed_rows(const SeparableParams<T>& conv, int64_t i, int64_t& next, const F& f) {
  const bool last = i + 1 == conv.out_height;
  for (; next < conv.height && (last || (next + conv.pad_top) / conv.stride <= i); ++next) f(next);
}

}  // namespace
}  // namespace fusedsep
