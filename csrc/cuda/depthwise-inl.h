// SPDX-License-Identifier: BSD-3-Clause
//
// Where the taps of an output pixel lie in x, and the depthwise result of a block's pixels.
#pragma once

#include "element.h"
#include "packed.h"

namespace fusedsep::cuda {

template <typename T>
FUSEDSEP_DEVICE Packed<T> packed_at(typename Packed<T>::Float* memory, int64_t in_channels, int64_t out_channels) {
  const int64_t in = padded(in_channels), out = padded(out_channels);
  T* const taps = reinterpret_cast<T*>(memory + 2 * in + 2 * out);
  return {memory, memory + 2 * in, taps, taps + 9 * in, in, out};
}

// Output pixel `first_pixel + i`. Divisions of 64 bits are slow, and a block needs one.
struct PixelPlace {
  int64_t image;
  uint32_t inside;  // pixel of the map
};
template <typename T>
struct Pixels {
  uint32_t map;
  PixelPlace first;

  FUSEDSEP_DEVICE Pixels(const SeparableParams<T>& p, int64_t first_pixel) : map(uint32_t(p.out_height * p.out_width)) {
    first = {first_pixel / map, uint32_t(first_pixel % map)};
  }
  FUSEDSEP_DEVICE PixelPlace operator[](int i) const {
    const uint32_t inside = first.inside + uint32_t(i);
    return inside < map ? PixelPlace{first.image, inside} : PixelPlace{first.image + inside / map, inside % map};
  }
};

// Output pixels `first`, `first + step`, ... of the batch: the first tap of each, and which taps are inside of the map.
template <typename T>
struct PixelWalk {
  const SeparableParams<T>& p;
  int image, row, column, image_step, row_step, column_step;

  FUSEDSEP_DEVICE PixelWalk(const SeparableParams<T>& p, int64_t first, int64_t step) : p(p) {
    const int64_t map = p.out_height * p.out_width;
    const uint32_t width = uint32_t(p.out_width), inside = uint32_t(first % map), inside_step = uint32_t(step % map);
    image = int(first / map), row = int(inside / width), column = int(inside % width);
    image_step = int(step / map), row_step = int(inside_step / width), column_step = int(inside_step % width);
  }
  FUSEDSEP_DEVICE void advance() {
    column += column_step, row += row_step, image += image_step;
    if (column >= p.out_width) column -= int(p.out_width), ++row;
    if (row >= p.out_height) row -= int(p.out_height), ++image;
  }
  FUSEDSEP_DEVICE bool at_end() const { return image >= p.batch; }
  // Bit 3 * u + v.
  FUSEDSEP_DEVICE int taps() const {
    const int i = row * int(p.stride) - int(p.pad_top), j = column * int(p.stride) - int(p.pad_left);
    int columns = 0, taps = 0;
#pragma unroll
    for (int v = 0; v < 3; ++v) columns |= int(unsigned(j + v * int(p.dilation)) < unsigned(p.width)) << v;
#pragma unroll
    for (int u = 0; u < 3; ++u) taps |= unsigned(i + u * int(p.dilation)) < unsigned(p.height) ? columns << 3 * u : 0;
    return taps;
  }
  FUSEDSEP_DEVICE const T* first_tap() const {
    const int64_t i = row * p.stride - p.pad_top, j = column * p.stride - p.pad_left;
    return p.x + image * p.in_channels * p.height * p.width + (i * p.width + j) * (p.channels_last ? p.in_channels : 1);
  }
};

// kGroup numbers of a row of values a channel.
template <int kGroup>
FUSEDSEP_DEVICE void load_row(const float* row, float (&values)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; i += kWide<float>) {
    const Vector<float> vector = load(row + i);
#pragma unroll
    for (int j = 0; j < kWide<float>; ++j) values[i + j] = vector.values[j];
  }
}

// Elements of x between the taps of a pixel, and between its channels.
template <typename T>
struct TapSteps {
  int64_t row, column, channel;
  FUSEDSEP_DEVICE explicit TapSteps(const SeparableParams<T>& p)
      : row(p.dilation * p.width * (p.channels_last ? p.in_channels : 1)),
        column(p.dilation * (p.channels_last ? p.in_channels : 1)),
        channel(p.channels_last ? 1 : p.height * p.width) {}
};

// The depthwise stage for kGroup channels from `channel` on.
template <typename T, int kGroup>
struct Group {
  Vector<T, kGroup> taps[9];
  const float* affine;  // loaded again for every pixel: registers are scarcer than reads of the L1 cache
  int64_t in_padded;

  FUSEDSEP_DEVICE Group(const Packed<const T>& weights, int channel)
      : affine(weights.affine1 + channel), in_padded(weights.in_padded) {
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) taps[tap] = load<kGroup>(weights.taps + tap * in_padded + channel);
  }
  // act1(affine1(d)), zero from `count` on.
  FUSEDSEP_DEVICE Vector<T, kGroup> finish(Activation activation, float (&sums)[kGroup], int64_t count) const {
    float scale[kGroup], shift[kGroup];
    load_row(affine, scale);
    load_row(affine + in_padded, shift);
    normalize(activation, scale, shift, sums);
    Vector<T, kGroup> h;
#pragma unroll
    for (int i = 0; i < kGroup; i += 2) {
      from_floats(i < count ? sums[i] : 0.0f, i + 1 < count ? sums[i + 1] : 0.0f, h.values + i);
    }
    return h;
  }
};

