// SPDX-License-Identifier: BSD-3-Clause
//
// What a 1x1 convolution alone needs in front of its product, in channels_last: the pixels of its map as row blocks
// (layout-inl.h), as they are or normalized.
#pragma once

#include <cmath>

#include "layout-inl.h"
#include "separable.h"
#include "strips-inl.h"

namespace fusedsep {
namespace {

// Channels [channel_begin, channel_end) of the pixels of `tile`, times their factors where there are any. Rows in the
// order of their use make the product faster than rows in place, by more than this copy costs.
template <class V>
void pixels(const SeparableParams<typename V::T>& p, const Tile& tile, int64_t channel_begin, int64_t channel_end,
            typename V::T* scratch) {
  using T = typename V::T;
  constexpr int L = V::kLanes;
  const int64_t count = tile.end - tile.begin, blocks = block_count(count, Tiling<V>::kTileRows);
  const int64_t plane = p.out_height * p.out_width, first = tile.image * plane + tile.begin, pitch = x_pitch_of(p);
  const auto place_of = [&](int64_t pixel) {
    if (p.stride == 1) return pixel;
    const int64_t image = pixel / plane, i = pixel % plane / p.out_width, j = pixel % p.out_width;
    return (image * p.height + i * p.stride) * p.width + j * p.stride;
  };
  const int64_t whole_end = channel_begin + (channel_end - channel_begin) / L * L;
  const auto mask = V::mask(0, channel_end - whole_end);
  for (int64_t b = 0; b < blocks; ++b) {
    const Block block = block_at(count, blocks, b);
    T* const rows = scratch + block.begin * round_up(p.in_channels, L);
    for (int64_t m = 0; m < block.size; ++m) {
      const int64_t pixel = first + block.begin + m;
      const T* const x = p.x + place_of(pixel) * pitch;
      T* const out = rows + m * L;
      if (p.gate == nullptr) {
        for (int64_t c = channel_begin; c < whole_end; c += L) V::load(x + c).store(out + c * block.size);
        if (whole_end < channel_end) V::load(x + whole_end, mask).store(out + whole_end * block.size);
      } else {
        const T* const gate = p.gate + pixel / plane * p.in_channels;
        for (int64_t c = channel_begin; c < whole_end; c += L) {
          V::mul(V::load(x + c), V::load(gate + c)).store(out + c * block.size);
        }
        if (whole_end < channel_end) {
          const V last = V::mul(V::load(x + whole_end, mask), V::load(gate + whole_end, mask));
          last.store(out + whole_end * block.size);
        }
      }
    }
  }
}

// The same of pixels that are normalized, each over all of its channels.
template <class V>
void normalized_pixels(const SeparableParams<typename V::T>& p, const Tile& tile, int64_t channel_begin,
                       int64_t channel_end, typename V::T* scratch) {
  using T = typename V::T;
  constexpr int L = V::kLanes;
  const int64_t channels = p.in_channels, whole = channels / L * L, pitch = x_pitch_of(p);
  const int64_t count = tile.end - tile.begin, blocks = block_count(count, Tiling<V>::kTileRows);
  const T* const first = p.x + (tile.image * p.out_height * p.out_width + tile.begin) * pitch;
  const T epsilon = p.packed[PackedLayout<V>(channels, p.out_channels, true).depthwise];
  const auto tail = V::mask(0, channels - whole);
  T ones[L];
  V::broadcast(T(1)).store(ones);
  const V counted = V::load(ones, tail);  // 1 in the lanes of the last channels, 0 in those behind them
  const auto total = [](const V& sum) {
    double lanes[L] = {};
    sum.accumulate(lanes);
    return sum_of_lanes<V>(lanes);
  };
  for (int64_t b = 0; b < blocks; ++b) {
    const Block block = block_at(count, blocks, b);
    const T* const pixels = first + block.begin * pitch;
    T means[Tiling<V>::kTileRows], scales[Tiling<V>::kTileRows];
    // One step for all pixels of the block before the next one: those of a single pixel wait for each other.
    for (int64_t m = 0; m < block.size; ++m) {
      const T* const x = pixels + m * pitch;
      V sum = V::zero();
      for (int64_t c = 0; c < whole; c += L) sum = V::add(sum, V::load(x + c));
      if (whole < channels) sum = V::add(sum, V::load(x + whole, tail));
      means[m] = T(total(sum) / double(channels));
    }
    for (int64_t m = 0; m < block.size; ++m) {
      const T* const x = pixels + m * pitch;
      const V mean = V::broadcast(means[m]);
      V squares = V::zero();
      for (int64_t c = 0; c < whole; c += L) {
        const V difference = V::sub(V::load(x + c), mean);
        squares = V::fma(difference, difference, squares);
      }
      if (whole < channels) {
        const V difference = V::sub(V::load(x + whole, tail), V::mul(mean, counted));
        squares = V::fma(difference, difference, squares);
      }
      scales[m] = T(1 / std::sqrt(total(squares) / double(channels) + double(epsilon)));
    }
    T* const rows = scratch + block.begin * round_up(channels, L);
    for (int64_t m = 0; m < block.size; ++m) {
      const T* const x = pixels + m * pitch;
      T* const out = rows + m * L;
      const V mean = V::broadcast(means[m]), scale = V::broadcast(scales[m]);
      for (int64_t c = channel_begin; c < channel_end; c += L) {
        const V value = c < whole ? V::load(x + c) : V::load(x + whole, tail);
        V::mul(V::sub(value, mean), scale).store(out + c * block.size);
      }
    }
  }
}

}  // namespace
}  // namespace fusedsep
