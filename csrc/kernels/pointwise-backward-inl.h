// SPDX-License-Identifier: BSD-3-Clause
//
// Backward of BN, activation and the pointwise convolution, for a tile: training.h's S1, S2, gp, g1, T1, T2 and the
// operands of the weight gradient, which sums over pixels and so wants one of them transposed: gp in channels_last, h
// in NCHW. Both products run in the microkernel of the forward.
#pragma once

#include "training-inl.h"

namespace fusedsep {
namespace {

template <class V, bool kChannelsLast>
void normalize_backward_reduce(const TrainingParams<typename V::T>& p, const Tile& tile, double* sums) {
  const int64_t channels = p.conv.out_channels, pitch = map_pitch<kChannelsLast>(p.conv, channels);
  const auto* product = tile_of_map<kChannelsLast>(p.conv.y, p.conv, tile, channels);
  const auto* grad_y = tile_of_map<kChannelsLast>(p.grad_y, p.conv, tile, channels);
  ChannelSums<V, kChannelsLast, 2> totals(sums, round_up(channels, 16));
  for_each_strip<V, kChannelsLast>(channels, tile.end - tile.begin, kStripVectors, [&](const Strip& strip) {
    const auto values = in_map<V, kChannelsLast>(product, pitch, strip);
    const auto gradients = in_map<V, kChannelsLast>(grad_y, pitch, strip);
    const StripAffine<V, kChannelsLast> affine(p.affine2, strip);
    V sum = V::zero(), moment = V::zero();
    for (int64_t i = 0; i < strip.count; ++i) {
      const V value = values.load_streaming(strip, i), gradient_y = gradients.load_streaming(strip, i);
      const V g = activation_gradient_any(p.pointwise_activation, affine(value), gradient_y);
      sum = V::add(sum, g);
      moment = V::fma(g, V::sub(value, affine.center), moment);
    }
    totals.add(0, strip, sum);
    totals.add(1, strip, moment);
    totals.finish(strip);
  });
}

// Pixel `pixel` of the weight gradient's `columns`, input channels [c, c + kLanes).
template <class V>
FUSEDSEP_INLINE typename V::T* gradient_column(const WeightGradient<typename V::T>& gradient, int64_t in_channels,
                                               int64_t c, int64_t pixel) {
  constexpr int64_t kColumns = Tiling<V>::kTileColumns;
  const int64_t panel = c / kColumns * kColumns;
  const int64_t width = min_of(kColumns, round_up(in_channels, V::kLanes) - panel);
  return gradient.columns + panel * gradient.depth + pixel * width + (c - panel);
}

// gp of a tile, to where `place(strip)` says.
template <class V, bool kChannelsLast, class F>
void product_gradient(const TrainingParams<typename V::T>& p, const Tile& tile, const F& place) {
  const int64_t channels = p.conv.out_channels, pitch = map_pitch<kChannelsLast>(p.conv, channels);
  const int64_t pixels = tile.end - tile.begin;
  const auto* product = tile_of_map<kChannelsLast>(p.conv.y, p.conv, tile, channels);
  const auto* grad_y = tile_of_map<kChannelsLast>(p.grad_y, p.conv, tile, channels);
  for_each_strip<V, kChannelsLast>(channels, pixels, kOperandStrip<V>, [&](const Strip& strip) {
    const auto values = in_map<V, kChannelsLast>(product, pitch, strip);
    const auto gradients = in_map<V, kChannelsLast>(grad_y, pitch, strip);
    const Lane<V, kChannelsLast> out = place(strip);
    const StripAffine<V, kChannelsLast> affine(p.affine2, strip);
    const StripCorrection<V, kChannelsLast> corrected(p.correction2, strip);
    for (int64_t i = 0; i < strip.count; ++i) {
      const V value = values.load_streaming(strip, i), gradient_y = gradients.load_streaming(strip, i);
      const V g = activation_gradient_any(p.pointwise_activation, affine(value), gradient_y);
      const V gradient = V::mul(affine.scale, corrected(g, V::sub(value, affine.center)));
      counted<V, kChannelsLast>(strip, i, gradient).store(out.at(i));
    }
  });
}

// gp from row blocks of pixels to row blocks of output channels.
template <class V>
void transpose_rows(const typename V::T* gp, int64_t channels, int64_t pixels,
                    const WeightGradient<typename V::T>& gradient, int64_t offset) {
  constexpr int64_t L = V::kLanes;
  const int64_t padded = round_up(channels, L), blocks = block_count(pixels, Tiling<V>::kTileRows);
  RowBlocks<V> rows(gradient.rows, channels, gradient.depth);
  int64_t b = 0, m = 0;
  Block block = block_at(pixels, blocks, 0);
  for (int64_t pixel = 0; pixel < pixels; pixel += L) {
    const typename V::T* source[L];
    int64_t size[L];
    const int64_t count = min_of(L, pixels - pixel);
    for (int64_t i = 0; i < count; ++i) {
      source[i] = gp + block.begin * padded + m * L;
      size[i] = block.size;
      if (++m == block.size && ++b < blocks) {
        block = block_at(pixels, blocks, b);
        m = 0;
      }
    }
    for (int64_t c = 0; c < channels; c += L) {
      V square[L];
      for (int64_t i = 0; i < L; ++i) square[i] = i < count ? V::load(source[i] + c * size[i]) : V::zero();
      V::transpose(square);
      for (int64_t i = 0; i < min_of(L, channels - c); ++i) square[i].store(rows.at(c + i, offset + pixel));
    }
  }
}

// h from column panels of pixels to column panels of input channels.
template <class V>
void transpose_columns(const typename V::T* h, int64_t channels, int64_t pixels,
                       const WeightGradient<typename V::T>& gradient, int64_t offset) {
  constexpr int64_t L = V::kLanes, kColumns = Tiling<V>::kTileColumns;
  for (int64_t pixel = 0; pixel < pixels; pixel += L) {
    const int64_t panel = pixel / kColumns * kColumns;
    const int64_t width = min_of(kColumns, round_up(pixels, L) - panel);
    const typename V::T* source = h + panel * channels + (pixel - panel);
    for (int64_t c = 0; c < channels; c += L) {
      V square[L];
      for (int64_t i = 0; i < L; ++i) {
        square[i] = c + i < channels ? V::load(source + (c + i) * width) : V::zero();
      }
      V::transpose(square);
      for (int64_t i = 0; i < L; ++i) {
        square[i].store(gradient_column<V>(gradient, channels, c, offset + pixel + i));
      }
    }
  }
}

template <class V, bool kChannelsLast>
void pointwise_backward(const TrainingParams<typename V::T>& p, const Tile& tile, typename V::T* scratch, double* sums,
                        const WeightGradient<typename V::T>* gradient, int64_t offset) {
  using T = typename V::T;
  constexpr int64_t L = V::kLanes;
  const ScratchLayout<V> layout(p.conv, tile);
  const int64_t in_channels = p.conv.in_channels, out_channels = p.conv.out_channels, pixels = tile.end - tile.begin;
  T *d = scratch + layout.h, *gp = scratch + layout.gp;

  product_gradient<V, kChannelsLast>(
      p, tile, [&](const Strip& strip) { return in_operand<V, kChannelsLast>(gp, out_channels, pixels, strip); });
  if (gradient != nullptr) {
    if constexpr (kChannelsLast) {
      transpose_rows<V>(gp, out_channels, pixels, *gradient, offset);
    } else {
      RowBlocks<V> rows(gradient->rows, out_channels, gradient->depth);
      for_each_strip<V, false>(out_channels, pixels, kOperandStrip<V>, [&](const Strip& strip) {
        const auto from = in_operand<V, false>(gp, out_channels, pixels, strip);
        for (int64_t i = 0; i < strip.count; ++i) {
          V::load(from.at(i)).store(rows.at(strip.channel, offset + strip.pixel + i * L));
        }
      });
    }
  }

  T* g1 = nullptr;
  const int64_t pitch = map_pitch<kChannelsLast>(p.conv, in_channels);
  if (sums != nullptr || (p.d != nullptr && p.g1 != nullptr)) {
    g1 = tile_of_map<kChannelsLast>(p.g1, p.conv, tile, in_channels);
    const T* weights = p.conv.packed + TrainingLayout<V>(in_channels, out_channels, kChannelsLast, true).pointwise;
    Product<T> product{};
    product.rows = kChannelsLast ? gp : weights;
    product.columns = kChannelsLast ? weights : gp;
    product.row_count = kChannelsLast ? pixels : in_channels;
    product.block_end = block_count(product.row_count, Tiling<V>::kTileRows);
    product.column_end = kChannelsLast ? in_channels : pixels;
    product.depth = out_channels;
    product.c = g1;
    product.c_stride = pitch;
    product.ahead[0] = next_tile<kChannelsLast, T>(p.grad_y, p.conv, tile, out_channels);
    product.ahead[1] = next_tile<kChannelsLast, T>(p.conv.y, p.conv, tile, out_channels);
    multiply<V, !kChannelsLast>(product);
  }
  if (sums == nullptr && gradient == nullptr) return;

  // One pass over d, in the cache: g1 in the place of gh, its sums, and h where the weight gradient wants it.
  const T* map = p.d == nullptr ? nullptr : tile_of_map<kChannelsLast>(p.d, p.conv, tile, in_channels);
  if (map == nullptr) raw_depthwise<V>(with_input<V>(p, tile, scratch + layout.x), tile, d);
  const auto pass = [&](auto* totals) {
    for_each_strip<V, kChannelsLast>(in_channels, pixels, kOperandStrip<V>, [&](const Strip& strip) {
      const auto operand = in_operand<V, kChannelsLast>(d, in_channels, pixels, strip);
      const auto values = map == nullptr ? operand : in_map<V, kChannelsLast>(map, pitch, strip);
      const auto gradients = in_map<V, kChannelsLast>(g1, pitch, strip);
      const StripAffine<V, kChannelsLast> affine(p.affine1, strip);
      V sum = V::zero(), moment = V::zero();
      for (int64_t i = 0; i < strip.count; ++i) {
        const V value = values.load(strip, i), u = affine(value);
        if (totals != nullptr) {
          const V g = activation_gradient(p.activation, u, gradients.load(strip, i));
          gradients.store(strip, i, g);
          sum = V::add(sum, g);
          moment = V::fma(g, V::sub(value, affine.center), moment);
        }
        if (gradient == nullptr) continue;
        const V h = counted<V, kChannelsLast>(strip, i, activate_any(p.activation, u));
        if constexpr (kChannelsLast) {
          h.store(gradient_column<V>(*gradient, in_channels, strip.channel, offset + strip.pixel + i));
        } else {
          h.store(operand.at(i));
        }
      }
      if (totals != nullptr) {
        totals->add(0, strip, sum);
        totals->add(1, strip, moment);
        totals->finish(strip);
      }
    });
  };
  using Totals = ChannelSums<V, kChannelsLast, 2>;
  if (sums != nullptr) {
    Totals totals(sums, round_up(in_channels, 16));
    pass(&totals);
  } else {
    pass(static_cast<Totals*>(nullptr));
  }
  if (gradient == nullptr) return;
  if constexpr (kChannelsLast) {
    for (int64_t pixel = pixels; pixel < round_up(pixels, L); ++pixel) {
      for (int64_t c = 0; c < in_channels; c += L) {
        V::zero().store(gradient_column<V>(*gradient, in_channels, c, offset + pixel));
      }
    }
  } else {
    transpose_columns<V>(d, in_channels, pixels, *gradient, offset);
  }
}

template <class V>
void weight_gradient_sizes(int64_t in_channels, int64_t out_channels, int64_t depth, int64_t* rows, int64_t* columns) {
  *rows = out_channels * depth;
  *columns = round_up(in_channels, V::kLanes) * depth;
}

template <class V>
int64_t weight_gradient_blocks(int64_t out_channels) {
  return block_count(out_channels, Tiling<V>::kTileRows);
}

template <class V>
void weight_gradient(const TrainingParams<typename V::T>& p, const WeightGradient<typename V::T>& gradient,
                     int64_t begin, int64_t end) {
  Product<typename V::T> product{};
  product.rows = gradient.rows;
  product.row_count = p.conv.out_channels;
  product.block_begin = begin;
  product.block_end = end;
  product.columns = gradient.columns;
  product.column_end = p.conv.in_channels;
  product.depth = gradient.depth;
  product.c = gradient.grad_weight;
  product.c_stride = p.conv.in_channels;
  product.accumulate = gradient.accumulate;
  multiply<V, false>(product);
}

}  // namespace
}  // namespace fusedsep
