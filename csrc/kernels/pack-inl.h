// SPDX-License-Identifier: BSD-3-Clause
//
// Folds scales into weights and lays them out for the kernels (layout-inl.h). Products are formed in double and rounded
// once. Padding is zero, so that packed weights are a pure function of their inputs.
#pragma once

#include "layout-inl.h"
#include "separable.h"

namespace fusedsep {
namespace {

template <typename T>
FUSEDSEP_INLINE T folded(T weight, const double* scale, int64_t channel) {
  return scale == nullptr ? weight : T(double(weight) * scale[channel]);
}

// A bias and the taps of each channel: vectors of kLanes channels in channels_last, scalars in NCHW.
template <class V>
void pack_depthwise(const PackParams<typename V::T>& p, int64_t taps, typename V::T* out) {
  using T = typename V::T;
  const int64_t lanes = p.channels_last ? V::kLanes : 1;
  for (int64_t c = 0; c < round_up(p.in_channels, lanes); ++c) {
    T* channel = out + c / lanes * lanes * (1 + taps) + c % lanes;
    const bool real = c < p.in_channels;
    channel[0] = real && p.depthwise_bias != nullptr ? T(p.depthwise_bias[c]) : T(0);
    for (int64_t t = 0; t < taps; ++t) {
      channel[(1 + t) * lanes] = real ? folded(p.depthwise_weight[taps * c + t], p.depthwise_scale, c) : T(0);
    }
  }
}

// Column panels [k][width] of output channels.
template <class V>
void pack_pointwise_columns(const PackParams<typename V::T>& p, typename V::T* out) {
  using T = typename V::T;
  for (int64_t q = 0; q < p.out_channels; q += Tiling<V>::kTileColumns) {
    const int64_t count = min_of(Tiling<V>::kTileColumns, p.out_channels - q), width = round_up(count, V::kLanes);
    T* panel = out + q * p.in_channels;
    for (int64_t n = 0; n < width; ++n) {
      for (int64_t k = 0; k < p.in_channels; ++k) {
        panel[k * width + n] =
            n < count ? folded(p.pointwise_weight[(q + n) * p.in_channels + k], p.pointwise_scale, q + n) : T(0);
      }
    }
  }
}

// Row blocks [k / kLanes][m][kLanes] of output channels.
template <class V>
void pack_pointwise_rows(const PackParams<typename V::T>& p, typename V::T* out) {
  using T = typename V::T;
  constexpr int L = V::kLanes;
  const int64_t padded = round_up(p.in_channels, L), blocks = block_count(p.out_channels, Tiling<V>::kTileRows);
  for (int64_t b = 0; b < blocks; ++b) {
    const Block block = block_at(p.out_channels, blocks, b);
    for (int64_t m = 0; m < block.size; ++m) {
      const int64_t o = block.begin + m;
      T* row = out + block.begin * padded + m * L;
      for (int64_t k = 0; k < padded; ++k) {
        row[k / L * L * block.size + k % L] =
            k < p.in_channels ? folded(p.pointwise_weight[o * p.in_channels + k], p.pointwise_scale, o) : T(0);
      }
    }
  }
}

template <class V>
void pack(const PackParams<typename V::T>& p, typename V::T* packed) {
  using T = typename V::T;
  const PackedLayout<V> layout(p.in_channels, p.out_channels, p.channels_last);
  for (int64_t i = 0; i < layout.size; ++i) packed[i] = T(0);
  pack_depthwise<V>(p, 9, packed + layout.depthwise);
  for (int64_t o = 0; o < p.out_channels && p.pointwise_bias != nullptr; ++o) {
    packed[layout.pointwise_bias + o] = T(p.pointwise_bias[o]);
  }
  if (p.channels_last) {
    pack_pointwise_columns<V>(p, packed + layout.pointwise);
  } else {
    pack_pointwise_rows<V>(p, packed + layout.pointwise);
  }
}

}  // namespace
}  // namespace fusedsep
