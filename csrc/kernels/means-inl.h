// SPDX-License-Identifier: BSD-3-Clause
//
// What stands in the place of the depthwise stage in front of a classifier: means of the last maps, written as row
// blocks (layout-inl.h), in channels_last.
#pragma once

#include "layout-inl.h"
#include "separable.h"

namespace fusedsep {
namespace {

// The means of the maps of images [tile.begin, tile.end): sums, in order, of chains over at most kChain pixels.
template <class V>
void means(const SeparableParams<typename V::T>& p, const Tile& tile, int64_t channel_begin, int64_t channel_end,
           typename V::T* scratch) {
  using T = typename V::T;
  constexpr int L = V::kLanes;
  const int64_t plane = p.height * p.width, padded = round_up(p.in_channels, L), pitch = x_pitch_of(p);
  const int64_t images = tile.end - tile.begin, blocks = block_count(images, Tiling<V>::kTileRows);
  const V scale = V::broadcast(T(1) / T(plane));
  for (int64_t b = 0; b < blocks; ++b) {
    const Block block = block_at(images, blocks, b);
    for (int64_t m = 0; m < block.size; ++m) {
      const T* map = p.x + (tile.image + tile.begin + block.begin + m) * plane * pitch;
      T* out = scratch + block.begin * padded + m * L;
      for (int64_t c = channel_begin; c < channel_end; c += L) {
        const bool whole = c + L <= p.in_channels;
        const auto mask = V::mask(0, p.in_channels - c);
        V sum = V::zero();
        for (int64_t begin = 0; begin < plane; begin += Tiling<V>::kChain) {
          V chain = V::zero();
          for (int64_t i = begin; i < min_of(begin + Tiling<V>::kChain, plane); ++i) {
            const T* x = map + i * pitch + c;
            chain = V::add(whole ? V::load(x) : V::load(x, mask), chain);
          }
          sum = V::add(chain, sum);
        }
        V::mul(scale, sum).store(out + c * block.size);
      }
    }
  }
}

}  // namespace
}  // namespace fusedsep
