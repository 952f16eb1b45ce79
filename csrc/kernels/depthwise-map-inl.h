// SPDX-License-Identifier: BSD-3-Clause
//
// A depthwise convolution alone, of an odd kernel from 3x3 to 11x11 taps and any dilation, with its activation, in
// channels_last: what networks have where no pointwise convolution follows at once, or where the taps are more than
// nine.
#pragma once

#include "activation-inl.h"
#include "join-inl.h"
#include "layout-inl.h"
#include "pack-inl.h"
#include "separable.h"

namespace fusedsep {
namespace {

// Register tiles: an accumulator for each pixel and a weight; columns are operands of the FMAs, read from L1. Six
// accumulators would not cover the latency of two FMAs a cycle.
template <class V>
constexpr int kMapPixels = Tiling<V>::kTileRows == 6 ? 12 : Tiling<V>::kTileRows;

// The vectors of a cache line, which are worked on together.
template <class V>
constexpr int64_t kLineVectors = max_of(1, 64 / int64_t(sizeof(V)));

// Packed weights: a bias and the taps of each vector of channels, a vector each.
template <class V>
int64_t depthwise_map_packed_size(int64_t channels, int64_t kernel) {
  return round_up((1 + kernel * kernel) * round_up(channels, V::kLanes), 64 / int64_t(sizeof(typename V::T)));
}

template <class V>
void pack_depthwise_map(const PackParams<typename V::T>& p, int64_t kernel, typename V::T* packed) {
  const int64_t size = depthwise_map_packed_size<V>(p.in_channels, kernel);
  for (int64_t i = 0; i < size; ++i) packed[i] = 0;
  pack_depthwise<V>(p, kernel * kernel, packed);
}

// The input rows from the first to the last one that an output row reads, for a line of channels, with zeros for the
// padding: row r at r % count, each as [vector][column][kLanes]. No column needs a check then, and the reads of
// neighbouring pixels are neighbours in memory, however many channels the map has.
template <class V>
struct KeptRows {
  int64_t reach, count, columns, pitch, size;  // reach: rows from the first tap to the last; pitch: elements of a row

  explicit KeptRows(const SeparableParams<typename V::T>& p)
      : reach((p.kernel - 1) * p.dilation + 1),
        count(min_of(reach, p.height)),
        columns((p.out_width - 1) * p.stride + reach),
        pitch(kLineVectors<V> * columns * V::kLanes),
        size(count * pitch) {}
};

template <class V>
int64_t depthwise_map_scratch_size(const SeparableParams<typename V::T>& p) {
  return KeptRows<V>(p).size;
}

// Up to kMapPixels neighbouring pixels of an output row, one vector of channels.
template <class V>
struct MapSegment {
  using T = typename V::T;
  const T* row[11];  // the kept rows, at the first pixel's first tap; null: outside the map
  const T* weights;  // a bias and the taps
  int64_t kernel, dilation;
  Activation activation;
  T* y;
  const T* residual;                  // null: none
  int64_t y_stride, residual_stride;  // elements between pixels
  bool whole;
  typename V::Mask mask;  // of y's lanes unless `whole`
};

// kKernel 0: the kernel and the dilation of the segment, without a copy of the code for each of its columns; otherwise
// the dilation is 1.
template <class V, int M, int kKernel, int kStride>
__attribute__((noinline)) void depthwise_map_segment(const MapSegment<V>& segment) {
  constexpr int L = V::kLanes;
  V sum[M];
  FUSEDSEP_UNROLL(16)
  for (int m = 0; m < M; ++m) sum[m] = V::zero();
  const int64_t kernel = kKernel > 0 ? kKernel : segment.kernel;
  const int64_t dilation = kKernel > 0 ? 1 : segment.dilation;
  for (int64_t u = 0; u < kernel; ++u) {
    const auto* x = segment.row[u];
    if (x == nullptr) continue;
    const auto* weights = segment.weights + (1 + u * kernel) * L;
    const auto add_column = [&](int64_t v) __attribute__((always_inline)) {
      const V weight = V::load(weights + v * L);
      FUSEDSEP_UNROLL(16)
      for (int m = 0; m < M; ++m) sum[m] = V::fma(V::load(x + (m * kStride + v * dilation) * L), weight, sum[m]);
    };
    if constexpr (kKernel > 0) {
      FUSEDSEP_UNROLL(7)
      for (int v = 0; v < kKernel; ++v) add_column(v);
    } else {
      FUSEDSEP_UNROLL(1)
      for (int64_t v = 0; v < kernel; ++v) add_column(v);
    }
  }
  const V bias = V::load(segment.weights);
  FUSEDSEP_UNROLL(16)
  for (int m = 0; m < M; ++m) sum[m] = V::add(bias, sum[m]);
  activate_tile<M>(segment.activation, sum);
  const int64_t stride = segment.y_stride;
  if (segment.residual != nullptr) {
    FUSEDSEP_UNROLL(16)
    for (int m = 0; m < M; ++m) {
      const auto* residual = segment.residual + m * segment.residual_stride;
      sum[m] = V::add(segment.whole ? V::load(residual) : V::load(residual, segment.mask), sum[m]);
    }
  }
  if (segment.whole) {
    FUSEDSEP_UNROLL(16)
    for (int m = 0; m < M; ++m) sum[m].store(segment.y + m * stride);
  } else {
    FUSEDSEP_UNROLL(16)
    for (int m = 0; m < M; ++m) sum[m].store(segment.y + m * stride, segment.mask);
  }
}

template <class V>
struct MapKernels {
  using Function = void (*)(const MapSegment<V>&);
  static constexpr int kMost = kMapPixels<V>;

