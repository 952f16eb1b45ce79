// SPDX-License-Identifier: BSD-3-Clause
//
// The depthwise stage of one tile, written straight into the layout that the pointwise product reads (layout-inl.h):
// pixels as row blocks in channels_last, pixels as column panels in NCHW.
//
// Borders: a tap row outside the map is left out, a tap column outside the map loads zeros; nothing is copied for
// padding.
#pragma once

#include "activation-inl.h"
#include "layout-inl.h"
#include "separable.h"

namespace fusedsep {
namespace {

// ---------------------------------------------------------------------------------------------------- channels_last

// Up to kTileRows neighbouring output pixels of one output row, one vector of channels.
template <typename T>
struct Segment {
  const T* row[3];  // x at the segment's first tap column, channel 0, for the three tap rows; null: outside the map
  int64_t first_column;  // input column of the first tap; may be negative
  int64_t width;         // input columns
  int64_t pixel_stride;  // elements between input columns
  int64_t stride, dilation;
  Activation activation;
  // kUnit and kHalving: the column of the first pixel's first tap, that of the last one's last, is outside the map.
  bool first_outside, last_outside;
};

enum class Taps {
  kUnit,     // stride 1, dilation 1: each column is loaded once for its three taps; at most one outside at either end
  kInside,   // any stride and dilation, all columns inside
  kHalving,  // stride 2, dilation 1: columns between two pixels are loaded once; at most one outside at either end
  kChecked,  // any; columns outside the map count as zero; the last channels load through a mask
};
constexpr int kTapsCount = 4;

// sum[m] = the nine taps of pixel m at channel offset `channel`; `weights` is nine taps, a vector each, kPitch apart.
//
// Registers, kUnit: M accumulators + M + 2 columns + 1 weight: 15 of 16 (AVX2), 31 of 32 (AVX-512). For each tap row
// M + 2 + 3 loads feed 3 M FMAs. kHalving: M + 1 even columns, and an odd one at a time; 2 M + 1 + 3 loads.
template <class V, int M, Taps kTaps, int64_t kPitch = V::kLanes>
FUSEDSEP_INLINE void accumulate_taps(const Segment<typename V::T>& segment, int64_t channel, typename V::Mask mask,
                                     const typename V::T* weights, V sum[M]) {
  using T = typename V::T;
  const int64_t step = segment.pixel_stride;
  FUSEDSEP_UNROLL(16)
  for (int m = 0; m < M; ++m) sum[m] = V::zero();
  for (int u = 0; u < 3; ++u, weights += 3 * kPitch) {
    if (segment.row[u] == nullptr) continue;
    const T* x = segment.row[u] + channel;
    if constexpr (kTaps == Taps::kUnit) {
      V column[M + 2];
      column[0] = segment.first_outside ? V::zero() : V::load(x);
      FUSEDSEP_UNROLL(16)
      for (int m = 1; m < M + 1; ++m) column[m] = V::load(x + m * step);
      column[M + 1] = segment.last_outside ? V::zero() : V::load(x + (M + 1) * step);
      FUSEDSEP_UNROLL(3)
      for (int v = 0; v < 3; ++v) {
        const V weight = V::load(weights + v * kPitch);
        FUSEDSEP_UNROLL(16)
        for (int m = 0; m < M; ++m) sum[m] = V::fma(column[m + v], weight, sum[m]);
      }
    } else if constexpr (kTaps == Taps::kHalving) {
      V even[M + 1];
      even[0] = segment.first_outside ? V::zero() : V::load(x);
      FUSEDSEP_UNROLL(16)
      for (int m = 1; m < M; ++m) even[m] = V::load(x + 2 * m * step);
      even[M] = segment.last_outside ? V::zero() : V::load(x + 2 * M * step);
      V weight = V::load(weights);
      FUSEDSEP_UNROLL(16)
      for (int m = 0; m < M; ++m) sum[m] = V::fma(even[m], weight, sum[m]);
      weight = V::load(weights + kPitch);
      FUSEDSEP_UNROLL(16)
      for (int m = 0; m < M; ++m) sum[m] = V::fma(V::load(x + (2 * m + 1) * step), weight, sum[m]);
      weight = V::load(weights + 2 * kPitch);
      FUSEDSEP_UNROLL(16)
      for (int m = 0; m < M; ++m) sum[m] = V::fma(even[m + 1], weight, sum[m]);
    } else {
      FUSEDSEP_UNROLL(3)
      for (int v = 0; v < 3; ++v) {
        const V weight = V::load(weights + v * kPitch);
        FUSEDSEP_UNROLL(16)
        for (int m = 0; m < M; ++m) {
          const int64_t offset = m * segment.stride + v * segment.dilation;
          V value = V::zero();
          if constexpr (kTaps == Taps::kInside) {
            value = V::load(x + offset * step);
          } else if (uint64_t(segment.first_column + offset) < uint64_t(segment.width)) {
            value = V::load(x + offset * step, mask);
          }
          sum[m] = V::fma(value, weight, sum[m]);
        }
      }
    }
  }
}

// Channels [begin, end) of a segment: whole vectors, or fewer channels than one.
struct ChannelSpan {
  int64_t begin, end;
};

// h[0..M][kLanes] of `segment` for the vectors of `channels`, one after the other: what a call costs is paid once.
// `weights` is a bias and nine taps for each, a vector each. Those are kPitch apart, and so are the vectors of h of
// neighbouring pixels; those of neighbouring channels are `out_step` apart.
template <class V, int M, Taps kTaps, int64_t kPitch>
__attribute__((noinline)) void depthwise_segment(const Segment<typename V::T>& segment, ChannelSpan channels,
                                                 typename V::Mask mask, const typename V::T* weights,
                                                 typename V::T* out, int64_t out_step) {
  for (int64_t c = channels.begin; c < channels.end; c += V::kLanes, weights += 10 * kPitch, out += out_step) {
    V sum[M];
    accumulate_taps<V, M, kTaps, kPitch>(segment, c, mask, weights + kPitch, sum);
    const V bias = V::load(weights);
    FUSEDSEP_UNROLL(16)
    for (int m = 0; m < M; ++m) sum[m] = V::add(bias, sum[m]);
    activate_tile<M>(segment.activation, sum);
    FUSEDSEP_UNROLL(16)
    for (int m = 0; m < M; ++m) sum[m].store(out + m * kPitch);
  }
}

template <class V, int64_t kPitch = V::kLanes, int kRows = Tiling<V>::kTileRows>
struct SegmentKernels {
  using T = typename V::T;
  using Function = void (*)(const Segment<T>&, ChannelSpan, typename V::Mask, const T*, T*, int64_t);

