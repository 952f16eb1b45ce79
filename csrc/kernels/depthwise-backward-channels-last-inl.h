// SPDX-License-Identifier: BSD-3-Clause
//
// Backward of the depthwise convolution in channels_last: gd and what it adds to the gradients of the nine taps from
// one kernel, gx from the forward's, for a group of channels of one image.
#pragma once

#include "gradient-groups-inl.h"

namespace fusedsep {
namespace {

// Up to kTileRows neighbouring output pixels of one row, one vector of channels.
template <class V>
struct GradientSegment {
  using T = typename V::T;
  Segment<T> x;
  const T* weights;  // nine taps
  V center, scale;
  StripCorrection<V, true> corrected;
  const T* g1;
  int64_t g1_stride;  // elements between pixels
  int64_t g1_row;     // and between rows
  bool whole;
  typename V::Mask mask;  // of g1's lanes unless `whole`
  T* gd;
  int64_t gd_stride;
  T* taps;  // sums of the nine taps' gradients, added to; null: not wanted
};

// gd of a segment from d, which is computed here, and what it adds to the weight gradient.
//
// Registers: those of the depthwise stage; then M gradients + 3 x 2 sums + 1 column: 13 of 16 (AVX2), 21 of 32. Two
// sums a tap, of every other pixel, keep six independent chains of FMAs going.
template <class V, int M, Taps kTaps>
__attribute__((noinline)) void gradient_segment(const GradientSegment<V>& segment) {
  constexpr int L = V::kLanes;
  V gd[M];
  accumulate_taps<V, M, kTaps>(segment.x, 0, V::mask(0, L), segment.weights, gd);
  FUSEDSEP_UNROLL(16)
  for (int m = 0; m < M; ++m) {
    const auto* from = segment.g1 + m * segment.g1_stride;
    __builtin_prefetch(from + segment.g1_row, 0, 2);
    const V g = segment.whole ? V::load(from) : V::load(from, segment.mask);
    gd[m] = V::mul(segment.scale, segment.corrected(g, V::sub(gd[m], segment.center)));
    gd[m].store(segment.gd + m * segment.gd_stride);
  }
  if (segment.taps == nullptr) return;
  for (int u = 0; u < 3; ++u) {
    const auto* x = segment.x.row[u];
    if (x == nullptr) continue;
    V sum[3][2] = {{V::zero(), V::zero()}, {V::zero(), V::zero()}, {V::zero(), V::zero()}};
    if constexpr (kTaps == Taps::kUnit) {
      FUSEDSEP_UNROLL(16)
      for (int k = 0; k < M + 2; ++k) {
        const V column = V::load(x + k * L);
        FUSEDSEP_UNROLL(3)
        for (int v = 0; v < 3; ++v) {
          const int m = k - v;
          if (m >= 0 && m < M) sum[v][m % 2] = V::fma(gd[m], column, sum[v][m % 2]);
        }
      }
    } else {
      FUSEDSEP_UNROLL(16)
      for (int m = 0; m < M; ++m) {
        FUSEDSEP_UNROLL(3)
        for (int v = 0; v < 3; ++v) {
          const V column = V::load(x + (m * segment.x.stride + v * segment.x.dilation) * L);
          sum[v][m % 2] = V::fma(gd[m], column, sum[v][m % 2]);
        }
      }
    }
    FUSEDSEP_UNROLL(3)
    for (int v = 0; v < 3; ++v) {
      auto* tap = segment.taps + (3 * u + v) * L;
      V::add(V::load(tap), V::add(sum[v][0], sum[v][1])).store(tap);
    }
  }
}

template <class V>
struct GradientKernels {
  using Function = void (*)(const GradientSegment<V>&);
  static constexpr int kRows = Tiling<V>::kTileRows;

  Function table[2][kRows];  // [taps][pixels - 1]

  constexpr GradientKernels() : table{} { fill<kRows>(); }

