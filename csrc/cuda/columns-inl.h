// SPDX-License-Identifier: BSD-3-Clause
//
// Passes that go through the pixels of a map, channel by channel, and leave sums or statistics of each channel: a block
// has some channels of a run of pixels, a slot, and a thread some of these pixels of one group of channels.
#pragma once

#include "depthwise-inl.h"
#include "moments-inl.h"
#include "training.h"

namespace fusedsep::cuda {

// How threads share a map. In channels_last neighbours have the next channels, kGroup at a time where addresses allow
// it; in NCHW neighbours have the next pixels, of kGroup channels each, so that rows are written kGroup at a time.
enum class Reading { kVectors, kElements, kPlanes };

constexpr int kColumnThreads = 128;
constexpr int kThreadPixels = 32;  // at most, of one thread

template <Reading kReading>
struct ColumnShape {
  static constexpr bool kNextPixels = kReading == Reading::kPlanes;
  static constexpr int kGroup = kReading == Reading::kElements ? 1 : 4;
  static constexpr int kLanes = kReading == Reading::kVectors ? 8 : kReading == Reading::kElements ? 32 : 2;
  static constexpr int kPixelLanes = kColumnThreads / kLanes;
  static constexpr int kChannels = kGroup * kLanes;  // of a block
  static_assert(kChannelPadding % kChannels == 0);
};

// A pass over `pixels` of so many channels in slots of `slot_pixels`.
struct Columns {
  int64_t pixels, channels, slot_pixels;
  constexpr int64_t padded_channels() const { return padded(channels); }
  constexpr int64_t slots() const { return ceil_div(pixels, slot_pixels); }
};

// Slots are as long as a thread's sums may be, but shorter where that would leave processors without a block.
template <Reading kReading>
Columns columns_of(int64_t pixels, int64_t channels) {
  using C = ColumnShape<kReading>;
  constexpr int64_t kEnough = 1024;                                                             // blocks
  const int64_t blocks = ceil_div(pixels, C::kPixelLanes) * (padded(channels) / C::kChannels);  // of a pixel a thread
  const int64_t each = std::min<int64_t>(kThreadPixels, std::max<int64_t>(1, blocks / kEnough));
  return {pixels, channels, each * C::kPixelLanes};
}

template <Reading kReading>
struct ColumnThread {
  using Shape = ColumnShape<kReading>;
  const Columns& columns;
  int lane, pixel_lane;
  int64_t slot, first_channel;  // of the block

  FUSEDSEP_DEVICE explicit ColumnThread(const Columns& columns) : columns(columns) {
    const int thread = int(threadIdx.x);
    lane = Shape::kNextPixels ? thread / Shape::kPixelLanes : thread % Shape::kLanes;
    pixel_lane = Shape::kNextPixels ? thread % Shape::kPixelLanes : thread / Shape::kLanes;
    const int64_t blocks = columns.padded_channels() / Shape::kChannels;
    slot = blockIdx.x / blocks, first_channel = blockIdx.x % blocks * Shape::kChannels;
  }
  FUSEDSEP_DEVICE int channel() const { return int(first_channel) + lane * Shape::kGroup; }
  FUSEDSEP_DEVICE int64_t first_pixel() const { return slot * columns.slot_pixels + pixel_lane; }
  // Pixels of the threads with that pixel lane.
  FUSEDSEP_DEVICE int count_of(int pixel_lane) const {
    const int64_t left = columns.pixels - slot * columns.slot_pixels;
    const int64_t own = (left < columns.slot_pixels ? left : columns.slot_pixels) - pixel_lane;
    return own <= 0 ? 0 : int((own + Shape::kPixelLanes - 1) / Shape::kPixelLanes);
  }
  // f(walk) for each of the thread's pixels.
  template <typename T, class F>
  FUSEDSEP_DEVICE void each_pixel(const SeparableParams<T>& conv, const F& f) const {
    const int count = count_of(pixel_lane);
    PixelWalk<T> walk(conv, first_pixel(), Shape::kPixelLanes);
#pragma unroll 1
    for (int n = 0; n < count; ++n, walk.advance()) f(walk);
  }
};

// Where an output map of `channels` channels has the pixel of a walk and a channel.
template <typename T>
FUSEDSEP_DEVICE int64_t place_of(const PixelWalk<T>& walk, int64_t channels, int channel) {
  const int64_t width = walk.p.out_width, map = walk.p.out_height * width, inside = walk.row * width + walk.column;
  return walk.p.channels_last ? (walk.image * map + inside) * channels + channel
                              : (walk.image * channels + channel) * map + inside;
}

// A group of channels of a map: kGroup of them, or fewer where there are no more, or none.
template <Reading kReading>
struct GroupOfMap {
  static constexpr int kGroup = ColumnShape<kReading>::kGroup;
  int64_t step;  // elements between channels
  int count;

