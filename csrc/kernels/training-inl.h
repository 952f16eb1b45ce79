// SPDX-License-Identifier: BSD-3-Clause
//
// The forward passes of training.h, and the packing of weights for both directions.
#pragma once

#include "convolution-inl.h"
#include "depthwise-inl.h"
#include "pointwise-inl.h"
#include "sigmoid-inl.h"
#include "strips-inl.h"
#include "training.h"

namespace fusedsep {
namespace {

// Sections of weights packed for training, in elements from the start: the depthwise taps as separable.h packs them,
// with a zero bias; the same in reverse order, for the transposed convolution; the matrix of the product.
template <class V>
struct TrainingLayout {
  int64_t depthwise = 0, reversed, pointwise, size;

  TrainingLayout(int64_t in_channels, int64_t out_channels, bool channels_last, bool transposed) {
    constexpr int64_t kLine = 64 / int64_t(sizeof(typename V::T)), L = V::kLanes;
    const int64_t depth = transposed ? out_channels : in_channels, results = transposed ? in_channels : out_channels;
    reversed = round_up(10 * round_up(in_channels, L), kLine);
    pointwise = 2 * reversed;
    size = pointwise + (channels_last ? depth * round_up(results, L) : round_up(depth, L) * results);
  }
};

// The rows of row blocks, as layout-inl.h stores them: `count` rows of `depth` elements, a multiple of kLanes.
template <class V>
class RowBlocks {
 public:
  RowBlocks(typename V::T* rows, int64_t count, int64_t depth)
      : rows_(rows), depth_(depth), count_(count), blocks_(block_count(count, Tiling<V>::kTileRows)) {
    go_to(0);
  }
  // Elements [k, k + kLanes) of a row; fast where rows come in order.
  FUSEDSEP_INLINE typename V::T* at(int64_t row, int64_t k) {
    if (row < block_.begin) go_to(0);
    while (row >= block_.begin + block_.size) go_to(index_ + 1);
    return rows_ + block_.begin * depth_ + k * block_.size + (row - block_.begin) * V::kLanes;
  }

