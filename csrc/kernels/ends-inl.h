// SPDX-License-Identifier: BSD-3-Clause
//
// What stands in the place of the depthwise stage at the two ends of a network: patches of the images for the first
// convolution, means of the last maps for the classifier. Written as row blocks (layout-inl.h), in channels_last.
#pragma once

#include "layout-inl.h"
#include "separable.h"

namespace fusedsep {
namespace {

// One vector's part of a patch: its elements, and the pieces of them that are neighbours in x.
template <class V>
class PatchVector {
 public:
  using T = typename V::T;

  // Elements [begin, end) of a patch, at most kLanes.
  PatchVector(const SeparableParams<T>& p, int64_t begin, int64_t end)
      : height_(p.height), width_(p.width), count_(min_of(end - begin, V::kLanes)) {
    const bool nchw = p.rows == Rows::kPatchesOfNchw;
    const int64_t channels = p.in_channels / 9;
    const int64_t of_channel = nchw ? p.height * p.width : 1, of_column = nchw ? 1 : channels;
    for (int64_t k = 0; k < count_; ++k) {
      const int64_t tap = nchw ? (begin + k) % 9 : (begin + k) / channels;
      const int64_t channel = nchw ? (begin + k) / 9 : (begin + k) % channels;
      const int64_t row = tap / 3 * p.dilation, column = tap % 3 * p.dilation;
      elements_[k] = {(row * p.width + column) * of_column + channel * of_channel, row, column};
    }
    for (int64_t k = 0, size = 0; k < count_; k += size) {
      size = 1;
      while (k + size < count_ && elements_[k + size].row == elements_[k].row &&
             elements_[k + size].offset == elements_[k].offset + size) {
        ++size;
      }
      pieces_[piece_count_++] = {elements_[k].offset, k, V::mask(0, size)};
    }
  }

  // The patch lies inside the map; x is its first element.
  FUSEDSEP_INLINE void copy(const T* x, T* out) const {
    for (int64_t i = 0; i < piece_count_; ++i) {
      const Piece& piece = pieces_[i];
      V::load(x + piece.offset, piece.mask).store(out + piece.lane, piece.mask);
    }
  }

  // Its first element is in this row and column, which may lie outside.
  void copy_checked(const T* x, int64_t row, int64_t column, T* out) const {
    for (int64_t k = 0; k < count_; ++k) {
      const Element& e = elements_[k];
      const bool inside = uint64_t(row + e.row) < uint64_t(height_) && uint64_t(column + e.column) < uint64_t(width_);
      out[k] = inside ? x[e.offset] : T(0);
    }
  }

 private:
  struct Element {
    int64_t offset;       // in x, from the first element of the patch
    int64_t row, column;  // of the tap: u * dilation and v * dilation
  };
  struct Piece {
    int64_t offset, lane;
    typename V::Mask mask;
  };
  int64_t height_, width_, count_, piece_count_ = 0;
  Element elements_[V::kLanes]{};
  Piece pieces_[V::kLanes];
};

// Elements [channel_begin, channel_end) of the patches of `tile`.
template <class V>
void patches(const SeparableParams<typename V::T>& p, const Tile& tile, int64_t channel_begin, int64_t channel_end,
             typename V::T* scratch) {
  using T = typename V::T;
  constexpr int L = V::kLanes;
  const int64_t channels = p.in_channels / 9, map = p.height * p.width * channels;
  const int64_t of_column = p.rows == Rows::kPatchesOfNchw ? 1 : channels, reach = 2 * p.dilation;
  const int64_t pixels = tile.end - tile.begin, blocks = block_count(pixels, Tiling<V>::kTileRows);
  const int64_t out_pixels = p.out_height * p.out_width, first = tile.begin % out_pixels;

  for (int64_t chunk = channel_begin; chunk < channel_end; chunk += L) {
    const PatchVector<V> vector(p, chunk, min_of(chunk + L, channel_end));
    const T* image = p.x + (tile.image + tile.begin / out_pixels) * map;
    int64_t i = first / p.out_width, j = first % p.out_width;
    for (int64_t b = 0; b < blocks; ++b) {
      const Block block = block_at(pixels, blocks, b);
      T* out = scratch + block.begin * round_up(p.in_channels, L) + chunk * block.size;
      for (int64_t m = 0; m < block.size; ++m, out += L) {
        const int64_t row = i * p.stride - p.pad_top, column = j * p.stride - p.pad_left;
        const T* x = image + (row * p.width + column) * of_column;
        if (row >= 0 && row + reach < p.height && column >= 0 && column + reach < p.width) {
          vector.copy(x, out);
        } else {
          vector.copy_checked(x, row, column, out);
        }
        if (++j == p.out_width) j = 0, ++i;
        if (i == p.out_height) i = 0, image += map;
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