  FUSEDSEP_DEVICE GroupOfMap(int64_t channels, int channel, int64_t step) : step(step) {
    const int64_t left = channels - channel;
    count = left <= 0 ? 0 : left < kGroup ? int(left) : kGroup;
  }
  // Zeros where there is nothing.
  template <typename T>
  FUSEDSEP_DEVICE void load(const T* from, bool valid, float (&values)[kGroup]) const {
    Vector<T, kGroup> vector = {};
    if constexpr (kReading == Reading::kPlanes) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (valid && i < count) vector.values[i] = from[i * step];
      }
    } else {
      if (valid && count > 0) vector = cuda::load<kGroup>(from);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) values[i] = to_float(vector.values[i]);
  }
  // Rounds them, also in place.
  template <typename T>
  FUSEDSEP_DEVICE void store(T* to, float (&values)[kGroup]) const {
    const Vector<T, kGroup> vector = rounded<T>(values);
    if constexpr (kReading == Reading::kPlanes) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (i < count) to[i * step] = vector.values[i];
      }
    } else {
      if (count > 0) cuda::store(to, vector);
    }
  }
  template <typename T>
  FUSEDSEP_DEVICE static Vector<T, kGroup> rounded(float (&values)[kGroup]) {
    Vector<T, kGroup> vector;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      vector.values[i] = from_float<T>(values[i]);
      values[i] = to_float(vector.values[i]);
    }
    return vector;
  }
  // To a row of channels, with zeros behind the last.
  template <typename T>
  FUSEDSEP_DEVICE void store_row(T* to, float (&values)[kGroup]) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) values[i] = i < count ? values[i] : 0.0f;
    cuda::store(to, rounded<T>(values));
  }
};
// Of an output map.
template <Reading kReading, typename T>
FUSEDSEP_DEVICE GroupOfMap<kReading> group_of(const SeparableParams<T>& conv, int64_t channels, int channel) {
  return {channels, channel, conv.channels_last ? 1 : conv.out_height * conv.out_width};
}

// The sums of all threads of a block, to sums[kSums][channels] of its slot.
template <Reading kReading, int kSums>
FUSEDSEP_DEVICE void reduce_sums(const ColumnThread<kReading>& thread, unsigned char* shared,
                                 const float (&own)[kSums][ColumnShape<kReading>::kGroup], double* sums) {
  using S = ColumnShape<kReading>;
  float* const values = reinterpret_cast<float*>(shared);  // [kSums][kPixelLanes][kChannels]
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    Vector<float, S::kGroup> vector;
#pragma unroll
    for (int i = 0; i < S::kGroup; ++i) vector.values[i] = own[s][i];
    store(values + (s * S::kPixelLanes + thread.pixel_lane) * S::kChannels + thread.lane * S::kGroup, vector);
  }
  __syncthreads();
  const int64_t padded = thread.columns.padded_channels();
  sums += thread.slot * kSums * padded + thread.first_channel;
  for (int i = int(threadIdx.x); i < kSums * S::kChannels; i += kColumnThreads) {
    const int s = i / S::kChannels, channel = i % S::kChannels;
    double total = 0;
    for (int lane = 0; lane < S::kPixelLanes; ++lane) {
      total += double(values[(s * S::kPixelLanes + lane) * S::kChannels + channel]);
    }
    sums[s * padded + channel] = total;
  }
}
template <Reading kReading, int kSums>
constexpr int64_t kReduceBytes = kSums * kColumnThreads * ColumnShape<kReading>::kGroup * int64_t(sizeof(float));

// Mean and squared differences of parts that come one by one, in any number of rounds over them.
struct MergedMoments {
  double count = 0, mean = 0, squares = 0;
};
// f(i, &count, &mean, &squares) tells part i.
template <class F>
FUSEDSEP_DEVICE MergedMoments merge_moments(int64_t parts, const F& f) {
  MergedMoments merged;
  for (int64_t i = 0; i < parts; ++i) {
    double count, mean, squares;
    f(i, count, mean, squares);
    if (count == 0) continue;
    merged.count += count;
    merged.mean += count * mean;
  }
  if (merged.count == 0) return merged;
  merged.mean /= merged.count;
  for (int64_t i = 0; i < parts; ++i) {
    double count, mean, squares;
    f(i, count, mean, squares);
    if (count == 0) continue;
    const double apart = mean - merged.mean;
    merged.squares += squares + count * apart * apart;
  }
  return merged;
}

