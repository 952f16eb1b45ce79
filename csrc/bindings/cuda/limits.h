// SPDX-License-Identifier: BSD-3-Clause
//
// What the kernels take on a GPU: types, and sizes.
#pragma once

#include "../../cuda/types.h"
#include "../geometry.h"
#include "../tensors.h"

namespace fusedsep::cuda {

// f(T()) for the element type.
template <class F>
auto dispatch(const char* name, ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) return f(0.0f);
  if (dtype == ScalarType::Half) return f(float16());
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16, name, " must be float32, float16 or bfloat16");
  return f(bfloat16());
}

// What the kernels count in an int: channels, rows and columns of taps, images, pixels of an output map.
constexpr int64_t kMost = int64_t(1) << 30;

inline void check_input_size(const Tensor& x, const Geometry& g) {
  check_range("channels of x", x.size(1), 1, kMost);
  STD_TORCH_CHECK(
      x.size(0) < kMost && x.size(2) + g.pad_top + g.pad_bottom < kMost && x.size(3) + g.pad_left + g.pad_right < kMost,
      "x must have fewer than 2^30 images, rows and columns with its padding on a GPU");
}
inline void check_map_size(const char* name, int64_t height, int64_t width) {
  STD_TORCH_CHECK(height * width < 2 * kMost, name, " must have fewer than 2^31 pixels an image on a GPU");
}

}  // namespace fusedsep::cuda
