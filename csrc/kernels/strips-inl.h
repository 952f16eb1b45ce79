// SPDX-License-Identifier: BSD-3-Clause
//
// Passes over the values of a tile, channel by channel, for both memory formats and for maps and tiles alike.
//
// A strip is a run of vectors that share their channels. In channels_last a vector holds neighbouring channels, and a
// strip is one such vector over a block of pixels (a row block of layout-inl.h). In NCHW a vector holds neighbouring
// pixels, and a strip is a run of vectors of one channel.
#pragma once

#include "layout-inl.h"

namespace fusedsep {
namespace {

struct Strip {
  int64_t channel;  // the first one
  int64_t pixel;    // of the tile
  int64_t count;    // vectors
  int64_t lanes;    // that count: in every vector (channels_last), in the last one (NCHW)
  bool last;        // of its channels
};

// At most this many vectors, which are summed in the element type before they are added up in double.
constexpr int64_t kStripVectors = 14;

// Strips of a tile of `pixels`, in NCHW of at most `most` vectors.
template <class V, bool kChannelsLast, class F>
FUSEDSEP_INLINE void for_each_strip(int64_t channels, int64_t pixels, int64_t most, const F& f) {
  constexpr int64_t L = V::kLanes;
  static_assert(Tiling<V>::kTileRows <= kStripVectors, "a row block is one strip");
  if constexpr (kChannelsLast) {
    const int64_t blocks = block_count(pixels, Tiling<V>::kTileRows);
    for (int64_t b = 0; b < blocks; ++b) {
      const Block block = block_at(pixels, blocks, b);
      for (int64_t c = 0; c < channels; c += L) {
        f(Strip{c, block.begin, block.size, min_of(L, channels - c), b + 1 == blocks});
      }
    }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t q = 0; q < pixels; q += most * L) {
        const int64_t rest = pixels - q, count = min_of(most, ceil_div(rest, L));
        f(Strip{c, q, count, min_of(L, rest - (count - 1) * L), q + most * L >= pixels});
      }
    }
  }
}

// Access to one operand of a strip.
template <class V, bool kChannelsLast>
struct Lane {
  using T = typename V::T;
  T* p;
  int64_t stride;

  FUSEDSEP_INLINE T* at(int64_t i) const { return p + i * stride; }
  FUSEDSEP_INLINE static bool partial(const Strip& strip, int64_t i) {
    return strip.lanes < V::kLanes && (kChannelsLast || i + 1 == strip.count);
  }
  // Lanes that do not count are zero.
  FUSEDSEP_INLINE V load(const Strip& strip, int64_t i) const {
    return partial(strip, i) ? V::load(at(i), V::mask(0, strip.lanes)) : V::load(at(i));
  }
  // The same from a map that is not in the caches yet. In channels_last the lines of a strip are apart, so that the
  // processor's own prefetchers follow late: what comes two blocks of pixels later is asked for here. To L2: the few
  // lines that L1 can wait for at a time would hold back the loads themselves.
  FUSEDSEP_INLINE V load_streaming(const Strip& strip, int64_t i) const {
    if constexpr (kChannelsLast) __builtin_prefetch(at(i + 2 * kStripVectors), 0, 2);
    return load(strip, i);
  }
  FUSEDSEP_INLINE void store(const Strip& strip, int64_t i, const V& v, bool stream = false) const {
    if (stream) {
      v.stream(at(i));
    } else if (partial(strip, i)) {
      v.store(at(i), V::mask(0, strip.lanes));
    } else {
      v.store(at(i));
    }
  }
};

// `v` with zeros in the lanes that do not count.
template <class V, bool kChannelsLast>
FUSEDSEP_INLINE V counted(const Strip& strip, int64_t i, const V& v) {
  if (!Lane<V, kChannelsLast>::partial(strip, i)) return v;
  typename V::T lanes[V::kLanes];
  V::zero().store(lanes);
  v.store(lanes, V::mask(0, strip.lanes));
  return V::load(lanes);
}

// A strip of a map, whose tile begins at `tile`: `pitch` elements between pixels (channels_last) or channels (NCHW).
template <class V, bool kChannelsLast>
FUSEDSEP_INLINE Lane<V, kChannelsLast> in_map(const typename V::T* tile, int64_t pitch, const Strip& strip) {
  typename V::T* p = const_cast<typename V::T*>(tile);
  if constexpr (kChannelsLast) return {p + strip.pixel * pitch + strip.channel, pitch};
  return {p + strip.channel * pitch + strip.pixel, V::kLanes};
}