 private:
  void go_to(int64_t index) {
    index_ = index;
    block_ = block_at(count_, blocks_, index);
  }
  typename V::T* rows_;
  int64_t depth_, count_, blocks_, index_;
  Block block_;
};

// `count` vectors of `m`, `pitch` apart, with zeros behind element `width` of each and in the vectors behind.
template <class V>
FUSEDSEP_INLINE void load_square(const typename V::T* m, int64_t pitch, int64_t count, int64_t width,
                                 V square[V::kLanes]) {
  const bool whole = width >= V::kLanes;
  const auto mask = V::mask(0, width);
  for (int64_t i = 0; i < V::kLanes; ++i) {
    square[i] = i >= count ? V::zero() : whole ? V::load(m + i * pitch) : V::load(m + i * pitch, mask);
  }
}

template <class V>
void transpose(const typename V::T* from, int64_t from_pitch, int64_t rows, int64_t columns, typename V::T* to,
               int64_t to_pitch) {
  constexpr int64_t L = V::kLanes;
  for (int64_t r = 0; r < rows; r += L) {
    const auto mask = V::mask(0, rows - r);
    for (int64_t c = 0; c < columns; c += L) {
      V square[L];
      load_square<V>(from + r * from_pitch + c, from_pitch, rows - r, columns - c, square);
      V::transpose(square);
      for (int64_t i = 0; i < min_of(L, columns - c); ++i) square[i].store(to + (c + i) * to_pitch + r, mask);
    }
  }
}

// The matrix [rows][columns] as an operand of the product: its rows are the results (`transposed`: its columns), its
// columns (rows) the terms of each. Results [begin, end) of it.
template <class V>
void pack_matrix_columns(const typename V::T* m, int64_t rows, int64_t columns, bool transposed, int64_t begin,
                         int64_t end, typename V::T* out) {
  constexpr int64_t L = V::kLanes, kColumns = Tiling<V>::kTileColumns;
  const int64_t results = transposed ? columns : rows, depth = transposed ? rows : columns;
  // [L terms][L results] from (k, q) on.
  const auto pack_square = [&](int64_t k, int64_t q) __attribute__((always_inline)) {
    const int64_t panel = q / kColumns * kColumns, width = min_of(kColumns, round_up(results, L) - panel);
    const int64_t terms = min_of(L, depth - k);
    typename V::T* to = out + panel * depth + k * width + (q - panel);
    V square[L];
    if (transposed) {
      load_square<V>(m + k * columns + q, columns, terms, results - q, square);
    } else {
      load_square<V>(m + q * columns + k, columns, results - q, depth - k, square);
      V::transpose(square);
    }
    for (int64_t i = 0; i < terms; ++i) square[i].store(to + i * width);
  };
  if (transposed) {  // in the order of the matrix's rows, either way
    for (int64_t k = 0; k < depth; k += L) {
      for (int64_t q = begin; q < end; q += L) pack_square(k, q);
    }
  } else {
    for (int64_t q = begin; q < end; q += L) {
      for (int64_t k = 0; k < depth; k += L) pack_square(k, q);
    }
  }
}

template <class V>
void pack_matrix_rows(const typename V::T* m, int64_t rows, int64_t columns, bool transposed, int64_t begin,
                      int64_t end, typename V::T* out) {
  constexpr int64_t L = V::kLanes;
  const int64_t results = transposed ? columns : rows, depth = transposed ? rows : columns;
  RowBlocks<V> blocks(out, results, round_up(depth, L));
  for (int64_t k = 0; k < depth; k += L) {
    for (int64_t r = begin; r < end; r += L) {
      V square[L];
      if (transposed) {
        load_square<V>(m + k * columns + r, columns, depth - k, results - r, square);
        V::transpose(square);
      } else {
        load_square<V>(m + r * columns + k, columns, results - r, depth - k, square);
      }
      for (int64_t i = 0; i < min_of(L, results - r); ++i) square[i].store(blocks.at(r + i, k));
    }
  }
}

template <class V>
void pack_training(const typename V::T* depthwise_weight, const typename V::T* pointwise_weight, int64_t in_channels,
                   int64_t out_channels, bool channels_last, bool transposed, int64_t begin, int64_t end,
                   typename V::T* packed) {
  const TrainingLayout<V> layout(in_channels, out_channels, channels_last, transposed);
  const int64_t lanes = channels_last ? V::kLanes : 1;
  const auto pack_matrix = channels_last ? pack_matrix_columns<V> : pack_matrix_rows<V>;
  pack_matrix(pointwise_weight, out_channels, in_channels, transposed, begin, end, packed + layout.pointwise);
  if (begin > 0 || depthwise_weight == nullptr) return;
  for (int64_t i = 0; i < layout.pointwise; ++i) packed[i] = 0;
  for (int64_t c = 0; c < in_channels; ++c) {
    typename V::T* channel = packed + c / lanes * lanes * 10 + c % lanes;
    for (int t = 0; t < 9; ++t) {
      channel[layout.depthwise + (1 + t) * lanes] = depthwise_weight[9 * c + t];
      channel[layout.reversed + (1 + t) * lanes] = depthwise_weight[9 * c + 8 - t];
    }
  }
}

template <class V>
int64_t training_packed_size(int64_t in_channels, int64_t out_channels, bool channels_last, bool transposed) {
  return TrainingLayout<V>(in_channels, out_channels, channels_last, transposed).size;
}

// Sections of the scratch of a tile: d or h as an operand of the product, gp as another, the means of the channels; x
// where it is formed, at the end.
template <class V>
struct ScratchLayout {
  int64_t h = 0, gp, means, x;

