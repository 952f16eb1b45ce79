// SPDX-License-Identifier: BSD-3-Clause
//
// A whole 3x3 convolution, as the first one of a network, to channels_last:
//
//   y[n,i,j,o] = act2( b2[o] + sum over k of  w2[o,k] * x[n, c, i*S + u*D - pad_top, j*S + v*D - pad_left] )
//
// with k numbering the taps (c, u, v) as Rows in separable.h says. It is the pointwise product of h = patches, without
// the patches: in the order of k, each element of x is broadcast from where it lies in the image. Neighbouring pixels
// of an output row are equally far from each other there, so that a tap is one offset for all of them.
//
// Borders: taps outside the map are left out. Pixels that leave out the same ones are worked on together: neighbours in
// a row, and at the left and right border neighbours in a column, which would else be alone.
#pragma once

#include "depthwise-inl.h"
#include "layout-inl.h"
#include "pointwise-inl.h"
#include "separable.h"

namespace fusedsep {
namespace {

struct Tap {
  int64_t x;       // elements from the first tap of the patch, which may lie outside the map
  int64_t weight;  // row of the packed weights
};

// C[0..M, 0..columns) = act(bias + (C + sum over taps of x[m * step + tap.x] * weights[tap.weight][0..NV * kLanes)))
//
// Registers and bounds are those of the pointwise microkernel, with a broadcast from x for one from the tile of h.
template <class V, int M, int NV>
__attribute__((noinline)) void tap_microkernel(const Tap* taps, int64_t tap_count, const typename V::T* x, int64_t step,
                                               const typename V::T* weights, int64_t weights_stride, typename V::T* c,
                                               int64_t c_stride, int64_t column_count,
                                               const Epilogue<typename V::T>& epilogue) {
  constexpr int L = V::kLanes;
  V sum[M][NV];
  FUSEDSEP_UNROLL(16)
  for (int m = 0; m < M; ++m) {
    FUSEDSEP_UNROLL(4)
    for (int n = 0; n < NV; ++n) sum[m][n] = V::zero();
  }
  prefetch_for_writing<V, M, NV>(c, c_stride);
  FUSEDSEP_UNROLL(1)
  for (const Tap* const end = taps + tap_count; taps < end; ++taps) {
    const typename V::T* const value = x + taps->x;
    const typename V::T* const weight = weights + taps->weight * weights_stride;
    V column[NV];
    FUSEDSEP_UNROLL(4)
    for (int n = 0; n < NV; ++n) column[n] = V::load(weight + n * L);
    FUSEDSEP_UNROLL(16)
    for (int m = 0; m < M; ++m) {
      const V row = V::broadcast(value[m * step]);
      FUSEDSEP_UNROLL(4)
      for (int n = 0; n < NV; ++n) sum[m][n] = V::fma(row, column[n], sum[m][n]);
    }
  }
  finish<V, M, NV, false>(sum, c, c_stride, column_count, epilogue);
}

template <class V, int kRows, int kVectors>
struct TapMicrokernels {
  using T = typename V::T;
  using Function = void (*)(const Tap*, int64_t, const T*, int64_t, const T*, int64_t, T*, int64_t, int64_t,
                            const Epilogue<T>&);
  // table[vectors - 1][rows - 1]
  Function table[kVectors][kRows];

  constexpr TapMicrokernels() : table{} { fill<kRows, kVectors>(); }

  template <int M, int NV>
  constexpr void fill() {
    table[NV - 1][M - 1] = tap_microkernel<V, M, NV>;
    if constexpr (M > 1) {
      fill<M - 1, NV>();
    } else if constexpr (NV > 1) {
      fill<kRows, NV - 1>();
    }
  }
};

// The part of a convolution's depth that one chain sums, and how it lies in the image.
template <typename T>
struct Patch {
  int64_t channels, dilation;
  bool channels_first;                    // in k
  int64_t of_row, of_column, of_channel;  // elements of x between neighbours
  int64_t begin, end;                     // of k

  explicit Patch(const SeparableParams<T>& p)
      : channels(p.in_channels / 9),
        dilation(p.dilation),
        channels_first(p.rows == Rows::kPatchesOfNchw),
        of_row(p.width * (channels_first ? 1 : x_pitch_of(p))),
        of_column(channels_first ? 1 : x_pitch_of(p)),
        of_channel(channels_first ? p.height * p.width : 1) {}
};

// Taps that pixels read whose patches have the same rows and columns inside the map.
template <class V>
struct TapList {
  int rows = -1;  // bit u: that row of the patch; -1: not listed yet
  int64_t count;
  Tap taps[Tiling<V>::kDepth];