  // table[taps][pixels - 1]
  Function table[kTapsCount][kRows];

  constexpr SegmentKernels() : table{} { fill<kRows>(); }

  template <int M>
  constexpr void fill() {
    table[int(Taps::kUnit)][M - 1] = depthwise_segment<V, M, Taps::kUnit, kPitch>;
    table[int(Taps::kInside)][M - 1] = depthwise_segment<V, M, Taps::kInside, kPitch>;
    table[int(Taps::kHalving)][M - 1] = depthwise_segment<V, M, Taps::kHalving, kPitch>;
    table[int(Taps::kChecked)][M - 1] = depthwise_segment<V, M, Taps::kChecked, kPitch>;
    if constexpr (M > 1) fill<M - 1>();
  }
};

// Channels of this many bytes are finished over the whole tile before the next ones: whole cache lines of x in a run
// that the prefetchers follow, and few enough that what a segment reads (3 rows of up to 16 pixels: 12 KiB) fits L1.
constexpr int64_t kChannelGroupBytes = 256;

struct Span {
  int64_t begin, end;
};

// The output columns whose taps lie inside the map, but for `outside` columns on either side of it.
template <typename T>
Span columns_inside_of(const SeparableParams<T>& p, int64_t outside) {
  return {floor_div(p.pad_left - outside + p.stride - 1, p.stride),
          floor_div(p.width + outside - 1 - 2 * p.dilation + p.pad_left, p.stride) + 1};
}

// How the taps of output columns are read: from `begin` to `end` in one way, the others one by one.
struct Reach {
  Span columns;
  Taps inside;

  template <typename T>
  explicit Reach(const SeparableParams<T>& p)
      : columns(columns_inside_of(p, p.dilation == 1)),
        inside(p.dilation > 1  ? Taps::kInside
               : p.stride == 1 ? Taps::kUnit
                               : Taps::kHalving) {}

