// SPDX-License-Identifier: BSD-3-Clause
//
// Backward of the depthwise convolution: training.h's gd, gx and gw1, for some channels of one image.
//
// Rows of gd are formed one after the other, from g1 and from d, which is computed again. Each is used while it is in
// the cache: for the weight gradient, and for the rows of gx that it completes. gx is the transposed convolution, which
// is a convolution of stride 1: of gd with stride - 1 zeros put between its columns (and rows, which are left out), by
// the taps in reverse order, with padding 2 * dilation - padding.
#pragma once

#include "training-inl.h"

namespace fusedsep {
namespace {

// Rows of gd that a row of gx can reach, and so the rows that must be kept.
template <typename T>
int64_t kept_rows(const SeparableParams<T>& conv) {
  return min_of(conv.out_height, 2 * conv.dilation / conv.stride + 1);
}

// Columns of gd with zeros in between.
template <typename T>
int64_t spread_width(const SeparableParams<T>& conv) {
  return (conv.out_width - 1) * conv.stride + 1;
}

// The transposed convolution as a convolution of stride 1 over spread rows; `x` is not used.
template <typename T>
SeparableParams<T> transposed(const SeparableParams<T>& conv) {
  SeparableParams<T> result = conv;
  result.stride = 1;
  result.pad_top = 2 * conv.dilation - conv.pad_top;
  result.pad_left = 2 * conv.dilation - conv.pad_left;
  result.width = spread_width(conv);
  result.out_height = conv.height;
  result.out_width = conv.width;
  return result;
}

// The kept row of gd for tap row `u` of row `i` of gx; null where there is none.
template <typename T>
FUSEDSEP_INLINE const T* row_of_gd(const SeparableParams<T>& conv, const T* rows, int64_t pitch, int64_t i, int u) {
  const int64_t spread = i + conv.pad_top - (2 - u) * conv.dilation;  // among rows with zeros in between
  if (spread < 0 || spread % conv.stride != 0 || spread / conv.stride >= conv.out_height) return nullptr;
  return rows + spread / conv.stride % kept_rows(conv) * pitch;
}

// Rows [begin, end) of gx are complete once row `i` of gd is: calls f(row) for them.
template <typename T, class F>
FUSEDSEP_INLINE void completed_rows(const SeparableParams<T>& conv, int64_t i, int64_t& next, const F& f) {
  const bool last = i + 1 == conv.out_height;
  for (; next < conv.height && (last || (next + conv.pad_top) / conv.stride <= i); ++next) f(next);
}

// ---------------------------------------------------------------------------------------------------- channels_last

// Columns [begin, end) of the output whose tap column v lies inside the map.
template <typename T>
FUSEDSEP_INLINE Block columns_inside(const SeparableParams<T>& conv, int v) {
  const int64_t shift = v * conv.dilation - conv.pad_left;  // of the tap against the output column times the stride
  const int64_t begin = shift < 0 ? ceil_div(-shift, conv.stride) : 0;
  const int64_t end = shift < conv.width ? min_of(conv.out_width, (conv.width - 1 - shift) / conv.stride + 1) : 0;
  return {begin, max_of(0, end - begin)};
}

// sums[v][...] += sum over j of gd[j] * x at tap column v, for one row and vector of channels. Four chains at a time,
// so that they do not wait for each other, of at most sixteen terms.
template <class V>
__attribute__((noinline)) void tap_gradients(const Block columns[3], const typename V::T* gd, int64_t gd_step,
                                             const typename V::T* const x[3], int64_t x_step, bool whole,
                                             typename V::Mask mask, double* sums, int64_t pitch) {
  for (int v = 0; v < 3; ++v) {
    const int64_t end = columns[v].begin + columns[v].size;
    for (int64_t j = columns[v].begin; j < end;) {
      const int64_t stop = min_of(end, j + 4 * 16);
      V sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
      for (; whole && j + 4 <= stop; j += 4) {
        FUSEDSEP_UNROLL(4)
        for (int k = 0; k < 4; ++k) {
          sum[k] = V::fma(V::load(gd + (j + k) * gd_step), V::load(x[v] + (j + k) * x_step), sum[k]);
        }
      }
      for (int k = 0; j < stop; ++j, k = (k + 1) % 4) {
        const V value = whole ? V::load(x[v] + j * x_step) : V::load(x[v] + j * x_step, mask);
        sum[k] = V::fma(V::load(gd + j * gd_step), value, sum[k]);
      }
      V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])).accumulate(sums + v * pitch);
    }
  }
}