  void list(const Patch<typename V::T>& patch, int wanted_rows, int columns) {
    if (rows == wanted_rows) return;
    rows = wanted_rows;
    count = 0;
    const int64_t inner_count = patch.channels_first ? 9 : patch.channels;
    int64_t outer = patch.begin / inner_count, inner = patch.begin % inner_count;
    for (int64_t k = patch.begin; k < patch.end; ++k) {
      const int64_t channel = patch.channels_first ? outer : inner, tap = patch.channels_first ? inner : outer;
      const int64_t u = tap / 3, v = tap % 3;
      if ((rows >> u & 1) != 0 && (columns >> v & 1) != 0) {
        taps[count++] = {
            u * patch.dilation * patch.of_row + v * patch.dilation * patch.of_column + channel * patch.of_channel, k};
      }
      if (++inner == inner_count) inner = 0, ++outer;
    }
  }
};

// Which of the three taps from `first` on, `dilation` apart, lie in [0, size): bit u for tap u.
FUSEDSEP_INLINE int taps_inside(int64_t first, int64_t dilation, int64_t size) {
  int inside = 0;
  for (int u = 0; u < 3; ++u) inside |= int(uint64_t(first + u * dilation) < uint64_t(size)) << u;
  return inside;
}

// Pixels of one output row, or one column, that read the same taps.
template <typename T>
struct Run {
  const T* x;    // the first tap of the first pixel
  int64_t step;  // elements of x between them
  int64_t count;
  int64_t out_step = 1;  // pixels of the output from one to the next
};

// Vectors of half the lanes are taken where those of AVX-512 would be half empty. Without AVX-512VL they have 16
// registers: 12 accumulators + 1 column + 1 broadcast.
template <class V>
constexpr int kHalfTileRows = int(min_of(Tiling<V>::kTileRows, 12));

// Output channels [column_begin, column_end) of a run, at `out`. A last vector that is at most half full is worked on
// as a vector of half the lanes, which costs half as much.
template <class V>
void convolve_run(const Run<typename V::T>& run, const TapList<V>& list, const typename V::T* weights, int64_t depth,
                  const typename V::T* bias, int64_t column_begin, int64_t column_end, typename V::T* out,
                  int64_t out_pitch, Epilogue<typename V::T>& epilogue) {
  using T = typename V::T;
  using Half = typename V::Half;
  constexpr int64_t L = V::kLanes;
  static constexpr TapMicrokernels<V, Tiling<V>::kTileRows, Tiling<V>::kTileVectors> kWhole;
  static constexpr TapMicrokernels<Half, kHalfTileRows<V>, 1> kHalf;

  const int64_t tail = (column_end - column_begin - 1) % L + 1;
  const bool halved = Half::kLanes < L && tail <= Half::kLanes;
  const int64_t whole_end = halved ? column_end - tail : column_end;
  const int64_t tile_rows = halved ? kHalfTileRows<V> : Tiling<V>::kTileRows;
  const int64_t blocks = block_count(run.count, tile_rows);
  for (int64_t b = 0; b < blocks; ++b) {
    const Block block = block_at(run.count, blocks, b);
    const T* const x = run.x + block.begin * run.step;
    T* const y = out + block.begin * out_pitch;
    for (int64_t q = column_begin; q < column_end; q += Tiling<V>::kTileColumns) {
      const int64_t width = round_up(min_of(Tiling<V>::kTileColumns, column_end - q), L);
      const int64_t whole = min_of(width, whole_end - q);
      const T* const panel = weights + q * depth;
      if (whole > 0) {
        if (epilogue.last) epilogue.bias = bias + q;
        kWhole.table[ceil_div(whole, L) - 1][block.size - 1](list.taps, list.count, x, run.step, panel, width, y + q,
                                                             out_pitch, whole, epilogue);
      }
      if (whole < width && halved) {
        if (epilogue.last) epilogue.bias = bias + q + whole;
        kHalf.table[0][block.size - 1](list.taps, list.count, x, run.step, panel + whole, width, y + q + whole,
                                       out_pitch, tail, epilogue);
      }
    }
  }
}

// f(run, taps, pixel) for the pixels of a tile, numbered from its first one, that read the same taps of `patch`. With
// `kColumns`, those whose row reaches over the left or the right border come last, in runs along columns.
template <class V, bool kColumns, class F>
FUSEDSEP_INLINE void for_each_run(const SeparableParams<typename V::T>& p, const Patch<typename V::T>& patch,
                                  const Tile& tile, const F& f) {
  using T = typename V::T;
  const int64_t out_pixels = p.out_height * p.out_width, first = tile.begin % out_pixels;
  const int64_t map = p.height * patch.of_row * (patch.channels_first ? patch.channels : 1);
  const Span columns_inside = columns_inside_of(p, 0);
  TapList<V> lists[8];  // by the columns inside
  const T* const first_image = p.x + (tile.image + tile.begin / out_pixels) * map;
  const auto place_of = [&](const T* image, int64_t i, int64_t j) {
    return image + (i * p.stride - p.pad_top) * patch.of_row + (j * p.stride - p.pad_left) * patch.of_column;
  };
  const auto rows_of = [&](int64_t i) { return taps_inside(i * p.stride - p.pad_top, p.dilation, p.height); };
  const auto columns_of = [&](int64_t j) { return taps_inside(j * p.stride - p.pad_left, p.dilation, p.width); };

  const T* image = first_image;
  int64_t i = first / p.out_width, j = first % p.out_width;
  for (int64_t pixel = tile.begin; pixel < tile.end;) {
    const int64_t most = min_of(tile.end - pixel, p.out_width - j);
    const bool is_inside = j >= columns_inside.begin && j < columns_inside.end;
    const int inside = columns_of(j);
    Run<T> run{place_of(image, i, j), p.stride * patch.of_column, 1};
    if (is_inside) {
      run.count = min_of(most, columns_inside.end - j);
    } else {
      while (run.count < most && columns_of(j + run.count) == inside) ++run.count;
    }
    if (is_inside || !kColumns) {
      lists[inside].list(patch, rows_of(i), inside);
      f(run, lists[inside], pixel - tile.begin);
    }
    pixel += run.count;
    j += run.count;
    if (j == p.out_width) j = 0, ++i;
    if (i == p.out_height) i = 0, image += map;
  }

  if (!kColumns) return;
  image = first_image;
  for (int64_t origin = tile.begin - first; origin < tile.end; origin += out_pixels, image += map) {
    const int64_t begin = max_of(tile.begin - origin, 0), end = min_of(tile.end - origin, out_pixels);  // in the image
    for (j = 0; j < p.out_width; ++j) {
      if (j >= columns_inside.begin && j < columns_inside.end) {
        j = columns_inside.end - 1;
        continue;
      }
      const int64_t row_end = ceil_div(max_of(end - j, 0), p.out_width);
      for (i = ceil_div(max_of(begin - j, 0), p.out_width); i < row_end;) {
        Run<T> run{place_of(image, i, j), p.stride * patch.of_row, 1, p.out_width};
        while (i + run.count < row_end && rows_of(i + run.count) == rows_of(i)) ++run.count;
        const int inside = columns_of(j);
        lists[inside].list(patch, rows_of(i), inside);
        f(run, lists[inside], origin + i * p.out_width + j - tile.begin);
        i += run.count;
      }
    }
  }
}

// The parts of the depth that one chain sums each: f(patch).
template <class V, class F>
FUSEDSEP_INLINE void for_each_patch_part(const SeparableParams<typename V::T>& p, const F& f) {
  Patch<typename V::T> patch(p);
  const int64_t depth_step = depth_step_of<V>(p.in_channels);
  for (patch.begin = 0; patch.begin < p.in_channels; patch.begin = patch.end) {
    patch.end = min_of(patch.begin + depth_step, p.in_channels);
    f(patch);
  }
}

// Panels [panel_begin, panel_end) of the output channels over the tile. `weights` as column panels of the product; a
// null `bias` means neither bias nor activation.
template <class V>
void convolve(const SeparableParams<typename V::T>& p, const typename V::T* weights, const typename V::T* bias,
              const Tile& tile, int64_t panel_begin, int64_t panel_end) {
  using T = typename V::T;
  const int64_t column_begin = panel_begin * Tiling<V>::kTileColumns;
  const int64_t column_end = min_of(panel_end * Tiling<V>::kTileColumns, p.out_channels);
  const int64_t pitch = y_pitch_of(p);
  T* const y = p.y + (tile.image * p.out_height * p.out_width + tile.begin) * pitch;
  for_each_patch_part<V>(p, [&](const Patch<T>& patch) {
    const bool last = bias != nullptr && patch.end == p.in_channels;
    Epilogue<T> epilogue{nullptr, patch.begin == 0, last, p.pointwise_activation, nullptr, 0};
    for_each_run<V, true>(p, patch, tile, [&](const Run<T>& run, const TapList<V>& taps, int64_t pixel) {
      convolve_run<V>(run, taps, weights, p.in_channels, bias, column_begin, column_end, y + pixel * pitch,
                      run.out_step * pitch, epilogue);
    });
  });
}

}  // namespace
}  // namespace fusedsep
