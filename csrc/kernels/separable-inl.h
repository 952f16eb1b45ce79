// SPDX-License-Identifier: BSD-3-Clause
//
// The kernels of separable.h over one vector type. An ISA's source file includes its vec_*.h and this, and fills a
// table.
#pragma once

#include "combine-inl.h"
#include "convolution-inl.h"
#include "depthwise-inl.h"
#include "depthwise-map-inl.h"
#include "join-inl.h"
#include "max-pool-inl.h"
#include "means-inl.h"
#include "pack-inl.h"
#include "pixels-inl.h"
#include "pointwise-inl.h"
#include "separable.h"
#include "sigmoid-inl.h"
#include "upsample-inl.h"

namespace fusedsep {
namespace {

template <class V>
int64_t packed_size(int64_t in_channels, int64_t out_channels, bool channels_last) {
  return PackedLayout<V>(in_channels, out_channels, channels_last).size;
}

template <class V>
int64_t scratch_size(int64_t in_channels, int64_t pixels, bool channels_last) {
  return channels_last ? pixels * round_up(in_channels, V::kLanes) : round_up(pixels, V::kLanes) * in_channels;
}

template <class V>
void depthwise(const SeparableParams<typename V::T>& params, const Tile& tile, int64_t channel_begin,
               int64_t channel_end, typename V::T* scratch) {
  if (params.rows == Rows::kMeans) {
    means<V>(params, tile, channel_begin, channel_end, scratch);
  } else if (params.rows == Rows::kPixels) {
    pixels<V>(params, tile, channel_begin, channel_end, scratch);
  } else if (params.rows == Rows::kNormalizedPixels) {
    normalized_pixels<V>(params, tile, channel_begin, channel_end, scratch);
  } else if (params.rows != Rows::kDepthwise) {
    // `pointwise` reads the image itself
  } else if (params.channels_last) {
    depthwise_channels_last<V>(params, tile, channel_begin, channel_end, scratch);
  } else if (params.stride == 1) {
    depthwise_nchw<V, 1>(params, tile, channel_begin, channel_end, scratch);
  } else {
    depthwise_nchw<V, 2>(params, tile, channel_begin, channel_end, scratch);
  }
}

template <class V>
int64_t panel_count(int64_t out_channels, bool channels_last) {
  return channels_last ? ceil_div(out_channels, Tiling<V>::kTileColumns)
                       : block_count(out_channels, Tiling<V>::kTileRows);
}

// What follows the product of a tile in channels_last, while it is in the cache: columns [begin, end) of `pixels` from
// the `first` one on, counted on from image to image.
template <class V>
void finish_tile(const SeparableParams<typename V::T>& params, int64_t first, int64_t pixels, int64_t begin,
                 int64_t end) {
  const int64_t pitch = y_pitch_of(params);
  typename V::T* const c = params.y + first * pitch + begin;
  if (is_stored_first(params.pointwise_activation)) {
    activate_map<V>(params.pointwise_activation, c, pixels, end - begin, pitch);
  }
  if (params.residual != nullptr || params.joined_activation != Activation::kNone) {
    join<V>(join_of<typename V::T>(params, c, pitch, first, pixels, begin, end - begin));
  }
}

template <class V>
void pointwise(const SeparableParams<typename V::T>& params, const Tile& tile, int64_t panel_begin, int64_t panel_end,
               const typename V::T* scratch) {
  using T = typename V::T;
  const int64_t pixels = tile.end - tile.begin, out_pixels = params.out_height * params.out_width;
  const int64_t column_begin = panel_begin * Tiling<V>::kTileColumns;
  const int64_t column_end = min_of(panel_end * Tiling<V>::kTileColumns, params.out_channels);
  const int64_t first = tile.image * out_pixels + tile.begin;
  if (params.rows == Rows::kPatches || params.rows == Rows::kPatchesOfNchw) {
    const PackedLayout<V> layout(params.in_channels, params.out_channels, true);
    convolve<V>(params, params.packed + layout.pointwise, params.packed + layout.pointwise_bias, tile, panel_begin,
                panel_end);
    finish_tile<V>(params, first, pixels, column_begin, column_end);
    return;
  }
  const PackedLayout<V> layout(params.in_channels, params.out_channels, params.channels_last);
  const T* weights = params.packed + layout.pointwise;

  Product<T> product;
  product.depth = params.in_channels;
  product.bias = params.packed + layout.pointwise_bias;
  product.activation = params.pointwise_activation;
  product.accumulate = false;
  if (params.channels_last) {
    product.rows = scratch;
    product.row_count = pixels;
    product.block_begin = 0;
    product.block_end = block_count(pixels, Tiling<V>::kTileRows);
    product.columns = weights;
    product.column_begin = column_begin;
    product.column_end = column_end;
    product.c_stride = y_pitch_of(params);
    product.c = params.y + first * product.c_stride;
    if (params.rows == Rows::kDepthwise) product.ahead[0] = rows_ahead(params, tile);
    multiply<V, false>(product);
    finish_tile<V>(params, first, pixels, column_begin, column_end);
  } else {
    product.rows = weights;
    product.row_count = params.out_channels;
    product.block_begin = panel_begin;
    product.block_end = panel_end;
    product.columns = scratch;
    product.column_begin = 0;
    product.column_end = pixels;
    product.c = params.y + tile.image * out_pixels * params.out_channels + tile.begin;
    product.c_stride = out_pixels;
    multiply<V, true>(product);
  }
}

template <class V>
SeparableKernels<typename V::T> separable_kernels() {
  return {V::kLanes,
          Tiling<V>::kTileRows,
          Tiling<V>::kTileColumns,
          packed_size<V>,
          pack<V>,
          scratch_size<V>,
          depthwise<V>,
          panel_count<V>,
          pointwise<V>,
          depthwise_map_packed_size<V>,
          pack_depthwise_map<V>,
          depthwise_map_scratch_size<V>,
          kLineVectors<V> * V::kLanes,
          depthwise_map<V>,
          combine<V>,
          max_pool<V>,
          upsample<V>};
}

}  // namespace
}  // namespace fusedsep
