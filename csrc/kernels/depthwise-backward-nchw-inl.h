// SPDX-License-Identifier: BSD-3-Clause
//
// Backward of the depthwise convolution in NCHW, for one channel of one image.
#pragma once

#include "gradient-rows-inl.h"

namespace fusedsep {
namespace {

// Scratch of one channel: masks of the vectors of an output row and of a row of gx, a line of d or gx, a line of gd,
// and the kept rows. Vectors may stick out behind a line by kLanes.
template <class V, int kStride>
struct PlaneScratch {
  using T = typename V::T;
  static constexpr int64_t kMaskElements = ceil_div(sizeof(ColumnMasks<V, kStride>), sizeof(T));
  static constexpr int64_t kUnitMaskElements = ceil_div(sizeof(ColumnMasks<V, 1>), sizeof(T));
  int64_t masks = 0, tap_masks, back_masks, line, gd, rows, row_pitch, size;

  explicit PlaneScratch(const SeparableParams<T>& conv) {
    constexpr int64_t L = V::kLanes;
    const int64_t vectors = ceil_div(conv.out_width, L), back_vectors = ceil_div(conv.width, L);
    tap_masks = round_up(masks + vectors * kMaskElements, 16);
    back_masks = round_up(tap_masks + vectors * kMaskElements, 16);
    line = round_up(back_masks + back_vectors * kUnitMaskElements, 16);
    gd = line + round_up(max_of(conv.out_width, conv.width) + L, 16);
    rows = gd + round_up(conv.out_width + L, 16);
    row_pitch = round_up(spread_width(conv) + L, 16);
    size = rows + kept_rows(conv) * row_pitch;
  }
};

template <class V, int kStride>
void depthwise_backward_nchw(const TrainingParams<typename V::T>& p, int64_t image, int64_t channel,
                             typename V::T* scratch, double* sums) {
  using T = typename V::T;
  constexpr int64_t L = V::kLanes;
  const SeparableParams<T>& conv = p.conv;
  const SeparableParams<T> back = transposed(conv);
  const PlaneScratch<V, kStride> layout(conv);
  const TrainingLayout<V> weights_layout(conv.in_channels, conv.out_channels, false, true);
  const int64_t plane = image * conv.in_channels + channel, padded = round_up(conv.in_channels, 16);
  const T* x = conv.x + plane * conv.height * conv.width;
  const T* g1 = p.g1 + plane * conv.out_height * conv.out_width;
  T *line = scratch + layout.line, *gd = scratch + layout.gd, *rows = scratch + layout.rows;
  const int64_t kept = kept_rows(conv), row_pitch = layout.row_pitch;

  // Masks of the taps of d; the same without the columns behind the last output column, which must not be multiplied by
  // gd's zeros there (0 * infinity); those of gx.
  auto* masks = reinterpret_cast<ColumnMasks<V, kStride>*>(scratch + layout.masks);
  auto* tap_masks = reinterpret_cast<ColumnMasks<V, kStride>*>(scratch + layout.tap_masks);
  auto* back_masks = reinterpret_cast<ColumnMasks<V, 1>*>(scratch + layout.back_masks);
  for (int64_t j = 0; j < conv.out_width; j += L) {
    masks[j / L] = ColumnMasks<V, kStride>::at(j, conv.width, conv.pad_left, conv.dilation);
    for (int v = 0; v < 3; ++v) {
      const int64_t shift = v * conv.dilation - conv.pad_left;
      const int64_t columns = min_of(conv.width, (conv.out_width - 1) * kStride + shift + 1);
      tap_masks[j / L].tap[v] = ColumnMasks<V, kStride>::at(j, columns, conv.pad_left, conv.dilation).tap[v];
    }
  }
  for (int64_t j = 0; j < conv.width; j += L) {
    back_masks[j / L] = ColumnMasks<V, 1>::at(j, back.width, back.pad_left, back.dilation);
  }
  if (kStride > 1) {
    for (int64_t i = 0; i < kept * row_pitch; ++i) rows[i] = 0;
  }

  V weight[9], reversed[9];
  for (int t = 0; t < 9; ++t) {
    weight[t] = V::broadcast(conv.packed[weights_layout.depthwise + 10 * channel + 1 + t]);
    reversed[t] = V::broadcast(conv.packed[weights_layout.reversed + 10 * channel + 1 + t]);
  }
  const V center = V::broadcast(p.affine1.center[channel]), scale = V::broadcast(p.affine1.scale[channel]);
  const StripCorrection<V, false> corrected(p.correction1, Strip{channel, 0, 0, 0, false});
  double totals[9][V::kLanes] = {};
  V tap_sums[9];
  int64_t terms = 0;
  const auto clear = [&] {
    for (V& sum : tap_sums) sum = V::zero();
    terms = 0;
  };
  const auto flush = [&] {
    for (int t = 0; t < 9; ++t) tap_sums[t].accumulate(totals[t]);
    clear();
  };
  clear();

  const auto grad_x_row = [&](int64_t i) {
    const T* row[3];
    for (int u = 0; u < 3; ++u) row[u] = row_of_gd(conv, rows, row_pitch, i, u);
    depthwise_row<V, 1>(row, back.width, back.pad_left, back.dilation, back_masks, V::zero(), reversed,
                        Activation::kNone, 0, conv.width, line);
    T* out = p.grad_x + (plane * conv.height + i) * conv.width;
    for (int64_t j = 0; j < conv.width; j += L) V::load(line + j).store(out + j, V::mask(0, conv.width - j));
  };

  int64_t next = 0;
  for (int64_t i = 0; i < conv.out_height; ++i) {
    const T* row[3];
    for (int u = 0; u < 3; ++u) {
      const int64_t r = i * kStride - conv.pad_top + u * conv.dilation;
      row[u] = r >= 0 && r < conv.height ? x + r * conv.width : nullptr;
    }
    depthwise_row<V, kStride>(row, conv.width, conv.pad_left, conv.dilation, masks, V::zero(), weight,
                              Activation::kNone, 0, conv.out_width, line);
    T* kept_row = rows + i % kept * row_pitch;
    for (int64_t j = 0; j < conv.out_width; j += L) {
      const auto mask = V::mask(0, conv.out_width - j);
      const V g = V::load(g1 + i * conv.out_width + j, mask);
      const V gradient = corrected(g, V::sub(V::load(line + j), center));
      V::zero().store(gd + j);
      V::mul(scale, gradient).store(gd + j, mask);
      if (kStride == 1) V::load(gd + j).store(kept_row + j);
    }
    if (kStride > 1) {
      for (int64_t j = 0; j < conv.out_width; ++j) kept_row[j * kStride] = gd[j];
    }

    for (int64_t j = 0; j < conv.out_width && sums != nullptr; j += L) {
      const V gradient = V::load(gd + j);
      FUSEDSEP_UNROLL(3)
      for (int u = 0; u < 3; ++u) {
        if (row[u] == nullptr) continue;
        FUSEDSEP_UNROLL(3)
        for (int v = 0; v < 3; ++v) {
          const int64_t first = j * kStride + v * conv.dilation - conv.pad_left;
          const bool inside = first >= 0 && j + L <= conv.out_width && first + (L - 1) * kStride < conv.width;
          const auto& mask = tap_masks[j / L].tap[v].lanes;
          V value;
          if constexpr (kStride == 1) {
            value = inside ? V::load(row[u] + first) : V::load(row[u] + first, mask);
          } else {
            value = inside ? V::load_even(row[u] + first) : V::load_even(row[u] + first, mask);
          }
          tap_sums[3 * u + v] = V::fma(gradient, value, tap_sums[3 * u + v]);
        }
      }
      if (++terms == kStripVectors) flush();
    }
    if (p.grad_x != nullptr) completed_rows(conv, i, next, grad_x_row);
  }
  if (sums == nullptr) return;
  flush();
  for (int t = 0; t < 9; ++t) sums[t * padded + channel] += sum_of_lanes<V>(totals[t]);
}

}  // namespace
}  // namespace fusedsep