template <class V>
void depthwise_backward_channels_last(const TrainingParams<typename V::T>& p, int64_t image, int64_t begin, int64_t end,
                                      typename V::T* scratch, double* sums) {
  using T = typename V::T;
  constexpr int64_t L = V::kLanes, kRows = Tiling<V>::kTileRows;
  static constexpr SegmentKernels<V> kKernels;
  const SeparableParams<T>& conv = p.conv;
  SeparableParams<T> back = transposed(conv);
  const int64_t channels = conv.in_channels, padded = round_up(channels, 16), group = round_up(end - begin, L);
  const TrainingLayout<V> layout(channels, conv.out_channels, true, true);
  const T* weights = conv.packed + layout.depthwise;
  const T* reversed = conv.packed + layout.reversed;
  const T* x = conv.x + image * conv.height * conv.width * channels;
  const T* g1 = p.g1 + image * conv.out_height * conv.out_width * channels;
  const int64_t row_pitch = back.width * group, kept = kept_rows(conv);
  T* line = scratch;  // of d, and of gx: a segment of one vector of channels
  T* rows = scratch + kRows * L;
  const auto all = V::mask(0, L);
  if (conv.stride > 1) {
    for (int64_t i = 0; i < kept * row_pitch; ++i) rows[i] = 0;
  }
  back.in_channels = group;  // the pitch of pixels in the kept rows
  const Reach reach(conv), back_reach(back);
  const Block columns[3] = {columns_inside(conv, 0), columns_inside(conv, 1), columns_inside(conv, 2)};

  const bool stream = streams<V, true>(p.grad_x, channels, conv.batch * conv.height * conv.width);
  const auto grad_x_row = [&](int64_t i) {
    T* out = p.grad_x + (image * conv.height + i) * conv.width * channels;
    for (int64_t j = 0, count; j < conv.width; j += count) {
      count = back_reach.run(j, min_of(kRows, conv.width - j));
      Segment<T> segment = segment_at(back, rows, 0, j);
      for (int u = 0; u < 3; ++u) {
        const T* row = row_of_gd(conv, rows, row_pitch, i, u);
        segment.row[u] = row == nullptr ? nullptr : row + segment.first_column * group;
      }
      const Taps taps = back_reach.taps(j);
      for (int64_t c = begin; c < end; c += L) {
        kKernels.table[int(taps)][count - 1](segment, c - begin, all, reversed + 10 * c, line);
        const auto mask = V::mask(0, channels - c);
        if (stream) {
          for (int64_t m = 0; m < count; ++m) V::load(line + m * L).stream(out + (j + m) * channels + c);
        } else {
          for (int64_t m = 0; m < count; ++m) V::load(line + m * L).store(out + (j + m) * channels + c, mask);
        }
      }
    }
  };

  int64_t next = 0;
  for (int64_t i = 0; i < conv.out_height; ++i) {
    T* gd = rows + i % kept * row_pitch;
    for (int64_t j = 0, count; j < conv.out_width; j += count) {
      count = reach.run(j, min_of(kRows, conv.out_width - j));
      const Segment<T> segment = segment_at(conv, x, i, j);
      const Taps taps = reach.taps(j);
      for (int64_t c = begin; c < end; c += L) {
        const bool whole = c + L <= channels;
        const auto mask = V::mask(0, channels - c);
        kKernels.table[int(whole ? taps : Taps::kChecked)][count - 1](segment, c, mask, weights + 10 * c, line);
        const V center = V::load(p.affine1.center + c), scale = V::load(p.affine1.scale + c);
        const StripCorrection<V, true> corrected(p.correction1, Strip{c, 0, 0, 0, false});
        for (int64_t m = 0; m < count; ++m) {
          const T* from = g1 + (i * conv.out_width + j + m) * channels + c;
          const V g = whole ? V::load(from) : V::load(from, mask);
          const V gradient = corrected(g, V::sub(V::load(line + m * L), center));
          V::mul(scale, gradient).store(gd + (j + m) * conv.stride * group + (c - begin));
        }
      }
    }
    if (sums != nullptr) {
      for (int u = 0; u < 3; ++u) {
        const int64_t row = i * conv.stride - conv.pad_top + u * conv.dilation;
        if (row < 0 || row >= conv.height) continue;
        for (int64_t c = begin; c < end; c += L) {
          const T* taps[3];
          for (int v = 0; v < 3; ++v)
            taps[v] = x + (row * conv.width + v * conv.dilation - conv.pad_left) * channels + c;
          tap_gradients<V>(columns, gd + (c - begin), conv.stride * group, taps, conv.stride * channels,
                           c + L <= channels, V::mask(0, channels - c), sums + 3 * u * padded + c, padded);
        }
      }
    }
    if (p.grad_x != nullptr) completed_rows(conv, i, next, grad_x_row);
  }
  if (stream) V::fence();
}

// ------------------------------------------------------------------------------------------------------------- NCHW

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
  for (int t = 0; t < 9; ++t) sums[t * padded + channel] = sum_of_lanes<V>(totals[t]);
}

template <class V>
int64_t depthwise_backward_channels(bool channels_last) {
  constexpr int64_t L = V::kLanes;
  return channels_last ? max_of(1, kChannelGroupBytes / int64_t(sizeof(typename V::T)) / L) * L : 1;
}

template <class V>
int64_t depthwise_backward_scratch_size(const TrainingParams<typename V::T>& p) {
  if (p.conv.channels_last) {
    const int64_t group = min_of(depthwise_backward_channels<V>(true), round_up(p.conv.in_channels, V::kLanes));
    return Tiling<V>::kTileRows * V::kLanes + kept_rows(p.conv) * spread_width(p.conv) * group;
  }
  return p.conv.stride == 1 ? PlaneScratch<V, 1>(p.conv).size : PlaneScratch<V, 2>(p.conv).size;
}

// Sums of the job's channels start at zero.
template <class V>
void depthwise_backward(const TrainingParams<typename V::T>& p, int64_t image, int64_t begin, int64_t end,
                        typename V::T* scratch, double* sums) {
  if (p.conv.channels_last) {
    const int64_t padded = round_up(p.conv.in_channels, 16), stop = min_of(padded, round_up(end, V::kLanes));
    for (int t = 0; t < 9 && sums != nullptr; ++t) {
      for (int64_t c = begin; c < stop; ++c) sums[t * padded + c] = 0;
    }
    depthwise_backward_channels_last<V>(p, image, begin, end, scratch, sums);
    return;
  }
  for (int64_t c = begin; c < end; ++c) {
    if (p.conv.stride == 1) {
      depthwise_backward_nchw<V, 1>(p, image, c, scratch, sums);
    } else {
      depthwise_backward_nchw<V, 2>(p, image, c, scratch, sums);
    }
  }
}

}  // namespace
}  // namespace fusedsep
