// SPDX-License-Identifier: BSD-3-Clause
//
// Where the taps of an output pixel lie in x, and the depthwise result of a block's pixels for a few channels.
#pragma once

#include "element.h"
#include "packed.h"

namespace fusedsep::cuda {

// The first tap of an output pixel; it and others may lie outside of the map.
struct Origin {
  int64_t offset;  // of its first channel from x
  int row, column;
};

// Of output pixel `pixel` of the batch. Past the last one: an origin whose taps are all outside.
template <typename T>
FUSEDSEP_DEVICE Origin origin_of(const SeparableParams<T>& p, int64_t pixel) {
  const int64_t map = p.out_height * p.out_width;
  if (pixel >= p.batch * map) return {0, -1 - 2 * int(p.dilation), 0};
  const int64_t image = pixel / map, inside = pixel % map;
  const int64_t row = inside / p.out_width * p.stride - p.pad_top,
                column = inside % p.out_width * p.stride - p.pad_left;
  const int64_t first = image * p.in_channels * p.height * p.width;
  return {first + (row * p.width + column) * (p.channels_last ? p.in_channels : 1), int(row), int(column)};
}

template <typename T>
FUSEDSEP_DEVICE bool has_tap(const SeparableParams<T>& p, const Origin& origin, int u, int v) {
  // The binding checks that rows and columns of taps fit in an int.
  return unsigned(origin.row + u * int(p.dilation)) < unsigned(p.height) &&
         unsigned(origin.column + v * int(p.dilation)) < unsigned(p.width);
}
// From the first tap.
template <typename T>
FUSEDSEP_DEVICE int64_t tap_offset(const SeparableParams<T>& p, int u, int v) {
  return (u * p.dilation * p.width + v * p.dilation) * (p.channels_last ? p.in_channels : 1);
}

template <class W>
FUSEDSEP_DEVICE float affine(const W* rows, int64_t padded, int64_t channel, float value) {
  return fmaf(value - rows[channel], rows[padded + channel], rows[2 * padded + channel]);
}

// h of S::kDepth channels from `first` on, for the pixels of `origins`: to[channel][pixel]. Channels behind the last
// are zero.
//
// channels_last: a thread computes kVector channels of each of its pixels, neighbours the next channels. NCHW: it
// computes some channels of one pixel, neighbours the next pixels. Either way the taps of a warp are neighbours in
// memory, and what an address and the test for the border cost is shared by all that a thread computes from them.
template <class S, bool kChannelsLast, typename T, int kPitch>
FUSEDSEP_DEVICE void depthwise(const SeparableParams<T>& p, const Packed<const float>& weights, const Origin* origins,
                               bool vectors, int first, float (*to)[kPitch]) {
  const int thread = int(threadIdx.x);
  if constexpr (kChannelsLast) {
    constexpr int kVectors = S::kDepth / kVector, kStep = S::kThreads / kVectors, kUnits = S::kPixels / kStep;
    static_assert(S::kThreads % kVectors == 0 && S::kPixels % kStep == 0);
    const int k = thread % kVectors * kVector, pixel = thread / kVectors;
    const int channel = first + k;
    float sums[kUnits][kVector] = {};
#pragma unroll 1
    for (int u = 0; u < 3; ++u) {
#pragma unroll
      for (int v = 0; v < 3; ++v) {
        float weight[kVector];
        load(weights.taps + (3 * u + v) * weights.in_padded + channel, true, kVector, weight);
        const T* tap = p.x + tap_offset(p, u, v) + channel;
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
          const Origin origin = origins[pixel + unit * kStep];
          if (!has_tap(p, origin, u, v)) continue;
          float x[kVector];
          load(tap + origin.offset, vectors, p.in_channels - channel, x);
#pragma unroll
          for (int i = 0; i < kVector; ++i) sums[unit][i] = fmaf(weight[i], x[i], sums[unit][i]);
        }
      }
    }
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        to[k + i][pixel + unit * kStep] =
            activate(p.activation, affine(weights.affine1, weights.in_padded, channel + i, sums[unit][i]));
      }
    }
  } else {
    constexpr int kStep = S::kThreads / S::kPixels, kUnits = S::kDepth / kStep;
    static_assert(S::kThreads % S::kPixels == 0 && S::kDepth % kStep == 0);
    const int pixel = thread % S::kPixels, k = thread / S::kPixels;
    const int64_t next = kStep * p.height * p.width;
    const int count = int(p.in_channels) - first - k;
    const Origin origin = origins[pixel];
    float sums[kUnits] = {};
#pragma unroll 1
    for (int u = 0; u < 3; ++u) {
#pragma unroll 1
      for (int v = 0; v < 3; ++v) {
        if (!has_tap(p, origin, u, v)) continue;
        const T* tap = p.x + origin.offset + tap_offset(p, u, v) + (first + k) * p.height * p.width;
        const float* weight = weights.taps + (3 * u + v) * weights.in_padded + first + k;
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit, tap += next) {
          if (unit * kStep < count) sums[unit] = fmaf(weight[unit * kStep], to_float(*tap), sums[unit]);
        }
      }
    }
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const int channel = first + k + unit * kStep;
      to[k + unit * kStep][pixel] =
          activate(p.activation, affine(weights.affine1, weights.in_padded, channel, sums[unit]));
    }
  }
}

}  // namespace fusedsep::cuda
