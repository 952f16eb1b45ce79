// SPDX-License-Identifier: BSD-3-Clause
//
// What stands in the place of the depthwise stage at the two ends of a network: patches of the images for the first
// convolution, means of the last maps for the classifier. Written as row blocks (layout-inl.h), in channels_last.
#pragma once

#include "layout-inl.h"
#include "separable.h"

namespace fusedsep {
namespace {

// Where each element of a patch lies in x, relative to its first one, and in which tap.
struct PatchElement {
  int64_t offset;
  int64_t row, column;  // u * dilation, v * dilation
};

// Elements [channel_begin, channel_end) of the patches of `tile`.
template <class V>
void patches(const SeparableParams<typename V::T>& p, const Tile& tile, int64_t channel_begin, int64_t channel_end,
             typename V::T* scratch) {
  using T = typename V::T;
  constexpr int L = V::kLanes;
  const int64_t channels = p.in_channels / 9, plane = p.height * p.width, padded = round_up(p.in_channels, L);
  const bool nchw = p.rows == Rows::kPatchesOfNchw;
  const int64_t of_channel = nchw ? plane : 1, of_column = nchw ? 1 : channels, of_row = p.width * of_column;
  const int64_t pixels = tile.end - tile.begin, blocks = block_count(pixels, Tiling<V>::kTileRows);
  const int64_t out_pixels = p.out_height * p.out_width, first = tile.begin % out_pixels;

  for (int64_t chunk = channel_begin; chunk < channel_end; chunk += L) {
    const int64_t count = min_of(L, channel_end - chunk);
    PatchElement elements[L];
    for (int64_t k = 0; k < count; ++k) {
      const int64_t tap = (chunk + k) / channels, row = tap / 3 * p.dilation, column = tap % 3 * p.dilation;
      elements[k] = {row * of_row + column * of_column + (chunk + k) % channels * of_channel, row, column};
    }
    const T* image = p.x + (tile.image + tile.begin / out_pixels) * plane * channels;
    int64_t i = first / p.out_width, j = first % p.out_width;
    for (int64_t b = 0; b < blocks; ++b) {
      const Block block = block_at(pixels, blocks, b);
      T* out = scratch + block.begin * padded + chunk * block.size;
      for (int64_t m = 0; m < block.size; ++m, out += L) {
        const int64_t row = i * p.stride - p.pad_top, column = j * p.stride - p.pad_left;
        const T* x = image + row * of_row + column * of_column;
        if (row >= 0 && row + 2 * p.dilation < p.height && column >= 0 && column + 2 * p.dilation < p.width) {
          for (int64_t k = 0; k < count; ++k) out[k] = x[elements[k].offset];
        } else {
          for (int64_t k = 0; k < count; ++k) {
            const PatchElement& e = elements[k];
            const bool inside =
                uint64_t(row + e.row) < uint64_t(p.height) && uint64_t(column + e.column) < uint64_t(p.width);
            out[k] = inside ? x[e.offset] : T(0);
          }
        }
        if (++j == p.out_width) j = 0, ++i;
        if (i == p.out_height) i = 0, image += plane * channels;
      }
    }
  }
}

// The means of the maps of images [tile.begin, tile.end): sums, in order, of chains over at most kChain pixels.
template <class V>
void means(const SeparableParams<typename V::T>& p, const Tile& tile, int64_t channel_begin, int64_t channel_end,
           typename V::T* scratch) {
  using T = typename V::T;
  constexpr int L = V::kLanes;
  const int64_t plane = p.height * p.width, padded = round_up(p.in_channels, L);
  const int64_t images = tile.end - tile.begin, blocks = block_count(images, Tiling<V>::kTileRows);
  const V scale = V::broadcast(T(1) / T(plane));
  for (int64_t b = 0; b < blocks; ++b) {
    const Block block = block_at(images, blocks, b);
    for (int64_t m = 0; m < block.size; ++m) {
      const T* map = p.x + (tile.image + tile.begin + block.begin + m) * plane * p.in_channels;
      T* out = scratch + block.begin * padded + m * L;
      for (int64_t c = channel_begin; c < channel_end; c += L) {
        const bool whole = c + L <= p.in_channels;
        const auto mask = V::mask(0, p.in_channels - c);
        V sum = V::zero();
        for (int64_t begin = 0; begin < plane; begin += Tiling<V>::kChain) {
          V chain = V::zero();
          for (int64_t i = begin; i < min_of(begin + Tiling<V>::kChain, plane); ++i) {
            const T* x = map + i * p.in_channels + c;
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
