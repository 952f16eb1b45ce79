// SPDX-License-Identifier: BSD-3-Clause
//
// Backward of the depthwise convolution: training.h's gd, gx and gw1, for some channels of some images.
#pragma once

#include "depthwise-backward-channels-last-inl.h"
#include "depthwise-backward-nchw-inl.h"
#include "depthwise-map-backward-inl.h"

namespace fusedsep {
namespace {

template <class V>
int64_t depthwise_backward_channels(bool channels_last) {
  constexpr int64_t L = V::kLanes;
  return channels_last ? max_of(1, kChannelGroupBytes / int64_t(sizeof(typename V::T)) / L) * L : 1;
}

template <class V>
int64_t depthwise_backward_scratch_size(const TrainingParams<typename V::T>& p) {
  if (p.conv.channels_last) {
    return GroupScratch<V>(p.conv, min_of(depthwise_backward_channels<V>(true), p.conv.in_channels)).size;
  }
  return p.conv.stride == 1 ? PlaneScratch<V, 1>(p.conv).size : PlaneScratch<V, 2>(p.conv).size;
}

template <class V>
void depthwise_backward(const TrainingParams<typename V::T>& p, int64_t first_image, int64_t last_image, int64_t begin,
                        int64_t end, typename V::T* scratch, double* sums) {
  if (p.conv.channels_last) {
    const GroupScratch<V> layout(p.conv, end - begin);
    for (int64_t i = 0; i < layout.size; ++i) scratch[i] = 0;
    int64_t pending = 0;
    for (int64_t image = first_image; image < last_image; ++image) {
      if (p.conv.rows == Rows::kDepthwiseMap) {
        depthwise_map_backward<V>(p, image, begin, layout, scratch, sums, pending);
      } else {
        depthwise_backward_channels_last<V>(p, image, begin, layout, scratch, sums, pending);
      }
    }
    const int64_t taps = p.conv.kernel * p.conv.kernel;
    for (int64_t v = 0; v < layout.vectors && sums != nullptr; ++v) {
      constexpr int64_t L = V::kLanes;
      add_taps<V>(scratch + layout.taps + taps * v * L, taps, sums + begin + v * L, round_up(p.conv.in_channels, 16));
    }
    return;
  }
  for (int64_t image = first_image; image < last_image; ++image) {
    for (int64_t c = begin; c < end; ++c) {
      if (p.conv.stride == 1) {
        depthwise_backward_nchw<V, 1>(p, image, c, scratch, sums);
      } else {
        depthwise_backward_nchw<V, 2>(p, image, c, scratch, sums);
      }
    }
  }
}

}  // namespace
}  // namespace fusedsep