// A strip of an operand of the pointwise product: row blocks (channels_last), or column panels (NCHW), where a strip
// is at most kTileVectors long.
template <class V, bool kChannelsLast>
FUSEDSEP_INLINE Lane<V, kChannelsLast> in_operand(typename V::T* operand, int64_t channels, int64_t pixels,
                                                  const Strip& strip) {
  constexpr int64_t L = V::kLanes;
  if constexpr (kChannelsLast) {
    return {operand + strip.pixel * round_up(channels, L) + strip.channel * strip.count, L};
  }
  const int64_t width = min_of(Tiling<V>::kTileColumns, round_up(pixels, L) - strip.pixel);
  return {operand + strip.pixel * channels + strip.channel * width, L};
}

// A value of each channel of the strip.
template <class V, bool kChannelsLast>
FUSEDSEP_INLINE V of_channels(const typename V::T* values, const Strip& strip) {
  if constexpr (kChannelsLast) return V::load(values + strip.channel);
  return V::broadcast(values[strip.channel]);
}

// Overwrites `lanes`.
template <class V>
FUSEDSEP_INLINE double sum_of_lanes(double* lanes) {
  FUSEDSEP_UNROLL(4)
  for (int half = V::kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// `kSums` sums a channel, over a tile: sums[k][channel].
template <class V, bool kChannelsLast, int kSums>
class ChannelSums {
 public:
  ChannelSums(double* sums, int64_t pitch) : sums_(sums), pitch_(pitch) {
    for (int64_t i = 0; i < kSums * pitch; ++i) sums[i] = 0;
    clear();
  }
  FUSEDSEP_INLINE void add(int k, const Strip& strip, const V& v) {
    v.accumulate(kChannelsLast ? sums_ + k * pitch_ + strip.channel : lanes_[k]);
  }
  // After the last sum of a strip.
  FUSEDSEP_INLINE void finish(const Strip& strip) {
    if (kChannelsLast || !strip.last) return;
    for (int k = 0; k < kSums; ++k) sums_[k * pitch_ + strip.channel] = sum_of_lanes<V>(lanes_[k]);
    clear();
  }

 private:
  void clear() {
    for (int k = 0; k < kSums; ++k) {
      for (int i = 0; i < V::kLanes; ++i) lanes_[k][i] = 0;
    }
  }
  double* sums_;
  int64_t pitch_;
  double lanes_[kSums][V::kLanes];
};

// Mean and sum of squared differences from it, sums[0][channel] and sums[1][channel], in two passes over values that
// are in the cache; the second pass corrects the rounding of the first (T. Chan, G. Golub, R. LeVeque, "Algorithms for
// Computing the Sample Variance", 1983). `lane(strip)` is where the values are.
template <class V, bool kChannelsLast, class F>
void tile_statistics(int64_t channels, int64_t pixels, int64_t most, int64_t pitch, double* sums, typename V::T* means,
                     const F& lane) {
  using T = typename V::T;
  {
    ChannelSums<V, kChannelsLast, 1> total(sums, pitch);
    for_each_strip<V, kChannelsLast>(channels, pixels, most, [&](const Strip& strip) {
      const auto values = lane(strip);
      V sum = values.load(strip, 0);
      for (int64_t i = 1; i < strip.count; ++i) sum = V::add(sum, values.load(strip, i));
      total.add(0, strip, sum);
      total.finish(strip);
    });
  }
  for (int64_t c = 0; c < pitch; ++c) means[c] = c < channels ? T(sums[c] / double(pixels)) : T(0);
  ChannelSums<V, kChannelsLast, 2> differences(sums, pitch);
  for_each_strip<V, kChannelsLast>(channels, pixels, most, [&](const Strip& strip) {
    const auto values = lane(strip);
    const V mean = of_channels<V, kChannelsLast>(means, strip);
    V sum = V::zero(), squares = V::zero();
    for (int64_t i = 0; i < strip.count; ++i) {
      const V difference = counted<V, kChannelsLast>(strip, i, V::sub(values.load(strip, i), mean));
      sum = V::add(sum, difference);
      squares = V::fma(difference, difference, squares);
    }
    differences.add(0, strip, sum);
    differences.add(1, strip, squares);
    differences.finish(strip);
  });
  for (int64_t c = 0; c < channels; ++c) {
    const double rest = sums[c];
    sums[c] = double(means[c]) + rest / double(pixels);
    sums[pitch + c] -= rest * rest / double(pixels);
  }
}

}  // namespace
}  // namespace fusedsep
