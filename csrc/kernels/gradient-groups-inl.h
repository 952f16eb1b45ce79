// SPDX-License-Identifier: BSD-3-Clause
//
// What both backward kernels of a depthwise convolution in channels_last have in common: the rows of x and gd that a
// group of channels keeps, and the way of gx to memory.
#pragma once

#include "depthwise-map-inl.h"
#include "gradient-rows-inl.h"

namespace fusedsep {
namespace {

// Scratch of a group of channels: a line of gx, sums of the taps' gradients, rows of x with zeros for the padding, and
// rows of gd as the transposed convolution reads them. Both keep as many rows as are in use, each as [vector of
// channels][column][kLanes]: neighbouring columns of a vector are neighbours in memory, however many channels the maps
// have, and no column needs a check.
template <class V>
struct GroupScratch {
  using T = typename V::T;
  // Pixels of gx that are computed at a time.
  static constexpr int64_t kLinePixels = max_of(kMapPixels<V>, Tiling<V>::kTileRows);
  int64_t vectors;
  int64_t x_rows, x_columns, x_pitch;     // pitch: elements of a row
  int64_t gd_rows, gd_columns, gd_pitch;  // of gd, spread
  int64_t gd_first;                       // where column 0 of gd is
  int64_t line = 0, taps, x, gd, size;

  GroupScratch(const SeparableParams<T>& conv, int64_t channels) : vectors(ceil_div(channels, V::kLanes)) {
    constexpr int64_t L = V::kLanes;
    const int64_t extent = reach_of(conv) + 1, spread = spread_width(conv);
    x_rows = min_of(conv.height, extent);
    x_columns = spread + extent - 1;
    x_pitch = vectors * x_columns * L;
    gd_rows = kept_rows(conv);
    gd_first = max_of(0, transposed(conv).pad_left);
    // Columns that only the padding reaches stand in front of the first one that gx reads, or behind the last.
    gd_columns = max_of(gd_first + spread, first_of_gx(conv) + conv.width + extent - 1);
    gd_pitch = vectors * gd_columns * L;
    taps = line + kLinePixels * L;
    x = taps + vectors * conv.kernel * conv.kernel * L;
    gd = x + x_rows * x_pitch;
    size = gd + gd_rows * gd_pitch;
  }
  // The column of the kept rows where the taps of column 0 of gx begin.
  static int64_t first_of_gx(const SeparableParams<T>& conv) { return max_of(0, -transposed(conv).pad_left); }
};

// So many segments are added up in T before the sums go on in double.
constexpr int64_t kChainedSegments = 16;

// Moves the sums of `count` taps to sums[t * pitch].
template <class V>
FUSEDSEP_INLINE void add_taps(typename V::T* taps, int64_t count, double* sums, int64_t pitch) {
  for (int64_t t = 0; t < count; ++t) {
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
      __builtin_prefetch(x + conv.width * channels, 0, 2);  // what the next row reads
      return lanes >= L ? V::load(x) : V::load(x, mask);
    };
    if (p.x_affine.center == nullptr) {
      for (int64_t j = 0; j < columns; ++j) load(j).store(to + j * L);
    } else {
      const StripAffine<V, true> affine(p.x_affine, Strip{begin + v * L, 0, 0, 0, false});
      for (int64_t j = 0; j < columns; ++j) activate_any(p.x_activation, affine(load(j))).store(to + j * L);
    }
  }
}

// Row `i` of gx of an image for the group of channels from `begin` on: segment(v, block) leaves a block of pixels of
// vector `v` of the group in the scratch's line.
template <class V, class F>
FUSEDSEP_INLINE void write_grad_x_row(const TrainingParams<typename V::T>& p, int64_t image, int64_t i, int64_t begin,
                                      const GroupScratch<V>& layout, const typename V::T* scratch, int64_t most,
                                      bool stream, const F& segment) {
  using T = typename V::T;
  constexpr int64_t L = V::kLanes;
  const SeparableParams<T>& conv = p.conv;
  const int64_t channels = conv.in_channels, blocks = block_count(conv.width, most);
  T* const row = p.grad_x + (image * conv.height + i) * conv.width * channels + begin;
  const T* const line = scratch + layout.line;
  // Where a vector is a part of a line of the cache, the parts of a line follow each other block by block: stored past
  // the caches, a line that is not whole soon leaves in pieces.
  for (int64_t line_begin = 0; line_begin < layout.vectors; line_begin += kLineVectors<V>) {
    const int64_t line_end = min_of(line_begin + kLineVectors<V>, layout.vectors);
    for (int64_t b = 0; b < blocks; ++b) {
      const Block block = block_at(conv.width, blocks, b);
      for (int64_t v = line_begin; v < line_end; ++v) {
        segment(v, block);
        const auto mask = V::mask(0, channels - begin - v * L);
        T* out = row + block.begin * channels + v * L;
        for (int64_t m = 0; m < block.size; ++m, out += channels) {
          if (stream) {
            V::load(line + m * L).stream(out);
          } else {
            V::load(line + m * L).store(out, mask);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace fusedsep
