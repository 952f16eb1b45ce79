// SPDX-License-Identifier: BSD-3-Clause
//
// The passes of training over d, which is computed from x in each of them: statistics; g1 and h; gd and the gradient of
// the depthwise weights; and gx from gd.
#pragma once

#include "columns-inl.h"

namespace fusedsep::cuda {

template <int kGroup, typename T>
FUSEDSEP_DEVICE void load_taps(const SeparableParams<T>& conv, int channel, float (&weights)[9][kGroup]) {
  const auto packed = packed_at<const T>(conv.packed, conv.in_channels, conv.out_channels);
#pragma unroll
  for (int tap = 0; tap < 9; ++tap) {
    const auto vector = load<kGroup>(packed.taps + tap * packed.in_padded + channel);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) weights[tap][i] = to_float(vector.values[i]);
  }
}

// d of a group of channels, and the numbers of x that it is made of, as the forward computes it.
template <Reading kReading, typename T>
struct Depthwise {
  static constexpr int kGroup = ColumnShape<kReading>::kGroup;
  int channel;
  TapSteps<T> steps;
  GroupOfMap<kReading> group;  // of x
  float weights[9][kGroup];
  float x[9][kGroup], d[kGroup];  // of the last pixel

  FUSEDSEP_DEVICE Depthwise(const SeparableParams<T>& conv, int channel)
      : channel(channel), steps(conv), group(conv.in_channels, channel, steps.channel) {
    load_taps(conv, channel, weights);
  }
  FUSEDSEP_DEVICE void compute(const PixelWalk<T>& walk) {
    const int mask = walk.taps();
    const T* row = walk.first_tap() + channel * steps.channel;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) d[i] = 0;
#pragma unroll
    for (int u = 0; u < 3; ++u, row += steps.row) {
      const T* place = row;
#pragma unroll
      for (int v = 0; v < 3; ++v, place += steps.column) {
        const int tap = 3 * u + v;
        group.load(place, mask >> tap & 1, x[tap]);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) d[i] = fmaf(weights[tap][i], x[tap][i], d[i]);
      }
    }
  }
};

// Values a channel of a group: of a padded row, of the first `count` of it, or zeros in the place of none.
template <int kGroup>
struct GroupRow {
  float values[kGroup];
  FUSEDSEP_DEVICE GroupRow(const float* row, int channel, int count = kGroup) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) values[i] = row != nullptr && i < count ? row[channel + i] : 0.0f;
  }
  FUSEDSEP_DEVICE float operator[](int i) const { return values[i]; }
};

template <Reading kReading, typename T>
__global__ void __launch_bounds__(kColumnThreads)
    depthwise_statistics_kernel(SeparableParams<T> conv, Columns columns, double* sums) {
  FUSEDSEP_SHARED(shared);
  constexpr int kGroup = ColumnShape<kReading>::kGroup;
  const ColumnThread<kReading> thread(columns);
  Depthwise<kReading, T> depthwise(conv, thread.channel());
  Moments<kGroup> moments;
  thread.each_pixel(conv, [&](const PixelWalk<T>& walk) {
    depthwise.compute(walk);
    moments.add(depthwise.d);
  });
  reduce_moments(thread, shared, moments, sums);
}

// u of a group of channels, and what it is made of.
template <Reading kReading, typename T>
struct Hidden {
  static constexpr int kGroup = ColumnShape<kReading>::kGroup;
  Depthwise<kReading, T> depthwise;
  Activation activation;
  GroupRow<kGroup> center, scale, shift;
  float distance[kGroup], h[kGroup];  // d - center, act1(u)

  FUSEDSEP_DEVICE Hidden(const TrainingParams<T>& p, int channel)
      : depthwise(p.conv, channel),
        activation(p.activation),
        center(p.affine1.center, channel),
        scale(p.affine1.scale, channel),
        shift(p.affine1.shift, channel) {}
  FUSEDSEP_DEVICE void compute(const PixelWalk<T>& walk) {
    depthwise.compute(walk);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) distance[i] = h[i] = depthwise.d[i] - center[i];
    normalize(activation, scale.values, shift.values, h);
  }
  FUSEDSEP_DEVICE float u(int i) const { return fmaf(distance[i], scale[i], shift[i]); }
};

// h as rows.
template <Reading kReading, typename T>
__global__ void __launch_bounds__(kColumnThreads) hidden_kernel(TrainingParams<T> p, T* h, Columns columns) {
  const ColumnThread<kReading> thread(columns);
  Hidden<kReading, T> hidden(p, thread.channel());
  const int64_t padded = columns.padded_channels();
  T* row = h + thread.first_pixel() * padded + thread.channel();
  thread.each_pixel(p.conv, [&](const PixelWalk<T>& walk) {
    hidden.compute(walk);
    hidden.depthwise.group.store_row(row, hidden.h);
    row += ColumnShape<kReading>::kPixelLanes * padded;
  });
}

