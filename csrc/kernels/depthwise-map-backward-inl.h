// SPDX-License-Identifier: BSD-3-Clause
//
// Training of a depthwise convolution by itself, of 3x3, 5x5 or 7x7 taps, in channels_last: p with its statistics, and
// the backward from p, which is in memory. Rows of gd are formed from p and gy, and stay in the cache for the weight
// gradient and for gx, which is made by the forward's kernel.
#pragma once

#include "gradient-groups-inl.h"
#include "sigmoid-inl.h"

namespace fusedsep {
namespace {

// The taps as depthwise_map() reads them, without a bias; in reverse order for gx.
template <class V>
void pack_taps(const typename V::T* weight, int64_t channels, int64_t kernel, bool reversed, typename V::T* packed) {
  constexpr int64_t L = V::kLanes;
  const int64_t taps = kernel * kernel, size = depthwise_map_packed_size<V>(channels, kernel);
  for (int64_t i = 0; i < size; ++i) packed[i] = 0;
  for (int64_t c = 0; c < channels; ++c) {
    typename V::T* channel = packed + c / L * L * (1 + taps) + c % L;
    for (int64_t t = 0; t < taps; ++t) channel[(1 + t) * L] = weight[taps * c + (reversed ? taps - 1 - t : t)];
  }
}

// p of output rows [row_begin, row_end), counted on from image to image, for some lines of channels, and its mean and
// squared differences, sums[0][c] and sums[1][c], unless `sums` is null.
template <class V>
void depthwise_map_forward(const TrainingParams<typename V::T>& p, int64_t row_begin, int64_t row_end,
                           int64_t channel_begin, int64_t channel_end, typename V::T* scratch, double* sums) {
  using T = typename V::T;
  constexpr int64_t kLine = kLineVectors<V> * V::kLanes;
  static_assert(kLine <= 16, "the sums of a line");
  const SeparableParams<T>& conv = p.conv;
  const int64_t channels = conv.in_channels, padded = round_up(channels, 16);
  const int64_t pixels = (row_end - row_begin) * conv.out_width;
  for (int64_t line = channel_begin; line < channel_end; line += kLine) {
    const int64_t end = min_of(line + kLine, channel_end);
    depthwise_map<V>(conv, row_begin, row_end, line, end, scratch);
    if (sums == nullptr) continue;
    T means[16];
    double line_sums[2 * 16];
    const T* const map = conv.y + row_begin * conv.out_width * channels + line;
    tile_statistics<V, true>(end - line, pixels, kStripVectors, 16, line_sums, means,
                             [&](const Strip& strip) { return in_map<V, true>(map, channels, strip); });
    for (int64_t c = line; c < end; ++c) {
      sums[c] = line_sums[c - line];
      sums[padded + c] = line_sums[16 + c - line];
    }
  }
}

// Sums of a tap, of pixels in turns: enough chains of FMAs for their latency, in 16 registers at most.
constexpr int tap_sums(int64_t kernel) { return kernel > 5 ? 1 : 2; }
// Pixels whose products with a tap are added up in T.
constexpr int64_t chained_pixels(int64_t kernel) { return 16 * tap_sums(kernel); }

// taps[v] += sum over pixels j of gd[j * kStride] * x[j * kStride + v], vectors all, for a row of taps.
//
// Registers: the sums and a gradient, 11 at most; x is an operand of the FMAs.
template <class V, int kKernel, int kStride>
__attribute__((noinline)) void row_of_tap_gradients(const typename V::T* gd, const typename V::T* x, int64_t pixels,
                                                    typename V::T* taps) {
  constexpr int L = V::kLanes, kSums = tap_sums(kKernel);
  V sum[kSums][kKernel];
  const auto add = [&](int m) __attribute__((always_inline)) {
    const V gradient = V::load(gd + m * kStride * L);
    FUSEDSEP_UNROLL(7)
    for (int v = 0; v < kKernel; ++v) sum[m][v] = V::fma(gradient, V::load(x + (m * kStride + v) * L), sum[m][v]);
  };
  FUSEDSEP_UNROLL(2)
  for (int m = 0; m < kSums; ++m) {
    FUSEDSEP_UNROLL(7)
    for (int v = 0; v < kKernel; ++v) sum[m][v] = V::zero();
  }
  FUSEDSEP_UNROLL(1)
  for (; pixels >= kSums; pixels -= kSums, gd += kSums * kStride * L, x += kSums * kStride * L) {
    FUSEDSEP_UNROLL(2)
    for (int m = 0; m < kSums; ++m) add(m);
  }
  if (pixels > 0) add(0);
  FUSEDSEP_UNROLL(7)
  for (int v = 0; v < kKernel; ++v) {
    const V total = kSums == 1 ? sum[0][v] : V::add(sum[0][v], sum[kSums - 1][v]);
    V::add(V::load(taps + v * L), total).store(taps + v * L);
  }
}

template <class V>
using RowOfTapGradients = void (*)(const typename V::T*, const typename V::T*, int64_t, typename V::T*);

template <class V>
RowOfTapGradients<V> row_of_tap_gradients_for(int64_t kernel, int64_t stride) {
  static constexpr RowOfTapGradients<V> kTable[3][2] = {
      {row_of_tap_gradients<V, 3, 1>, row_of_tap_gradients<V, 3, 2>},
      {row_of_tap_gradients<V, 5, 1>, row_of_tap_gradients<V, 5, 2>},
      {row_of_tap_gradients<V, 7, 1>, row_of_tap_gradients<V, 7, 2>},
  };
  return kTable[kernel / 2 - 1][stride - 1];
}

// gd of one output row, for the vectors of a group, to where it is kept.
template <class V>
void keep_gradient_row(const TrainingParams<typename V::T>& p, int64_t row, int64_t begin,
                       const GroupScratch<V>& layout, typename V::T* kept) {
  using T = typename V::T;
  constexpr int64_t L = V::kLanes;
  const SeparableParams<T>& conv = p.conv;
  const int64_t channels = conv.out_channels;
  const Activation activation = p.pointwise_activation;
  for (int64_t v = 0; v < layout.vectors; ++v) {
    const Strip strip{begin + v * L, row * conv.out_width, conv.out_width, min_of(L, channels - begin - v * L), false};
    const auto values = in_map<V, true>(conv.y, channels, strip);
    const auto gradients = in_map<V, true>(p.grad_y, channels, strip);
    const StripAffine<V, true> affine(p.affine2, strip);
    const StripCorrection<V, true> corrected(p.correction2, strip);
    T* to = kept + (v * layout.gd_columns + layout.gd_first) * L;
    for (int64_t j = 0; j < strip.count; ++j, to += conv.stride * L) {
      __builtin_prefetch(values.at(j + strip.count), 0, 2);  // the next row
      __builtin_prefetch(gradients.at(j + strip.count), 0, 2);
      const V value = values.load(strip, j);
      const V g = activation_gradient_any(activation, affine(value), gradients.load(strip, j));
      V::mul(affine.scale, corrected(g, V::sub(value, affine.center))).store(to);
    }
  }
}

// Channels [begin, end) of one image; arguments as those of depthwise_backward_channels_last().
template <class V>
void depthwise_map_backward(const TrainingParams<typename V::T>& p, int64_t image, int64_t begin,
                            const GroupScratch<V>& layout, typename V::T* scratch, double* sums, int64_t& pending) {
  using T = typename V::T;
  constexpr int64_t L = V::kLanes;
  static constexpr MapKernels<V> kMapKernels;
  const SeparableParams<T>& conv = p.conv;
  const int64_t channels = conv.in_channels, kernel = conv.kernel, taps = kernel * kernel;
  const int64_t chained = chained_pixels(kernel);
  const T* const x = conv.x + image * conv.height * conv.width * channels;
  const bool stream = streams<V, true>(p.grad_x, channels, conv.batch * conv.height * conv.width);
  const auto& grad_x_kernels = kMapKernels.table[kernel / 2 - 1][0];
  const auto add_row = row_of_tap_gradients_for<V>(kernel, conv.stride);

  const auto complete_row = [&](int64_t i) {
    MapSegment<V> segment{};
    segment.activation = Activation::kNone;
    segment.y = scratch + layout.line;
    segment.y_stride = L;
    segment.whole = true;
    write_grad_x_row<V>(p, image, i, begin, layout, scratch, kMapPixels<V>, stream, [&](int64_t v, const Block& block) {
      const int64_t first = v * layout.gd_columns + GroupScratch<V>::first_of_gx(conv) + block.begin;
      for (int64_t u = 0; u < kernel; ++u) {
        const T* row = row_of_gd(conv, scratch + layout.gd, layout.gd_pitch, i, u);
        segment.row[u] = row == nullptr ? nullptr : row + first * L;
      }
      segment.weights = conv.packed + (begin + v * L) * (1 + taps);
      grad_x_kernels[block.size - 1](segment);
    });
  };

  int64_t next_x = 0, next_gx = 0;
  for (int64_t i = 0; i < conv.out_height; ++i) {
    const int64_t top = i * conv.stride - conv.pad_top;
    for (; next_x < conv.height && next_x < top + kernel && sums != nullptr; ++next_x) {
      keep_row<V>(p, x, next_x, begin, layout, scratch + layout.x + next_x % layout.x_rows * layout.x_pitch);
    }
    T* const kept = scratch + layout.gd + i % layout.gd_rows * layout.gd_pitch;
    keep_gradient_row<V>(p, image * conv.out_height + i, begin, layout, kept);
    int64_t added = pending;
    for (int64_t v = 0; v < layout.vectors && sums != nullptr; ++v) {
      T* const sums_of_taps = scratch + layout.taps + v * taps * L;
      const T* const gd = kept + (v * layout.gd_columns + layout.gd_first) * L;
      added = pending;
      for (int64_t j = 0; j < conv.out_width; j += chained) {
        const int64_t pixels = min_of(chained, conv.out_width - j);
        for (int64_t u = 0; u < kernel; ++u) {
          const int64_t r = top + u;
          if (r < 0 || r >= conv.height) continue;
          const T* row = scratch + layout.x + r % layout.x_rows * layout.x_pitch + v * layout.x_columns * L;
          add_row(gd + j * conv.stride * L, row + j * conv.stride * L, pixels, sums_of_taps + u * kernel * L);
        }
        if (++added < kChainedSegments) continue;
        add_taps<V>(sums_of_taps, taps, sums + begin + v * L, round_up(channels, 16));
        added = 0;
      }
    }
    pending = added;
    if (p.grad_x != nullptr) completed_rows(conv, i, next_gx, complete_row);
  }
  if (stream) V::fence();
}

}  // namespace
}  // namespace fusedsep