  ScratchLayout(int64_t in_channels, int64_t out_channels, int64_t pixels, bool channels_last) {
    constexpr int64_t L = V::kLanes;
    const auto operand = [&](int64_t channels) {
      return round_up(channels_last ? pixels * round_up(channels, L) : round_up(pixels, L) * channels, 16);
    };
    gp = h + operand(in_channels);
    means = gp + operand(out_channels);
    x = means + round_up(max_of(in_channels, out_channels), 16);
  }
  ScratchLayout(const SeparableParams<typename V::T>& conv, const Tile& tile)
      : ScratchLayout(conv.in_channels, conv.out_channels, tile.end - tile.begin, conv.channels_last) {}
};

template <class V>
int64_t training_scratch_size(int64_t in_channels, int64_t out_channels, int64_t pixels, int64_t input_pixels,
                              bool channels_last) {
  return ScratchLayout<V>(in_channels, out_channels, pixels, channels_last).x + in_channels * input_pixels;
}

// The affine map of a strip's channels.
template <class V, bool kChannelsLast>
struct StripAffine {
  V center, scale, shift;

  FUSEDSEP_INLINE StripAffine(const Affine<typename V::T>& affine, const Strip& strip)
      : center(of_channels<V, kChannelsLast>(affine.center, strip)),
        scale(of_channels<V, kChannelsLast>(affine.scale, strip)),
        shift(of_channels<V, kChannelsLast>(affine.shift, strip)) {}
  FUSEDSEP_INLINE V operator()(const V& v) const { return V::fma(V::sub(v, center), scale, shift); }
};

// What the statistics of the batch take from a gradient.
template <class V, bool kChannelsLast>
struct StripCorrection {
  V slope, offset;
  bool none;

