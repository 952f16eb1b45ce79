// SPDX-License-Identifier: BSD-3-Clause
//
// How a call is cut into blocks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "packed.h"

namespace fusedsep::cuda {

struct Device {
  int64_t multiprocessors;
  int64_t shared_bytes;  // that a block may have
  bool has_tf32 = true;  // and bfloat16 products: from compute capability 8.0 on
};

// Pixels and columns (output channels) that a block multiplies at a time, cut into warps.
template <int pixels, int columns, int pixel_warps, int column_warps, int blocks>
struct Shape {
  static constexpr int kPixels = pixels, kColumns = columns, kPixelWarps = pixel_warps, kColumnWarps = column_warps;
  static constexpr int kWarpPixels = pixels / pixel_warps, kWarpColumns = columns / column_warps;
  static constexpr int kThreads = 32 * pixel_warps * column_warps, kBlocks = blocks;
};
using Large = Shape<128, 128, 2, 4, 1>;
using Medium = Shape<64, 128, 1, 4, 1>;
using Small = Shape<32, 64, 1, 4, 3>;

// Blocks that find registers on a multiprocessor beside each other: as many as can be had without a spill.
template <class S, typename T>
constexpr int kBlocks = sizeof(T) == 2 && S::kBlocks > 2 ? 2 : S::kBlocks;

// f(shape) for the shape of that number.
constexpr int kShapes = 3;
template <class F>
auto with_shape(int number, const F& f) {
  if (number == 0) return f(Small());
  if (number == 1) return f(Medium());
  return f(Large());
}

// Either h of a block's pixels is in its shared memory, all channels of it (fused), or a first kernel writes h to
// memory.
struct Plan {
  int shape;
  bool fused;
  int64_t slices;  // blocks that share the output channels of a tile of pixels
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Operands come from memory kChunkBytes of k at a time, kStages chunks on their way. A row has 16 bytes more than that,
// so that eight rows lie in different banks.
constexpr int kChunkBytes = 128, kStages = 3, kRowPadding = 16, kChunkPitch = kChunkBytes + kRowPadding;

// Shared memory of a block, in bytes.
template <class S, typename T>
struct SharedLayout {
  static constexpr int64_t kTile =  // of y, in either format
      std::max(S::kPixels * (S::kColumns * int64_t(sizeof(T)) + kRowPadding),
               S::kColumns*(S::kPixels* int64_t(sizeof(T)) + kRowPadding));
  static constexpr int64_t stages(bool fused) {
    return std::max<int64_t>(kStages * (S::kColumns + (fused ? 0 : S::kPixels)) * kChunkPitch, kTile);
  }
  // A row of h in a fused kernel: whole chunks.
  static constexpr int64_t row(int64_t in_padded) {
    return ceil_div(in_padded * int64_t(sizeof(T)), kChunkBytes) * kChunkBytes + kRowPadding;
  }
  static constexpr int64_t size(bool fused, int64_t in_padded) {
    return stages(fused) + (fused ? S::kPixels * row(in_padded) : 0);
  }
};

// An estimate of cycles of the busiest multiprocessor, after FusePlanner (F. Qararyah et al., "Fusing Depthwise and
// Pointwise Convolutions for Efficient Inference on GPUs", 2024): what is computed, and what moves. A block of a
// product takes for each input channel the largest of
//
//   multiply-adds   pixels * columns                        kFma or kTensor16 a cycle, half of these in TF32
//   shared memory   (pixels + columns) of each warp         128 bytes a cycle
//   L2              pixels + columns                        64 bytes a cycle
//
// and the depthwise stage a few cycles for each element of h. Not fused, both are spread over the multiprocessors each
// for itself, h goes through memory (which the stage's figure contains) and one more kernel starts; fused, a block does
// one after the other, the depthwise stage again for each slice of the output channels. The stage's figures and kLaunch
// were measured on an H100 (132 multiprocessors).
constexpr double kFma = 128, kTensor16 = 1024, kLaunch = 4000;
inline double depthwise_cycles(bool fused, bool vectors, int64_t element_size) {
  if (vectors) return fused ? 2.0 : 0.85;
  return fused && element_size == 2 ? 3.0 : 2.0;  // an element at a time is also converted at a time
}

template <class S>
double product_cycles(int64_t element_size, bool tensor_cores) {
  const double rate = !tensor_cores ? kFma : element_size == 2 ? kTensor16 : kTensor16 / 2;
  const double warps = S::kPixelWarps * S::kColumnWarps;
  return std::max({S::kPixels * S::kColumns / rate,
                   warps * (S::kWarpPixels + S::kWarpColumns) * double(element_size) / 128,
                   (S::kPixels + S::kColumns) * double(element_size) / 64});
}

// The cheapest plan; of equal ones the one with the largest tiles, which moves least.
template <typename T>
Plan choose_plan(const SeparableParams<T>& p, bool vectors, bool tensor_cores, const Device& device) {
  const int64_t pixels = p.batch * p.out_height * p.out_width, channels = padded(p.in_channels);
  const auto rounds = [&](int64_t blocks) { return double(ceil_div(blocks, device.multiprocessors)); };
  Plan best{};
  double least = 0;
  const auto consider = [&](const Plan& plan, double cycles) {
    if (least == 0 || cycles <= least) best = plan, least = cycles;
  };
  for (int number = 0; number < kShapes; ++number) {
    with_shape(number, [&](auto shape) {
      using S = decltype(shape);
      const int64_t tiles = ceil_div(p.out_channels, S::kColumns), groups = ceil_div(pixels, S::kPixels);
      const double product = double(channels) * product_cycles<S>(sizeof(T), tensor_cores);
      if (SharedLayout<S, T>::size(false, channels) <= device.shared_bytes) {
        consider({number, false, tiles}, rounds(groups * tiles) * product + kLaunch +
                                             depthwise_cycles(false, vectors, sizeof(T)) * double(pixels * channels) /
                                                 double(device.multiprocessors));
      }
      if (SharedLayout<S, T>::size(true, channels) > device.shared_bytes) return;
      for (int64_t slices = 1; slices <= tiles; slices *= 2) {
        consider({number, true, slices}, rounds(groups * slices) * (double(ceil_div(tiles, slices)) * product +
                                                                    depthwise_cycles(true, vectors, sizeof(T)) *
                                                                        double(S::kPixels * channels)));
      }
    });
  }
  return best;
}

// Of a product whose rows are in memory.
template <typename T>
int choose_shape_for_rows(const SeparableParams<T>& p, bool tensor_cores, const Device& device) {
  const int64_t pixels = p.batch * p.out_height * p.out_width, channels = padded(p.in_channels);
  int best = 0;
  double least = 0;
  for (int number = 0; number < kShapes; ++number) {
    with_shape(number, [&](auto shape) {
      using S = decltype(shape);
      if (SharedLayout<S, T>::size(false, channels) > device.shared_bytes) return;
      const int64_t blocks = ceil_div(p.out_channels, S::kColumns) * ceil_div(pixels, S::kPixels);
      const double cycles =
          double(ceil_div(blocks, device.multiprocessors)) * product_cycles<S>(sizeof(T), tensor_cores);
      if (least == 0 || cycles <= least) best = number, least = cycles;
    });
  }
  return best;
}

}  // namespace fusedsep::cuda
