// SPDX-License-Identifier: BSD-3-Clause
//
// The register-tiled product of a block, over operands in shared memory.
#pragma once

#include "element.h"
#include "tiles.h"

namespace fusedsep::cuda {

// One step of the reduction. Rows of `pixels` are kVector apart from a multiple of all banks, so that the four rows
// that a thread of the depthwise stage in channels_last writes lie in different ones.
template <class S>
struct alignas(16) Step {
  static constexpr int kPitch = S::kPixels + kVector;
  float pixels[S::kDepth][kPitch];
  float columns[S::kDepth][S::kColumns];
};

// Where a thread's sums lie in the block's tile. They are groups of kVector neighbours in either direction, the groups
// of all threads side by side: loads from shared memory then touch each bank once. Neighbouring threads take
// neighbouring columns in channels_last and neighbouring pixels in NCHW, as they lie in memory.
template <class S, bool kChannelsLast>
struct Position {
  int pixel_thread, column_thread;

  FUSEDSEP_DEVICE Position()
      : pixel_thread(int(threadIdx.x) / (kChannelsLast ? S::kColumnThreads : 1) % S::kPixelThreads),
        column_thread(int(threadIdx.x) / (kChannelsLast ? 1 : S::kPixelThreads) % S::kColumnThreads) {}
  FUSEDSEP_DEVICE int pixel(int i) const {
    return (i / kVector * S::kPixelThreads + pixel_thread) * kVector + i % kVector;
  }
  FUSEDSEP_DEVICE int column(int i) const {
    return (i / kVector * S::kColumnThreads + column_thread) * kVector + i % kVector;
  }
};

template <class S>
using Sums = float[S::kTilePixels][S::kTileColumns];

// sums[i][j] += sum over the step of pixels * columns, one chain of multiply-adds in order.
// A step of one channel: kTilePixels + kTileColumns floats in loads of 16 bytes for kTilePixels * kTileColumns FMAs.
template <class S, bool kChannelsLast>
FUSEDSEP_DEVICE void multiply(const Step<S>& step, const Position<S, kChannelsLast>& position, Sums<S>& sums) {
#pragma unroll
  for (int k = 0; k < S::kDepth; ++k) {
    float pixels[S::kTilePixels / kVector][kVector], columns[S::kTileColumns / kVector][kVector];
#pragma unroll
    for (int i = 0; i < S::kTilePixels; i += kVector) {
      load(&step.pixels[k][position.pixel(i)], true, kVector, pixels[i / kVector]);
    }
#pragma unroll
    for (int j = 0; j < S::kTileColumns; j += kVector) {
      load(&step.columns[k][position.column(j)], true, kVector, columns[j / kVector]);
    }
#pragma unroll
    for (int i = 0; i < S::kTilePixels; ++i) {
#pragma unroll
      for (int j = 0; j < S::kTileColumns; ++j) {
        sums[i][j] = fmaf(pixels[i / kVector][i % kVector], columns[j / kVector][j % kVector], sums[i][j]);
      }
    }
  }
}

// Rows [first, first + kDepth) of packed weights, columns from `column` on; zero behind the last, `padded`.
template <class S>
FUSEDSEP_DEVICE void copy_weights(const float* weights, int64_t padded, int first, int64_t column, Step<S>& step) {
  constexpr int kVectors = S::kColumns / kVector, kUnits = S::kDepth * kVectors / S::kThreads;
  static_assert(S::kDepth * kVectors % S::kThreads == 0);
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    const int index = int(threadIdx.x) + unit * S::kThreads;
    const int k = index / kVectors, j = index % kVectors * kVector;
    float values[kVector];
    load(weights + (first + k) * padded + column + j, true, column + j < padded ? kVector : 0, values);
    store(&step.columns[k][j], true, kVector, values);
  }
}

// Writes f(sum, column) for the thread's sums to a map of `channels`.
template <class S, bool kChannelsLast, typename T, class F>
FUSEDSEP_DEVICE void write_map(T* map, int64_t batch, int64_t channels, int64_t map_pixels, bool vectors,
                               int64_t first_pixel, int64_t first_column, const Position<S, kChannelsLast>& position,
                               const Sums<S>& sums, const F& f) {
  const int64_t pixels = batch * map_pixels;
  if constexpr (kChannelsLast) {
#pragma unroll
    for (int i = 0; i < S::kTilePixels; ++i) {
      const int64_t pixel = first_pixel + position.pixel(i);
      if (pixel >= pixels) continue;
#pragma unroll
      for (int j = 0; j < S::kTileColumns; j += kVector) {
        const int64_t column = first_column + position.column(j);
        float values[kVector];
#pragma unroll
        for (int n = 0; n < kVector; ++n) values[n] = column + n < channels ? f(sums[i][j + n], column + n) : 0.0f;
        store(map + pixel * channels + column, vectors, channels - column, values);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < S::kTilePixels; i += kVector) {
      const int64_t pixel = first_pixel + position.pixel(i);
      if (pixel >= pixels) continue;
      // Groups of pixels stay within an image where its size is a multiple of theirs, which `vectors` says.
      const int64_t image = pixel / map_pixels, inside = pixel % map_pixels;
#pragma unroll
      for (int j = 0; j < S::kTileColumns; ++j) {
        const int64_t column = first_column + position.column(j);
        if (column >= channels) continue;
        float values[kVector];
#pragma unroll
        for (int n = 0; n < kVector; ++n) values[n] = f(sums[i + n][j], column);
        T* const to = map + (image * channels + column) * map_pixels + inside;
        if (vectors) {
          store(to, true, kVector, values);
          continue;
        }
#pragma unroll
        for (int n = 0; n < kVector; ++n) {
          // A step into the next image skips the other channels of this one.
          const int64_t images_on = (inside + n) / map_pixels;
          if (pixel + n < pixels) to[n + images_on * (channels - 1) * map_pixels] = from_float<T>(values[n]);
        }
      }
    }
  }
}

}  // namespace fusedsep::cuda