  // As many of `count` columns from `j` on as are read in the same way, so that few pay for the checks.
  FUSEDSEP_INLINE int64_t run(int64_t j, int64_t count) const {
    if (j < columns.begin) return min_of(count, columns.begin - j);
    return j < columns.end ? min_of(count, columns.end - j) : count;
  }
  FUSEDSEP_INLINE Taps taps(int64_t j) const { return j < columns.begin || j >= columns.end ? Taps::kChecked : inside; }
};

// The taps of `count` columns of output row `i` from column `j` on.
template <typename T>
FUSEDSEP_INLINE Segment<T> segment_at(const SeparableParams<T>& p, const T* image, int64_t i, int64_t j,
                                      int64_t count) {
  Segment<T> segment;
  segment.first_column = j * p.stride - p.pad_left;
  segment.width = p.width;
  segment.pixel_stride = x_pitch_of(p);
  segment.stride = p.stride;
  segment.dilation = p.dilation;
  segment.activation = p.activation;
  segment.first_outside = segment.first_column < 0;
  segment.last_outside = segment.first_column + (count - 1) * p.stride + 2 * p.dilation >= p.width;
  for (int u = 0; u < 3; ++u) {
    const int64_t row = i * p.stride - p.pad_top + u * p.dilation;
    const bool inside = row >= 0 && row < p.height;
    segment.row[u] = inside ? image + (row * p.width + segment.first_column) * segment.pixel_stride : nullptr;
  }
  return segment;
}

// What of x the next tile reads and this one does not: rows, which follow on those of this one.
template <typename T>
Ahead<T> rows_ahead(const SeparableParams<T>& p, const Tile& tile) {
  const int64_t out_pixels = p.out_height * p.out_width, pixels = p.batch * out_pixels, row = p.width * x_pitch_of(p);
  // Behind all that output pixels before `pixel` read.
  const auto read_until = [&](int64_t pixel) {
    const int64_t image = (pixel - 1) / out_pixels, i = (pixel - 1) % out_pixels / p.out_width;
    const int64_t rows = max_of(0, min_of(p.height, i * p.stride - p.pad_top + 2 * p.dilation + 1));
    return p.x + (image * p.height + rows) * row;
  };
  const int64_t end = tile.image * out_pixels + tile.end;
  return {read_until(end), read_until(min_of(pixels, end + tile.end - tile.begin))};
}

// Asks for what the output row behind `segment` reads first: `count` elements of each column, which lie in the rows
// behind its last tap row. To L2: until that row comes, the rest of this one passes through L1.
template <typename T>
FUSEDSEP_INLINE void fetch_next_row(const SeparableParams<T>& p, const Segment<T>& segment, int64_t columns,
                                    int64_t channel, int64_t count) {
  if (segment.row[2] == nullptr) return;
  for (int64_t row = 1; row <= p.stride; ++row) {
    const T* x = segment.row[2] + row * p.width * segment.pixel_stride + channel;
    for (int64_t column = 0; column < columns; ++column, x += segment.pixel_stride) {
      for (int64_t k = 0; k < count; k += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + k, 0, 2);
    }
  }
}

// `fetch_ahead`: where x is not in the caches yet, as a map is that was written as a whole before it is read.
template <class V>
void depthwise_channels_last(const SeparableParams<typename V::T>& p, const Tile& tile, int64_t channel_begin,
                             int64_t channel_end, typename V::T* scratch, bool fetch_ahead = false) {
  using T = typename V::T;
  using Half = typename V::Half;
  constexpr int L = V::kLanes;
  constexpr int64_t kGroup = max_of(1, kChannelGroupBytes / int64_t(sizeof(T)) / L) * L;
  static constexpr SegmentKernels<V> kKernels;
  static constexpr int kHalfRows = (Tiling<V>::kTileRows + 1) / 2;  // 17 values for 16 registers: one is read again
  static constexpr SegmentKernels<Half, L, kHalfRows> kHalfKernels;

  const int64_t channels = p.in_channels, padded = round_up(channels, L), pitch = x_pitch_of(p);
  const int64_t map = p.height * p.width * pitch;
  const int64_t pixels = tile.end - tile.begin;
  const int64_t out_pixels = p.out_height * p.out_width, first = tile.begin % out_pixels;
  const T* const weights = p.packed + PackedLayout<V>(channels, p.out_channels, true).depthwise;
  const T* const end = p.x + p.batch * map - (pitch - channels);
  const auto all = V::mask(0, L), tail = V::mask(0, channels % L);
  const Reach reach(p);

  // The last channels of a segment, fewer than a vector. Whole vectors run on into the next pixel, and what comes of it
  // is padding of h, which nobody reads; only the end of the last map has none.
  const auto run_tail = [&](Segment<T> segment, Taps taps, int64_t count, T* out) {
    const int64_t c = channels / L * L;
    const bool halved = Half::kLanes < L && channels - c <= Half::kLanes;
    const T* last_row = nullptr;
    for (const T* row : segment.row) last_row = row != nullptr ? row : last_row;
    const int64_t last_column = min_of((count - 1) * p.stride + 2 * p.dilation, p.width - 1 - segment.first_column);
    const int64_t read = last_column * pitch + c + (halved ? Half::kLanes : L);
    if (last_row != nullptr && last_row + read > end) taps = Taps::kChecked;
    if (!halved) {
      kKernels.table[int(taps)][count - 1](segment, {c, channels}, tail, weights + 10 * c, out, L);
      return;
    }
    const bool last_outside = segment.last_outside;
    for (int64_t some; count > 0; count -= some, out += some * L) {
      some = min_of(count, kHalfRows);
      segment.last_outside = last_outside && some == count;
      kHalfKernels.table[int(taps)][some - 1](segment, {c, channels}, Half::mask(0, channels - c), weights + 10 * c,
                                              out, L);
      for (const T*& row : segment.row) row = row == nullptr ? nullptr : row + some * p.stride * pitch;
      segment.first_column += some * p.stride;
      segment.first_outside = false;
    }
  };

  for (int64_t group = channel_begin; group < channel_end; group += kGroup) {
    const int64_t group_end = min_of(group + kGroup, channel_end);
    const T* image = p.x + (tile.image + tile.begin / out_pixels) * map;
    int64_t i = first / p.out_width, j = first % p.out_width;  // output row and column
    for (BlockWalk walk(pixels, Tiling<V>::kTileRows); walk.more(); walk.next()) {
      const Block& block = walk.block;
      for (int64_t done = 0; done < block.size;) {
        const int64_t count = reach.run(j, min_of(block.size - done, p.out_width - j));
        const Taps taps = reach.taps(j);
        const Segment<T> segment = segment_at(p, image, i, j, count);
        if (fetch_ahead) fetch_next_row(p, segment, count * p.stride, group, group_end - group);
        T* out = scratch + block.begin * padded + done * L;
        const int64_t whole_end = group + (group_end - group) / L * L;
        kKernels.table[int(taps)][count - 1](segment, {group, whole_end}, all, weights + 10 * group,
                                             out + group * block.size, L * block.size);
        if (whole_end < group_end) run_tail(segment, taps, count, out + whole_end * block.size);
        done += count;
        j += count;
        if (j == p.out_width) j = 0, ++i;
        if (i == p.out_height) i = 0, image += map;
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- NCHW

template <class V, int kStride>
struct TapMask {
  typename V::EvenMask lanes;
};
template <class V>
struct TapMask<V, 1> {
  typename V::Mask lanes;
};

// Which lanes of one vector of output columns find each of the three tap columns inside the map.
template <class V, int kStride>
struct ColumnMasks {
  TapMask<V, kStride> tap[3];

  // Output columns from `j` on.
  static ColumnMasks at(int64_t j, int64_t width, int64_t pad_left, int64_t dilation) {
    ColumnMasks masks;
    for (int v = 0; v < 3; ++v) {
      const int64_t column = j * kStride - pad_left + v * dilation;
      if constexpr (kStride == 1) {
        masks.tap[v].lanes = V::mask(-column, width - column);
      } else {
        masks.tap[v].lanes = V::even_mask(-column, width - column);
      }
    }
    return masks;
  }
};

// Output columns from `begin` until `end` is covered, of one output row and channel, to out[begin ...]. Lanes hold
// neighbouring output columns; `masks` belong to the vectors in order.
template <class V, int kStride>
FUSEDSEP_INLINE void depthwise_row(const typename V::T* const row[3], int64_t width, int64_t pad_left, int64_t dilation,
                                   const ColumnMasks<V, kStride>* masks, const V& bias, const V weight[9],
                                   Activation activation, int64_t begin, int64_t end, typename V::T* out) {
  constexpr int L = V::kLanes;
  constexpr int64_t kSpan = (L - 1) * kStride;  // columns that the lanes of one vector span beyond the first
  for (int64_t j = begin; j < end; j += L, ++masks) {
    const int64_t first = j * kStride - pad_left;
    const bool inside = first >= 0 && first + kSpan + 2 * dilation < width;
    V sum = V::zero();
    FUSEDSEP_UNROLL(3)
    for (int u = 0; u < 3; ++u) {
      if (row[u] == nullptr) continue;
      FUSEDSEP_UNROLL(3)
      for (int v = 0; v < 3; ++v) {
        const typename V::T* x = row[u] + first + v * dilation;
        V value;
        if constexpr (kStride == 1) {
          value = inside ? V::load(x) : V::load(x, masks->tap[v].lanes);
        } else {
          value = inside ? V::load_even(x) : V::load_even(x, masks->tap[v].lanes);
        }
        sum = V::fma(value, weight[3 * u + v], sum);
      }
    }
    activate(activation, V::add(bias, sum)).store(out + j);
  }
}

template <class V, int kStride>
void depthwise_nchw(const SeparableParams<typename V::T>& p, const Tile& tile, int64_t channel_begin,
                    int64_t channel_end, typename V::T* scratch) {
  using T = typename V::T;
  constexpr int L = V::kLanes;
  const int64_t pixels = tile.end - tile.begin, padded = round_up(pixels, L);
  const int64_t first_row = tile.begin / p.out_width, last_row = (tile.end - 1) / p.out_width;
  const T* weights = p.packed + PackedLayout<V>(p.in_channels, p.out_channels, false).depthwise;

  // h of one channel, in order of pixels. A row starts and ends with whole vectors: what sticks out in front of the
  // tile lands in the first L elements, what sticks out behind a row is overwritten by the next one.
  alignas(64) T line[L + kMaxTilePixels + L];

  // The masks of a row's vectors are those of every row and channel. A tile of more than one row holds whole rows,
  // which are then short; within one row it may start at any vector.
  ColumnMasks<V, kStride> masks[kMaxTilePixels / L + 2];
  const int64_t first_column = tile.begin - first_row * p.out_width;
  const int64_t masks_begin = first_row == last_row ? first_column / L * L : 0;
  const int64_t masks_end = first_row == last_row ? first_column + pixels : p.out_width;
  for (int64_t j = masks_begin; j < masks_end; j += L) {
    masks[(j - masks_begin) / L] = ColumnMasks<V, kStride>::at(j, p.width, p.pad_left, p.dilation);
  }

  for (int64_t c = channel_begin; c < channel_end; ++c) {
    const T* map = p.x + (tile.image * p.in_channels + c) * p.height * p.width;
    const V bias = V::broadcast(weights[10 * c]);
    V weight[9];
    for (int t = 0; t < 9; ++t) weight[t] = V::broadcast(weights[10 * c + 1 + t]);

    for (int64_t i = first_row; i <= last_row; ++i) {
      const T* row[3];
      for (int u = 0; u < 3; ++u) {
        const int64_t r = i * kStride - p.pad_top + u * p.dilation;
        row[u] = r >= 0 && r < p.height ? map + r * p.width : nullptr;
      }
      const int64_t begin = i == first_row ? first_column / L * L : 0;
      const int64_t end = i == last_row ? tile.end - i * p.out_width : p.out_width;
      depthwise_row<V, kStride>(row, p.width, p.pad_left, p.dilation, masks + (begin - masks_begin) / L, bias, weight,
                                p.activation, begin, end, line + L + (i * p.out_width - tile.begin));
    }
    V::zero().store(line + L + pixels);  // lanes behind the last pixel are multiplied too, though never stored in y

    for (int64_t q = 0; q < padded; q += Tiling<V>::kTileColumns) {
      const int64_t panel_width = min_of(Tiling<V>::kTileColumns, padded - q);
      T* panel = scratch + q * p.in_channels + c * panel_width;
      for (int64_t v = 0; v < panel_width; v += L) V::load(line + L + q + v).store(panel + v);
    }
  }
}

}  // namespace
}  // namespace fusedsep