  FUSEDSEP_INLINE StripCorrection(const Correction<typename V::T>& correction, const Strip& strip)
      : slope(V::zero()), offset(V::zero()), none(correction.slope == nullptr) {
    if (none) return;
    slope = of_channels<V, kChannelsLast>(correction.slope, strip);
    offset = of_channels<V, kChannelsLast>(correction.offset, strip);
  }
  // Of the gradient `g` at a value that is `distance` from the center.
  FUSEDSEP_INLINE V operator()(const V& g, const V& distance) const {
    return none ? g : V::sub(g, V::fma(distance, slope, offset));
  }
};

// Where a map of `channels` channels has the tile, and its pitch for in_map().
template <bool kChannelsLast, typename T>
FUSEDSEP_INLINE T* tile_of_map(T* map, const SeparableParams<std::remove_const_t<T>>& conv, const Tile& tile,
                               int64_t channels) {
  const int64_t pixels = conv.out_height * conv.out_width;
  T* image = map + tile.image * pixels * channels;
  return kChannelsLast ? image + tile.begin * channels : image + tile.begin;
}
template <bool kChannelsLast, typename T>
FUSEDSEP_INLINE int64_t map_pitch(const SeparableParams<T>& conv, int64_t channels) {
  return kChannelsLast ? channels : conv.out_height * conv.out_width;
}

// Strips that lie in maps alone are as long as they may be; those of operands end with a panel.
template <class V>
constexpr int64_t kOperandStrip = Tiling<V>::kTileVectors;

// `params.conv` to compute d of a tile from: where x is to be formed, it is, in `scratch`, for this tile alone.
template <class V>
SeparableParams<typename V::T> with_input(const TrainingParams<typename V::T>& params, const Tile& tile,
                                          typename V::T* scratch) {
  SeparableParams<typename V::T> conv = params.conv;
  if (params.x_affine.center == nullptr) return conv;
  const int64_t channels = conv.in_channels;
  const PixelRange range = input_of_tile(conv, tile);
  for_each_strip<V, true>(channels, range.end - range.begin, kStripVectors, [&](const Strip& strip) {
    const auto from = in_map<V, true>(conv.x + range.begin * channels, channels, strip);
    const auto to = in_map<V, true>(scratch, channels, strip);
    const StripAffine<V, true> affine(params.x_affine, strip);
    for (int64_t i = 0; i < strip.count; ++i) {
      to.store(strip, i, activate_any(params.x_activation, affine(from.load_streaming(strip, i))));
    }
  });
  conv.x = scratch - range.begin * channels;
  return conv;
}

// The tile behind `tile` of a map of `channels` channels; nothing in NCHW, where it is in many places.
template <bool kChannelsLast, typename T>
Ahead<T> next_tile(const T* map, const SeparableParams<T>& conv, const Tile& tile, int64_t channels) {
  if (!kChannelsLast || map == nullptr) return {nullptr, nullptr};
  const int64_t pixels = conv.batch * conv.out_height * conv.out_width;
  const int64_t begin = tile.image * conv.out_height * conv.out_width + tile.end;
  return {map + begin * channels, map + min_of(pixels, begin + tile.end - tile.begin) * channels};
}

template <class V>
void raw_depthwise(const SeparableParams<typename V::T>& conv, const Tile& tile, typename V::T* d) {
  if (conv.channels_last) {
    depthwise_channels_last<V>(conv, tile, 0, conv.in_channels, d, true);
  } else if (conv.stride == 1) {
    depthwise_nchw<V, 1>(conv, tile, 0, conv.in_channels, d);
  } else {
    depthwise_nchw<V, 2>(conv, tile, 0, conv.in_channels, d);
  }
}

// Whether the vectors of a map are stored past the caches, which spares reading each line before it is written: where
// lines are written whole (half a line follows after one block of pixels, while it is still being gathered), and the
// map is too large to be found in the caches by whoever reads it next.
template <class V, bool kChannelsLast>
FUSEDSEP_INLINE bool streams(const typename V::T* map, int64_t channels, int64_t pixels) {
  constexpr int64_t kLeastBytes = 4 * 1024 * 1024;
  const int64_t pixel_bytes = channels * int64_t(sizeof(*map));
  return V::kStreams && kChannelsLast && pixel_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(map) % 64 == 0 &&
         pixels * pixel_bytes >= kLeastBytes;
}

template <class V, bool kChannelsLast>
void depthwise_statistics(const TrainingParams<typename V::T>& p, const Tile& tile, typename V::T* scratch,
                          double* sums) {
  const ScratchLayout<V> layout(p.conv, tile);
  const int64_t channels = p.conv.in_channels, pixels = tile.end - tile.begin;
  raw_depthwise<V>(p.conv, tile, scratch + layout.h);
  tile_statistics<V, kChannelsLast>(
      channels, pixels, kOperandStrip<V>, round_up(channels, 16), sums, scratch + layout.means,
      [&](const Strip& strip) { return in_operand<V, kChannelsLast>(scratch + layout.h, channels, pixels, strip); });
  if (p.d == nullptr) return;
  auto* d = tile_of_map<kChannelsLast>(p.d, p.conv, tile, channels);
  const int64_t pitch = map_pitch<kChannelsLast>(p.conv, channels);
  const bool stream = streams<V, kChannelsLast>(p.d, channels, p.conv.batch * p.conv.out_height * p.conv.out_width);
  for_each_strip<V, kChannelsLast>(channels, pixels, kOperandStrip<V>, [&](const Strip& strip) {
    const auto from = in_operand<V, kChannelsLast>(scratch + layout.h, channels, pixels, strip);
    const auto to = in_map<V, kChannelsLast>(d, pitch, strip);
    for (int64_t i = 0; i < strip.count; ++i) to.store(strip, i, V::load(from.at(i)), stream);
  });
  if (stream) V::fence();
}

// p of a tile, at `out`: the product of h, which is formed from the depthwise map.
template <class V, bool kChannelsLast>
void product_of_depthwise(const TrainingParams<typename V::T>& p, const Tile& tile, const typename V::T* weights,
                          typename V::T* h, typename V::T* out) {
  using T = typename V::T;
  const int64_t in_channels = p.conv.in_channels, out_channels = p.conv.out_channels, pixels = tile.end - tile.begin;
  const T* d = p.d == nullptr ? nullptr : tile_of_map<kChannelsLast>(p.d, p.conv, tile, in_channels);
  if (d == nullptr) raw_depthwise<V>(p.conv, tile, h);
  for_each_strip<V, kChannelsLast>(in_channels, pixels, kOperandStrip<V>, [&](const Strip& strip) {
    const auto to = in_operand<V, kChannelsLast>(h, in_channels, pixels, strip);
    const auto from =
        d == nullptr ? to : in_map<V, kChannelsLast>(d, map_pitch<kChannelsLast>(p.conv, in_channels), strip);
    const StripAffine<V, kChannelsLast> affine(p.affine1, strip);
    for (int64_t i = 0; i < strip.count; ++i) {
      activate(p.activation, affine(from.load(strip, i))).store(to.at(i));
    }
  });

  Product<T> product{};
  product.rows = kChannelsLast ? h : weights;
  product.columns = kChannelsLast ? weights : h;
  product.row_count = kChannelsLast ? pixels : out_channels;
  product.block_end = block_count(product.row_count, Tiling<V>::kTileRows);
  product.column_end = kChannelsLast ? out_channels : pixels;
  product.depth = in_channels;
  product.c = out;
  product.c_stride = map_pitch<kChannelsLast>(p.conv, out_channels);
  product.ahead[0] = next_tile<kChannelsLast, T>(p.d, p.conv, tile, in_channels);
  multiply<V, !kChannelsLast>(product);
}

template <class V, bool kChannelsLast>
void forward(const TrainingParams<typename V::T>& p, const Tile& tile, typename V::T* scratch, double* sums) {
  using T = typename V::T;
  const ScratchLayout<V> layout(p.conv, tile);
  const int64_t in_channels = p.conv.in_channels, out_channels = p.conv.out_channels, pixels = tile.end - tile.begin;
  T* out = tile_of_map<kChannelsLast>(p.conv.y, p.conv, tile, out_channels);
  const int64_t pitch = map_pitch<kChannelsLast>(p.conv, out_channels);
  const T* weights = p.conv.packed + TrainingLayout<V>(in_channels, out_channels, kChannelsLast, false).pointwise;
  if (p.conv.rows == Rows::kDepthwise) {
    product_of_depthwise<V, kChannelsLast>(p, tile, weights, scratch + layout.h, out);
  } else {
    convolve<V>(p.conv, weights, nullptr, tile, 0, ceil_div(out_channels, Tiling<V>::kTileColumns));
  }
  if (sums == nullptr) return;
  tile_statistics<V, kChannelsLast>(out_channels, pixels, kStripVectors, round_up(out_channels, 16), sums,
                                    scratch + layout.means,
                                    [&](const Strip& strip) { return in_map<V, kChannelsLast>(out, pitch, strip); });
}

template <class V, bool kChannelsLast>
void normalize(const TrainingParams<typename V::T>& p, const Tile& tile) {
  const int64_t channels = p.conv.out_channels, pitch = map_pitch<kChannelsLast>(p.conv, channels);
  const auto* product = tile_of_map<kChannelsLast>(p.conv.y, p.conv, tile, channels);
  auto* y = tile_of_map<kChannelsLast>(p.y, p.conv, tile, channels);
  const bool stream = streams<V, kChannelsLast>(p.y, channels, p.conv.batch * p.conv.out_height * p.conv.out_width);
  for_each_strip<V, kChannelsLast>(channels, tile.end - tile.begin, kStripVectors, [&](const Strip& strip) {
    const auto from = in_map<V, kChannelsLast>(product, pitch, strip), to = in_map<V, kChannelsLast>(y, pitch, strip);
    const StripAffine<V, kChannelsLast> affine(p.affine2, strip);
    for (int64_t i = 0; i < strip.count; ++i) {
      to.store(strip, i, activate_any(p.pointwise_activation, affine(from.load_streaming(strip, i))), stream);
    }
  });
  if (stream) V::fence();
}

}  // namespace
}  // namespace fusedsep
