// SPDX-License-Identifier: BSD-3-Clause
//
// The passes of training over p and what surrounds it: y, the sums of the backward, and gp as rows.
#pragma once

#include "depthwise-training-inl.h"

namespace fusedsep::cuda {

// y = act((p - center) * scale + shift). Where `code` is not null it holds the code of the activation, a negative one
// for y = p.
template <Reading kReading, typename T>
__global__ void __launch_bounds__(kColumnThreads)
    normalize_kernel(SeparableParams<T> conv, Affine<float> affine, Activation activation, const float* code, T* y,
                     Columns columns) {
  constexpr int kGroup = ColumnShape<kReading>::kGroup;
  const ColumnThread<kReading> thread(columns);
  const int channel = thread.channel();
  if (channel >= conv.out_channels) return;
  const bool copies = code != nullptr && *code < 0;
  if (code != nullptr && !copies) activation = Activation(int(*code));
  const auto group = group_of<kReading>(conv, conv.out_channels, channel);
  const GroupRow<kGroup> center(affine.center, channel, group.count), scale(affine.scale, channel, group.count),
      shift(affine.shift, channel, group.count);
  thread.each_pixel(conv, [&](const PixelWalk<T>& walk) {
    const int64_t place = place_of(walk, conv.out_channels, channel);
    float values[kGroup];
    group.load(conv.y + place, true, values);
    if (!copies) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) values[i] -= center[i];
      normalize(activation, scale.values, shift.values, values);
    }
    group.store(y + place, values);
  });
}

// g2 of a pixel and a group of channels, and p - center.
template <Reading kReading, typename T>
struct ProductGradient {
  static constexpr int kGroup = ColumnShape<kReading>::kGroup;
  const TrainingParams<T>& p;
  int channel;
  GroupOfMap<kReading> group;
  GroupRow<kGroup> center, scale, shift;
  float g[kGroup], distance[kGroup];

  FUSEDSEP_DEVICE ProductGradient(const TrainingParams<T>& p, int channel)
      : p(p),
        channel(channel),
        group(group_of<kReading>(p.conv, p.conv.out_channels, channel)),
        center(p.affine2.center, channel),
        scale(p.affine2.scale, channel),
        shift(p.affine2.shift, channel) {}
  FUSEDSEP_DEVICE void compute(const PixelWalk<T>& walk) {
    const int64_t place = place_of(walk, p.conv.out_channels, channel);
    group.load(p.conv.y + place, true, distance);
    group.load(p.grad_y + place, true, g);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      distance[i] -= center[i];
      g[i] = activation_gradient(p.pointwise_activation, fmaf(distance[i], scale[i], shift[i]), g[i]);
    }
  }
};

template <Reading kReading, typename T>
__global__ void __launch_bounds__(kColumnThreads)
    normalize_backward_reduce_kernel(TrainingParams<T> p, Columns columns, double* sums) {
  FUSEDSEP_SHARED(shared);
  constexpr int kGroup = ColumnShape<kReading>::kGroup;
  const ColumnThread<kReading> thread(columns);
  ProductGradient<kReading, T> gradient(p, thread.channel());
  float totals[2][kGroup] = {};
  thread.each_pixel(p.conv, [&](const PixelWalk<T>& walk) {
    gradient.compute(walk);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      totals[0][i] += gradient.g[i];
      totals[1][i] = fmaf(gradient.g[i], gradient.distance[i], totals[1][i]);
    }
  });
  reduce_sums<kReading, 2>(thread, shared, totals, sums);
}

// gp as rows of padded(out_channels) elements, zero behind the last channel.
template <Reading kReading, typename T>
__global__ void __launch_bounds__(kColumnThreads) product_gradient_kernel(TrainingParams<T> p, T* gp, Columns columns) {
  constexpr int kGroup = ColumnShape<kReading>::kGroup;
  const ColumnThread<kReading> thread(columns);
  const int channel = thread.channel();
  const int64_t padded = columns.padded_channels();
  ProductGradient<kReading, T> gradient(p, channel);
  const bool corrects = p.correction2.slope != nullptr;
  const GroupRow<kGroup> slope(p.correction2.slope, channel), offset(p.correction2.offset, channel);
  T* row = gp + thread.first_pixel() * padded + channel;
  thread.each_pixel(p.conv, [&](const PixelWalk<T>& walk) {
    gradient.compute(walk);
    float values[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float g = corrects ? gradient.g[i] - fmaf(gradient.distance[i], slope[i], offset[i]) : gradient.g[i];
      values[i] = g * gradient.scale[i];
    }
    gradient.group.store_row(row, values);
    row += ColumnShape<kReading>::kPixelLanes * padded;
  });
}

// Pointwise weights transposed, as multiply_rows() takes them for gh of gp.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads)
    pack_transposed_kernel(const T* weight, int64_t in_channels, int64_t out_channels, float* memory) {
  const auto packed = packed_at<T>(memory, out_channels, in_channels);
  const int64_t index = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (index < packed.in_padded * in_channels) {
    const int64_t c = index / packed.in_padded, o = index % packed.in_padded;
    packed.product[index] = o < out_channels ? weight[o * in_channels + c] : T();
  }
  if (index >= packed.out_padded) return;
  packed.affine2[index] = index < in_channels ? 1.0f : 0.0f;
  packed.affine2[packed.out_padded + index] = 0;
}

}  // namespace fusedsep::cuda