// The statistics of all threads of a block, to sums[2][channels] of its slot: mean, squared differences.
template <Reading kReading>
FUSEDSEP_DEVICE void reduce_moments(const ColumnThread<kReading>& thread, unsigned char* shared,
                                    const Moments<ColumnShape<kReading>::kGroup>& own, double* sums) {
  using S = ColumnShape<kReading>;
  double* const means = reinterpret_cast<double*>(shared);  // [kPixelLanes][kChannels]
  float* const squares = reinterpret_cast<float*>(means + S::kPixelLanes * S::kChannels);
#pragma unroll
  for (int i = 0; i < S::kGroup; ++i) {
    const int place = thread.pixel_lane * S::kChannels + thread.lane * S::kGroup + i;
    means[place] = double(own.first[i]) + double(own.mean[i]);
    squares[place] = own.squares[i];
  }
  __syncthreads();
  const int64_t padded = thread.columns.padded_channels();
  sums += thread.slot * 2 * padded + thread.first_channel;
  for (int channel = int(threadIdx.x); channel < S::kChannels; channel += kColumnThreads) {
    const auto merged = merge_moments(S::kPixelLanes, [&](int64_t lane, double& count, double& mean, double& squared) {
      count = thread.count_of(int(lane));
      mean = means[lane * S::kChannels + channel];
      squared = double(squares[lane * S::kChannels + channel]);
    });
    sums[channel] = merged.mean;
    sums[padded + channel] = merged.squares;
  }
}
template <Reading kReading>
constexpr int64_t kMomentsBytes = kColumnThreads * ColumnShape<kReading>::kGroup * 12;

// ------------------------------------------------------------------------------------------------------ over all slots

constexpr int kFan = 32;  // slots that a thread adds up, one after the other
constexpr int kMergeThreads = 128;

// Slots of `width` numbers -> slots as long as kFan of these, one thread for each number.
struct SumsOf {
  const double* slots;
  int64_t count, width;

  FUSEDSEP_DEVICE double operator()(int64_t begin, int64_t column) const {
    double total = 0;
    const int64_t end = begin + kFan < count ? begin + kFan : count;
#pragma unroll 8
    for (int64_t i = begin; i < end; ++i) total += slots[i * width + column];
    return total;
  }
};
static __global__ void __launch_bounds__(kMergeThreads) merge_sums_kernel(SumsOf from, double* to) {
  const int64_t index = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x;
  const int64_t slot = index / from.width;
  if (slot * kFan < from.count) to[index] = from(slot * kFan, index % from.width);
}

// The same of statistics: slots of means, then squared differences, of `padded` channels.
struct MomentsOf {
  const double* slots;
  int64_t count, padded, slot_pixels, pixels;

  FUSEDSEP_DEVICE MergedMoments operator()(int64_t begin, int64_t channel) const {
    const int64_t left = count - begin;
    return merge_moments(left < kFan ? left : kFan, [&](int64_t i, double& own, double& mean, double& squares) {
      const int64_t first = (begin + i) * slot_pixels, rest = pixels - first;
      own = double(rest < slot_pixels ? rest : slot_pixels);
      mean = slots[(begin + i) * 2 * padded + channel];
      squares = slots[((begin + i) * 2 + 1) * padded + channel];
    });
  }
};
static __global__ void __launch_bounds__(kMergeThreads) merge_moments_kernel(MomentsOf from, double* to) {
  const int64_t index = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x;
  const int64_t slot = index / from.padded, channel = index % from.padded;
  if (slot * kFan >= from.count) return;
  const MergedMoments merged = from(slot * kFan, channel);
  to[slot * 2 * from.padded + channel] = merged.mean;
  to[(slot * 2 + 1) * from.padded + channel] = merged.squares;
}

// Doubles for the slots of a pass and for merging them.
inline int64_t slot_doubles(int64_t slots, int64_t width) { return (slots + ceil_div(slots, kFan)) * width; }

// Merged until a thread can do the rest. `slots` lie at the beginning of slot_doubles().
inline SumsOf merge_sums(double* slots, int64_t count, int64_t width, Stream stream) {
  double *from = slots, *to = slots + count * width;
  while (count > kFan) {
    const int64_t merged = ceil_div(count, kFan);
    launch(merge_sums_kernel, ceil_div(merged * width, kMergeThreads), kMergeThreads, 0, stream,
           SumsOf{from, count, width}, to);
    std::swap(from, to);
    count = merged;
  }
  return {from, count, width};
}
inline MomentsOf merge_moments(const Columns& columns, double* slots, Stream stream) {
  MomentsOf moments{slots, columns.slots(), columns.padded_channels(), columns.slot_pixels, columns.pixels};
  double* to = slots + moments.count * 2 * moments.padded;
  while (moments.count > kFan) {
    const int64_t merged = ceil_div(moments.count, kFan);
    launch(merge_moments_kernel, ceil_div(merged * moments.padded, kMergeThreads), kMergeThreads, 0, stream, moments,
           to);
    double* const from = const_cast<double*>(moments.slots);
    moments.slots = to, to = from;
    moments.count = merged;
    moments.slot_pixels *= kFan;
  }
  return moments;
}

}  // namespace fusedsep::cuda