  template <int M>
  constexpr void fill() {
    table[int(Taps::kUnit)][M - 1] = gradient_segment<V, M, Taps::kUnit>;
    table[int(Taps::kInside)][M - 1] = gradient_segment<V, M, Taps::kInside>;
    if constexpr (M > 1) fill<M - 1>();
  }
};

// Channels [begin, end) of one image. The zeros of the scratch are there already; `pending` segments have been added to
// its sums of taps since those went to `sums`.
template <class V>
void depthwise_backward_channels_last(const TrainingParams<typename V::T>& p, int64_t image, int64_t begin,
                                      const GroupScratch<V>& layout, typename V::T* scratch, double* sums,
                                      int64_t& pending) {
  using T = typename V::T;
  constexpr int64_t L = V::kLanes, kRows = Tiling<V>::kTileRows;
  static constexpr GradientKernels<V> kKernels;
  static constexpr SegmentKernels<V> kBackKernels;
  const SeparableParams<T>& conv = p.conv;
  const int64_t channels = conv.in_channels;
  const TrainingLayout<V> weights(channels, conv.out_channels, true, true);
  const T* reversed = conv.packed + weights.reversed;
  const T* x = conv.x + image * conv.height * conv.width * channels;
  const T* g1 = p.g1 + image * conv.out_height * conv.out_width * channels;
  const auto all = V::mask(0, L);
  const bool stream = streams<V, true>(p.grad_x, channels, conv.batch * conv.height * conv.width);

  // Rows of gx read kept rows at stride 1.
  const Taps gx_taps = conv.dilation == 1 ? Taps::kUnit : Taps::kInside;
  const auto grad_x_row = [&](int64_t i) {
    Segment<T> segment{};
    segment.pixel_stride = L;
    segment.stride = 1;
    segment.dilation = conv.dilation;
    segment.activation = Activation::kNone;
    const T* row[3];
    for (int u = 0; u < 3; ++u) row[u] = row_of_gd(conv, scratch + layout.gd, layout.gd_pitch, i, u);
    write_grad_x_row<V>(p, image, i, begin, layout, scratch, kRows, stream, [&](int64_t v, const Block& block) {
      const int64_t first = v * layout.gd_columns + GroupScratch<V>::first_of_gx(conv) + block.begin;
      for (int u = 0; u < 3; ++u) segment.row[u] = row[u] == nullptr ? nullptr : row[u] + first * L;
      kBackKernels.table[int(gx_taps)][block.size - 1](segment, {0, L}, all, reversed + 10 * (begin + v * L),
                                                       scratch + layout.line, L);
    });
  };

  const int64_t blocks = block_count(conv.out_width, kRows);
  const Taps taps = conv.stride == 1 && conv.dilation == 1 ? Taps::kUnit : Taps::kInside;
  int64_t next_x = 0, next_gx = 0;
  for (int64_t i = 0; i < conv.out_height; ++i) {
    const int64_t top = i * conv.stride - conv.pad_top;
    for (; next_x < conv.height && next_x <= top + 2 * conv.dilation; ++next_x) {
      keep_row<V>(p, x, next_x, begin, layout, scratch + layout.x + next_x % layout.x_rows * layout.x_pitch);
    }
    int64_t added = pending;
    for (int64_t v = 0; v < layout.vectors; ++v) {
      const int64_t c = begin + v * L;
      GradientSegment<V> segment{{},
                                 conv.packed + weights.depthwise + 10 * c + L,
                                 V::load(p.affine1.center + c),
                                 V::load(p.affine1.scale + c),
                                 StripCorrection<V, true>(p.correction1, Strip{c, 0, 0, 0, false}),
                                 nullptr,
                                 channels,
                                 conv.out_width * channels,
                                 c + L <= channels,
                                 V::mask(0, channels - c),
                                 nullptr,
                                 conv.stride * L,
                                 sums == nullptr ? nullptr : scratch + layout.taps + 9 * v * L};
      segment.x.pixel_stride = L;
      segment.x.stride = conv.stride;
      segment.x.dilation = conv.dilation;
      T* const kept = scratch + layout.gd + i % layout.gd_rows * layout.gd_pitch + v * layout.gd_columns * L;
      added = pending;
      for (int64_t b = 0; b < blocks; ++b) {
        const Block block = block_at(conv.out_width, blocks, b);
        for (int u = 0; u < 3; ++u) {
          const int64_t r = top + u * conv.dilation;
          const T* row = scratch + layout.x + r % layout.x_rows * layout.x_pitch + v * layout.x_columns * L;
          segment.x.row[u] = r < 0 || r >= conv.height ? nullptr : row + block.begin * conv.stride * L;
        }
        segment.g1 = g1 + (i * conv.out_width + block.begin) * channels + c;
        segment.gd = kept + (layout.gd_first + block.begin * conv.stride) * L;
        kKernels.table[int(taps)][block.size - 1](segment);
        if (sums == nullptr || ++added < kChainedSegments) continue;
        add_taps<V>(segment.taps, 9, sums + c, round_up(channels, 16));
        added = 0;
      }
    }
    pending = added;
    if (p.grad_x != nullptr) completed_rows(conv, i, next_gx, grad_x_row);
  }
  if (stream) V::fence();
}

}  // namespace
}  // namespace fusedsep
