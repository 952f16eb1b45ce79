// SPDX-License-Identifier: BSD-3-Clause
//
// Backward of the depthwise convolution: training.h's gd, gx and gw1, for some channels of some images.
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

// Scratch of a group of channels: rows of x with zeros for the padding, and rows of gd as the transposed convolution
// reads them. Both keep as many rows as are in use, each as [vector of channels][column][kLanes]: neighbouring columns
// of a vector are neighbours in memory, however many channels the maps have, and no column needs a check.
template <class V>
struct GroupScratch {
  using T = typename V::T;
  int64_t vectors;
  int64_t x_rows, x_columns, x_pitch;     // pitch: elements of a row
  int64_t gd_rows, gd_columns, gd_pitch;  // of gd, spread
  int64_t gd_first;                       // where column 0 of gd is
  int64_t line = 0, taps, x, gd, size;

  GroupScratch(const SeparableParams<T>& conv, int64_t channels) : vectors(ceil_div(channels, V::kLanes)) {
    constexpr int64_t L = V::kLanes;
    const int64_t extent = 2 * conv.dilation + 1, spread = spread_width(conv);
    x_rows = min_of(conv.height, extent);
    x_columns = spread + extent - 1;
    x_pitch = vectors * x_columns * L;
    gd_rows = kept_rows(conv);
    gd_first = max_of(0, transposed(conv).pad_left);
    // Columns that only the padding reaches stand in front of the first one that gx reads, or behind the last.
    gd_columns = max_of(gd_first + spread, first_of_gx(conv) + conv.width + extent - 1);
    gd_pitch = vectors * gd_columns * L;
    taps = line + Tiling<V>::kTileRows * L;
    x = taps + vectors * 9 * L;
    gd = x + x_rows * x_pitch;
    size = gd + gd_rows * gd_pitch;
  }
  // The column of the kept rows where the taps of column 0 of gx begin.
  static int64_t first_of_gx(const SeparableParams<T>& conv) { return max_of(0, -transposed(conv).pad_left); }
};

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
    __builtin_prefetch(from + segment.g1_row);
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

// So many segments are added up in T before the sums go on in double.
constexpr int64_t kChainedSegments = 16;

// Moves the sums of nine taps to sums[t * pitch].
template <class V>
FUSEDSEP_INLINE void add_taps(typename V::T* taps, double* sums, int64_t pitch) {
  for (int t = 0; t < 9; ++t) {
    V::load(taps + t * V::kLanes).accumulate(sums + t * pitch);
    V::zero().store(taps + t * V::kLanes);
  }
}

// Row `i` of x for the group of channels from `begin` on, into a row of the scratch, where the padding is zero already.
template <class V>
void keep_row(const TrainingParams<typename V::T>& p, const typename V::T* image, int64_t i, int64_t begin,
              const GroupScratch<V>& layout, typename V::T* row) {
  constexpr int64_t L = V::kLanes;
  const auto& conv = p.conv;
  const int64_t channels = conv.in_channels, columns = min_of(conv.width, layout.x_columns - conv.pad_left);
  const auto* from = image + i * conv.width * channels + begin;
  row += conv.pad_left * L;
  for (int64_t v = 0; v < layout.vectors; ++v) {
    const int64_t lanes = channels - begin - v * L;
    const auto mask = V::mask(0, lanes);
    auto* to = row + v * layout.x_columns * L;
    const auto load = [&](int64_t j) {
      const auto* x = from + j * channels + v * L;
      __builtin_prefetch(x + conv.width * channels);  // what the next row reads
      return lanes >= L ? V::load(x) : V::load(x, mask);
    };
    if (p.x_affine.center == nullptr) {
      for (int64_t j = 0; j < columns; ++j) load(j).store(to + j * L);
    } else {
      const StripAffine<V, true> affine(p.x_affine, Strip{begin + v * L, 0, 0, 0, false});
      for (int64_t j = 0; j < columns; ++j) activate(p.x_activation, affine(load(j))).store(to + j * L);
    }
  }
}

// Channels [begin, end) of one image. The zeros of the scratch are there already; `pending` segments have been added to
// its sums of taps since those went to `sums`.
template <class V>
void depthwise_backward_channels_last(const TrainingParams<typename V::T>& p, int64_t image, int64_t begin, int64_t end,
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
  const int64_t gx_blocks = block_count(conv.width, kRows);
  const Taps gx_taps = conv.dilation == 1 ? Taps::kUnit : Taps::kInside;
  const auto grad_x_row = [&](int64_t i) {
    Segment<T> segment{};
    segment.pixel_stride = L;
    segment.stride = 1;
    segment.dilation = conv.dilation;
    segment.activation = Activation::kNone;
    const T* row[3];
    for (int u = 0; u < 3; ++u) row[u] = row_of_gd(conv, scratch + layout.gd, layout.gd_pitch, i, u);
    for (int64_t v = 0; v < layout.vectors; ++v) {
      const int64_t c = begin + v * L;
      const auto mask = V::mask(0, channels - c);
      for (int64_t b = 0; b < gx_blocks; ++b) {
        const Block block = block_at(conv.width, gx_blocks, b);
        const int64_t first = v * layout.gd_columns + GroupScratch<V>::first_of_gx(conv) + block.begin;
        for (int u = 0; u < 3; ++u) segment.row[u] = row[u] == nullptr ? nullptr : row[u] + first * L;
        T* line = scratch + layout.line;
        kBackKernels.table[int(gx_taps)][block.size - 1](segment, 0, all, reversed + 10 * c, line);
        T* out = p.grad_x + ((image * conv.height + i) * conv.width + block.begin) * channels + c;
        for (int64_t m = 0; m < block.size; ++m) {
          if (stream) {
            V::load(line + m * L).stream(out + m * channels);
          } else {
            V::load(line + m * L).store(out + m * channels, mask);
          }
        }
      }
    }
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
        add_taps<V>(segment.taps, sums + c, round_up(channels, 16));
        added = 0;
      }
    }
    pending = added;
    if (p.grad_x != nullptr) completed_rows(conv, i, next_gx, grad_x_row);
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
  for (int t = 0; t < 9; ++t) sums[t * padded + channel] += sum_of_lanes<V>(totals[t]);
}

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
      depthwise_backward_channels_last<V>(p, image, begin, end, layout, scratch, sums, pending);
    }
    for (int64_t v = 0; v < layout.vectors && sums != nullptr; ++v) {
      constexpr int64_t L = V::kLanes;
      add_taps<V>(scratch + layout.taps + 9 * v * L, sums + begin + v * L, round_up(p.conv.in_channels, 16));
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
