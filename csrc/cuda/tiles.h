// SPDX-License-Identifier: BSD-3-Clause
//
// Which tile of output pixels x output channels a block computes, chosen by cost.
//
// A block computes the depthwise result of its pixels once for every slice of output channels; that is what fusing
// costs, and what it saves is a map written and read. After FusePlanner (F. Qararyah et al., "Fusing Depthwise and
// Pointwise Convolutions for Efficient Inference on GPUs", 2024) the estimate counts what moves, here between L2 and
// one multiprocessor, beside what is computed there; the larger of the two is what a block takes. Per input channel:
//
//   multiply-adds   (9 + columns) * pixels                                      128 a cycle
//   shared memory   (tile_pixels + tile_columns) floats of each thread           32 a cycle
//   L2              kReach * pixels elements of x, columns floats of weights     64 bytes a cycle
//
// and a launch takes as many rounds of blocks as its busiest multiprocessor has to run: small maps come out at small
// tiles, which share the output channels among more blocks.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fusedsep::cuda {

struct Device {
  int64_t multiprocessors;
};

// Pixels and columns (output channels) of a block, and of each of its threads.
template <int pixels, int columns, int tile_pixels, int tile_columns>
struct Shape {
  static constexpr int kPixels = pixels, kColumns = columns, kTilePixels = tile_pixels, kTileColumns = tile_columns;
  static constexpr int kPixelThreads = pixels / tile_pixels, kColumnThreads = columns / tile_columns;
  static constexpr int kThreads = kPixelThreads * kColumnThreads;
  static constexpr int kDepth = 16;  // channels of a step of the reduction
};
// 64, 32 and 16 sums a thread. With the operands of a step, the first fills the 128 registers that two blocks of 256
// threads leave each thread of a multiprocessor with 65,536.
using Large = Shape<128, 128, 8, 8>;
using Medium = Shape<64, 64, 8, 4>;
using Small = Shape<32, 32, 4, 4>;

// f(shape) for the shape of that number.
constexpr int kShapes = 3;
template <class F>
void with_shape(int number, const F& f) {
  if (number == 0) return f(Small());
  if (number == 1) return f(Medium());
  return f(Large());
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// In cycles and input channels of the busiest multiprocessor.
template <class S>
double cost(int64_t pixels, int64_t columns, int64_t element_size, int64_t stride, const Device& device) {
  const int64_t blocks = ceil_div(pixels, S::kPixels) * ceil_div(columns, S::kColumns);
  const double reach = double(stride * stride);  // input pixels that an output pixel has to itself
  const double arithmetic = double((9 + S::kColumns) * S::kPixels) / 128;
  const double shared = double((S::kTilePixels + S::kTileColumns) * S::kThreads) / 32;
  const double moved = (reach * S::kPixels * double(element_size) + S::kColumns * 4.0) / 64;
  return double(ceil_div(blocks, device.multiprocessors)) * std::max({arithmetic, shared, moved});
}

// The number of the cheapest shape; of equal ones the smallest, which leaves the fewest pixels and channels unused.
inline int choose_shape(int64_t pixels, int64_t columns, int64_t element_size, int64_t stride, const Device& device) {
  int best = 0;
  double least = 0;
  for (int number = 0; number < kShapes; ++number) {
    with_shape(number, [&](auto shape) {
      const double estimate = cost<decltype(shape)>(pixels, columns, element_size, stride, device);
      if (number == 0 || estimate < least) {
        best = number;
        least = estimate;
      }
    });
  }
  return best;
}

}  // namespace fusedsep::cuda