// g1 in the place of gh, its sums, and h as rows.
template <Reading kReading, typename T>
__global__ void __launch_bounds__(kColumnThreads)
    activation_backward_kernel(TrainingParams<T> p, T* h, Columns columns, double* sums) {
  FUSEDSEP_SHARED(shared);
  constexpr int kGroup = ColumnShape<kReading>::kGroup;
  const SeparableParams<T>& conv = p.conv;
  const ColumnThread<kReading> thread(columns);
  const int channel = thread.channel();
  Hidden<kReading, T> hidden(p, channel);
  const auto group = group_of<kReading>(conv, conv.in_channels, channel);  // of g1
  float totals[2][kGroup] = {};
  const int64_t padded = columns.padded_channels();
  T* row = h + thread.first_pixel() * padded + channel;
  thread.each_pixel(conv, [&](const PixelWalk<T>& walk) {
    hidden.compute(walk);
    T* const to = p.g1 + place_of(walk, conv.in_channels, channel);
    float g[kGroup];
    group.load(to, true, g);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) g[i] = activation_gradient(p.activation, hidden.u(i), g[i]);
    group.store_row(row, hidden.h);
    row += ColumnShape<kReading>::kPixelLanes * padded;
    group.store(to, g);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      totals[0][i] += g[i];
      totals[1][i] = fmaf(g[i], hidden.distance[i], totals[1][i]);
    }
  });
  reduce_sums<kReading, 2>(thread, shared, totals, sums);
}

// gd in the place of g1, and the sums of gd * x at each tap.
template <Reading kReading, typename T>
__global__ void __launch_bounds__(kColumnThreads)
    depthwise_backward_kernel(TrainingParams<T> p, Columns columns, double* sums) {
  FUSEDSEP_SHARED(shared);
  constexpr int kGroup = ColumnShape<kReading>::kGroup;
  const SeparableParams<T>& conv = p.conv;
  const ColumnThread<kReading> thread(columns);
  const int channel = thread.channel();
  Depthwise<kReading, T> depthwise(conv, channel);
  const bool corrects = p.correction1.slope != nullptr;
  const GroupRow<kGroup> center(p.affine1.center, channel), scale(p.affine1.scale, channel),
      slope(p.correction1.slope, channel), offset(p.correction1.offset, channel);
  const auto group = group_of<kReading>(conv, conv.in_channels, channel);  // of g1
  float totals[9][kGroup] = {};
  thread.each_pixel(conv, [&](const PixelWalk<T>& walk) {
    depthwise.compute(walk);
    T* const to = p.g1 + place_of(walk, conv.in_channels, channel);
    float g[kGroup];
    group.load(to, true, g);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (corrects) g[i] -= fmaf(depthwise.d[i] - center[i], slope[i], offset[i]);
      g[i] *= scale[i];
    }
    group.store(to, g);
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) totals[tap][i] = fmaf(g[i], depthwise.x[tap][i], totals[tap][i]);
    }
  });
  reduce_sums<kReading, 9>(thread, shared, totals, sums);
}

// From sums of [9][padded channels] a slot.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads)
    depthwise_weight_kernel(SumsOf sums, int64_t padded_channels, int64_t channels, T* grad_weight) {
  const int64_t index = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (index >= 9 * channels) return;
  grad_weight[index] = from_float<T>(float(sums(0, index % 9 * padded_channels + index / 9)));
}

// gx of gd, which lies in the place of g1: what the taps of each pixel of x lead to. `columns` are those of x.
template <Reading kReading, typename T>
__global__ void __launch_bounds__(kColumnThreads) input_gradient_kernel(TrainingParams<T> p, Columns columns) {
  constexpr int kGroup = ColumnShape<kReading>::kGroup;
  const SeparableParams<T>& conv = p.conv;
  const ColumnThread<kReading> thread(columns);
  const int channel = thread.channel();
  if (channel >= conv.in_channels) return;
  float weights[9][kGroup];
  load_taps(conv, channel, weights);
  const auto group = group_of<kReading>(conv, conv.in_channels, channel);  // of gd
  SeparableParams<T> input = conv;                                         // a walk through the pixels of x
  input.out_height = conv.height, input.out_width = conv.width;
  const auto group_of_x = group_of<kReading>(input, conv.in_channels, channel);
  const int dilation = int(conv.dilation), odd = int(conv.stride) - 1;
  const int64_t map = conv.out_height * conv.out_width;
  const int64_t column_step = conv.channels_last ? conv.in_channels : 1, row_step = conv.out_width * column_step;
  thread.each_pixel(input, [&](const PixelWalk<T>& walk) {
    const int i = walk.row + int(conv.pad_top), j = walk.column + int(conv.pad_left);
    const T* const image = p.g1 + walk.image * conv.in_channels * map + channel * (conv.channels_last ? 1 : map);
    float total[kGroup] = {};
#pragma unroll
    for (int u = 0; u < 3; ++u) {
      const int row = i - u * dilation;
      const bool has_row = row >= 0 && (row & odd) == 0 && row >> odd < conv.out_height;
#pragma unroll
      for (int v = 0; v < 3; ++v) {
        const int column = j - v * dilation;
        const bool valid = has_row && column >= 0 && (column & odd) == 0 && column >> odd < conv.out_width;
        float gd[kGroup];
        group.load(image + (row >> odd) * row_step + (column >> odd) * column_step, valid, gd);
#pragma unroll
        for (int n = 0; n < kGroup; ++n) {
          if (valid) total[n] = fmaf(weights[3 * u + v][n], gd[n], total[n]);
        }
      }
    }
    group_of_x.store(p.grad_x + place_of(walk, conv.in_channels, channel), total);
  });
}

}  // namespace fusedsep::cuda