  // [kernel / 2 - 1, or 3 for larger kernels and for dilated ones][stride - 1][pixels - 1]
  Function table[4][2][kMost];

  constexpr MapKernels() : table{} {
    fill<3, kMost>();
    fill<5, kMost>();
    fill<7, kMost>();
    fill<0, kMost>();
  }

  template <int kKernel, int M>
  constexpr void fill() {
    constexpr int kIndex = kKernel > 0 ? kKernel / 2 - 1 : 3;
    table[kIndex][0][M - 1] = depthwise_map_segment<V, M, kKernel, 1>;
    table[kIndex][1][M - 1] = depthwise_map_segment<V, M, kKernel, 2>;
    if constexpr (M > 1) fill<kKernel, M - 1>();
  }
};

// Row `i` of an image for the line of channels from `begin` on, into a kept row, where the padding is zero already.
template <class V>
void keep_map_row(const SeparableParams<typename V::T>& p, const typename V::T* image, int64_t i, int64_t begin,
                  const KeptRows<V>& rows, typename V::T* row) {
  constexpr int64_t L = V::kLanes;
  const int64_t channels = p.in_channels, pitch = x_pitch_of(p);
  const int64_t columns = min_of(p.width, rows.columns - p.pad_left);
  for (int64_t v = 0; v < kLineVectors<V> && begin + v * L < channels; ++v) {
    const int64_t lanes = channels - begin - v * L;
    const auto mask = V::mask(0, lanes);
    const auto* from = image + i * p.width * pitch + begin + v * L;
    auto* to = row + (v * rows.columns + p.pad_left) * L;
    for (int64_t j = 0; j < columns; ++j, from += pitch, to += L) {
      __builtin_prefetch(from + p.width * pitch, 0, 2);  // what the next row reads
      (lanes >= L ? V::load(from) : V::load(from, mask)).store(to);
    }
  }
}

// Rows [row_begin, row_end) of all images' output, counted on from image to image, and the lines of channels from
// `channel_begin` to `channel_end`, a multiple of a line unless it is the last channel.
template <class V>
void depthwise_map(const SeparableParams<typename V::T>& p, int64_t row_begin, int64_t row_end, int64_t channel_begin,
                   int64_t channel_end, typename V::T* scratch) {
  using T = typename V::T;
  constexpr int64_t L = V::kLanes, kLine = kLineVectors<V> * L;
  static constexpr MapKernels<V> kKernels;
  const int64_t channels = p.in_channels, taps = p.kernel * p.kernel;
  const int64_t y_pitch = y_pitch_of(p), residual_pitch = residual_pitch_of(p);
  const KeptRows<V> rows(p);
  const auto& kernels = kKernels.table[p.dilation > 1 ? 3 : min_of(p.kernel / 2 - 1, 3)][p.stride - 1];
  const bool stored_first = is_stored_first(p.activation);
  const bool joined_later = stored_first || p.joined_activation != Activation::kNone || p.multiplies;
  for (int64_t i = 0; i < rows.size; ++i) scratch[i] = 0;

  for (int64_t line = channel_begin; line < channel_end; line += kLine) {
    int64_t image = -1, next = 0;  // next: the first input row that is not kept yet
    for (int64_t row = row_begin; row < row_end; ++row) {
      const int64_t i = row % p.out_height, top = i * p.stride - p.pad_top;
      if (row / p.out_height != image) {
        image = row / p.out_height;
        next = max_of(0, top);
      }
      const T* const x = p.x + image * p.height * p.width * x_pitch_of(p);
      for (next = max_of(next, top); next < min_of(p.height, top + rows.reach); ++next) {
        keep_map_row<V>(p, x, next, line, rows, scratch + next % rows.count * rows.pitch);
      }
      for (int64_t v = 0; v < kLineVectors<V> && line + v * L < channel_end; ++v) {
        const int64_t c = line + v * L, pixel = row * p.out_width;
        T* const y = p.y + pixel * y_pitch + c;
        const T* const residual = p.residual == nullptr ? nullptr : p.residual + pixel * residual_pitch + c;
        MapSegment<V> segment{};
        segment.weights = p.packed + c * (1 + taps);
        segment.kernel = p.kernel;
        segment.dilation = p.dilation;
        segment.activation = p.activation;
        segment.y_stride = y_pitch;
        segment.residual_stride = residual_pitch;
        segment.whole = c + L <= channels;
        segment.mask = V::mask(0, channels - c);
        for (BlockWalk walk(p.out_width, kMapPixels<V>); walk.more(); walk.next()) {
          const Block& block = walk.block;
          for (int64_t u = 0; u < p.kernel; ++u) {
            const int64_t r = top + u * p.dilation;
            const T* kept = scratch + (r < 0 ? 0 : r % rows.count) * rows.pitch + v * rows.columns * L;
            segment.row[u] = r < 0 || r >= p.height ? nullptr : kept + block.begin * p.stride * L;
          }
          segment.y = y + block.begin * y_pitch;
          if (residual != nullptr && !joined_later) segment.residual = residual + block.begin * residual_pitch;
          kernels[block.size - 1](segment);
        }
        const int64_t lanes = min_of(L, channels - c);
        if (stored_first) activate_map<V>(p.activation, y, p.out_width, lanes, y_pitch);
        if (joined_later && (residual != nullptr || p.joined_activation != Activation::kNone)) {
          join<V>(join_of<T>(p, y, y_pitch, pixel, p.out_width, c, lanes));
        }
      }
    }
  }
}

}  // namespace
}  // namespace fusedsep
