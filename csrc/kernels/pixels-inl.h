// SPDX-License-Identifier: BSD-3-Clause
//
// What a 1x1 convolution alone needs in front of its product, in channels_last: the pixels of its map as row blocks
// (layout-inl.h).
#pragma once

#include "layout-inl.h"
#include "separable.h"

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

}  // namespace
}  // namespace fusedsep