// h of kWide channels from `channel` on, for the pixels of a walk; x is read kWide channels at a time. write(n, h) gets
// what belongs to the n-th of `count` pixels; past the end of the batch that is any number. Taps outside of the map
// count as zeros.
template <typename T, class F>
FUSEDSEP_DEVICE void depthwise_vectors(const SeparableParams<T>& p, const Packed<const T>& weights, int channel,
                                       PixelWalk<T> walk, int count, const F& write) {
  constexpr int kGroup = kWide<T>;
  const TapSteps<T> steps(p);
  const bool inside = channel < p.in_channels;  // then they all are
  const Group<T, kGroup> group(weights, channel);
#pragma unroll 1
  for (int n = 0; n < count; ++n, walk.advance()) {
    const int mask = inside && !walk.at_end() ? walk.taps() : 0;
    const T* row = walk.first_tap() + channel;
    float sums[kGroup] = {};
#pragma unroll
    for (int u = 0; u < 3; ++u, row += steps.row) {
      const T* tap = row;
#pragma unroll
      for (int v = 0; v < 3; ++v, tap += steps.column) {
        Vector<T> x = {};
        if (mask >> (3 * u + v) & 1) x = load(tap);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          sums[i] = fmaf(to_float(group.taps[3 * u + v].values[i]), to_float(x.values[i]), sums[i]);
        }
      }
    }
    write(n, group.finish(p.activation, sums, inside ? kGroup : 0));
  }
}

// Channels of the same that a thread computes at a time where it reads them one by one.
constexpr int kElements = 4;

// The same for the pixel of a walk and each of `groups` groups of kElements channels, from `channel` on, `group_step`
// groups apart. write(n, h) gets the n-th group.
template <typename T, class F>
FUSEDSEP_DEVICE void depthwise_elements(const SeparableParams<T>& p, const Packed<const T>& weights, int channel,
                                        const PixelWalk<T>& walk, int groups, int group_step, const F& write) {
  const TapSteps<T> steps(p);
  const int mask = walk.at_end() ? 0 : walk.taps();
  const T* map = walk.first_tap() + channel * steps.channel;
#pragma unroll 1
  for (int n = 0; n < groups; ++n, channel += group_step * kElements) {
    const Group<T, kElements> group(weights, channel);
    const int64_t count = p.in_channels - channel;
    float sums[kElements] = {};
    const T* first = map;
#pragma unroll
    for (int i = 0; i < kElements; ++i, first += steps.channel) {
      const int inside = i < count ? mask : 0;
      const T* row = first;
#pragma unroll
      for (int u = 0; u < 3; ++u, row += steps.row) {
        const T* tap = row;
#pragma unroll
        for (int v = 0; v < 3; ++v, tap += steps.column) {
          const float x = inside >> (3 * u + v) & 1 ? to_float(*tap) : 0.0f;
          sums[i] = fmaf(to_float(group.taps[3 * u + v].values[i]), x, sums[i]);
        }
      }
    }
    write(n, group.finish(p.activation, sums, count));
    map += group_step * kElements * steps.channel;
  }
}

// h of kPixels pixels from `first_pixel` on, all channels, to rows of `pitch` elements, the last of which stay.
template <bool kVectors, int kPixels, int kThreads, typename T>
FUSEDSEP_DEVICE void depthwise_tile(const SeparableParams<T>& p, const Packed<const T>& weights, int64_t first_pixel,
                                    T* to, int pitch) {
  const int thread = int(threadIdx.x);
  if constexpr (kVectors) {
    // Neighbours read the next channels.
    const int groups = int(weights.in_padded) / kWide<T>;
    const int lanes = groups < kThreads ? groups : kThreads, pixel_lanes = kThreads / lanes;
    const int pixel = thread / lanes;
    if (pixel >= pixel_lanes) return;
    for (int group = thread % lanes; group < groups; group += lanes) {
      depthwise_vectors(p, weights, group * kWide<T>, PixelWalk<T>(p, first_pixel + pixel, pixel_lanes),
                        (kPixels - pixel + pixel_lanes - 1) / pixel_lanes, [&](int n, const Vector<T>& h) {
                          store(to + (pixel + n * pixel_lanes) * pitch + group * kWide<T>, h);
                        });
    }
  } else {
    // Neighbours read the next pixels.
    constexpr int kLanes = kThreads / kPixels;
    static_assert(kThreads % kPixels == 0);
    const int pixel = thread % kPixels, lane = thread / kPixels, groups = int(weights.in_padded) / kElements;
    T* const row = to + pixel * pitch;
    depthwise_elements(p, weights, lane * kElements, PixelWalk<T>(p, first_pixel + pixel, 0),
                       (groups - lane + kLanes - 1) / kLanes, kLanes,
                       [&](int n, const Vector<T, kElements>& h) { store(row + (lane + n * kLanes) * kElements, h); });
  }
}

}  // namespace fusedsep::cuda
