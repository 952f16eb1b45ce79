// SPDX-License-Identifier: BSD-3-Clause
//
// The size of a map and the checks on the numbers that make it, for both bindings.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fusedsep {

struct Geometry {
  int64_t stride, dilation, pad_left, pad_right, pad_top, pad_bottom, activation, pointwise_activation;
  int64_t kernel = 3;  // taps in a row and in a column
};

inline void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) {
    throw std::invalid_argument(std::string(name) + " must be from " + std::to_string(least) + " to " +
                                std::to_string(most) + ", got " + std::to_string(value));
  }
}

constexpr int64_t kLastActivation = 3;         // of a separable convolution
constexpr int64_t kLastTrainedActivation = 4;  // in training of one convolution, which also knows SiLU
constexpr int64_t kLastLayerActivation = 7;    // of the layers of a chain

inline void check_geometry(const Geometry& g, int64_t last_activation = kLastActivation) {
  constexpr int64_t kMost = 1 << 30;  // sums of a few of them stay far from overflow
  check_range("stride", g.stride, 1, 2);
  check_range("dilation", g.dilation, 1, kMost);
  check_range("pad_left", g.pad_left, 0, kMost);
  check_range("pad_right", g.pad_right, 0, kMost);
  check_range("pad_top", g.pad_top, 0, kMost);
  check_range("pad_bottom", g.pad_bottom, 0, kMost);
  check_range("activation", g.activation, 0, last_activation);
  check_range("pointwise_activation", g.pointwise_activation, 0, last_activation);
}

// Rows or columns of the output. Throws std::invalid_argument where the kernel does not fit.
inline int64_t output_size(const char* what, int64_t size, int64_t pad_before, int64_t pad_after, const Geometry& g) {
  const int64_t room = size + pad_before + pad_after - (g.kernel - 1) * g.dilation - 1;
  if (size < 1 || room < 0) {
    throw std::invalid_argument(std::string("x is too small: ") + what + " " + std::to_string(size) + " with padding " +
                                std::to_string(pad_before) + " and " + std::to_string(pad_after) + " does not hold a " +
                                std::to_string(g.kernel) + "x" + std::to_string(g.kernel) + " kernel of dilation " +
                                std::to_string(g.dilation));
  }
  return room / g.stride + 1;
}

// Elements of a map batch. Throws std::invalid_argument when it cannot be addressed.
inline int64_t element_count(int64_t a, int64_t b, int64_t c, int64_t d) {
  int64_t count;
  if (__builtin_mul_overflow(a, b, &count) || __builtin_mul_overflow(count, c, &count) ||
      __builtin_mul_overflow(count, d, &count) || count > (int64_t(1) << 58)) {
    throw std::invalid_argument("the output would have more elements than memory can address");
  }
  return count;
}

}  // namespace fusedsep
