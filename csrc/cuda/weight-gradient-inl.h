// SPDX-License-Identifier: BSD-3-Clause
//
// The gradient of the pointwise weights, a product over pixels: of gp and h, each in rows of channels, which are
// transposed on their way to shared memory. The pixels are split, each split leaves its sums in memory, and a second
// kernel adds them up in order.
#pragma once

#include "product-inl.h"
#include "training.h"

namespace fusedsep::cuda {

template <typename T>
constexpr int kChunkPixels = kChunkBytes / int(sizeof(T));

struct WeightGradientPlan {
  int shape;
  int64_t splits, chunks;  // chunks of pixels of a split
};

template <class S>
constexpr int64_t kWeightGradientBytes = 2 * (S::kPixels + S::kColumns) * int64_t(kChunkPitch);

// The shape that wastes least; as many splits as give every processor some blocks, but none shorter than kLeast chunks.
template <typename T>
WeightGradientPlan weight_gradient_plan(int64_t pixels, int64_t in_channels, int64_t out_channels,
                                        const Device& device) {
  constexpr int64_t kBlocks = 512, kLeast = 8;
  WeightGradientPlan plan{};
  double least = 0;
  int64_t tiles = 1;
  for (int number = 0; number < kShapes; ++number) {
    with_shape(number, [&](auto shape) {
      using S = decltype(shape);
      if (kWeightGradientBytes<S> > device.shared_bytes) return;
      const int64_t own = ceil_div(out_channels, S::kPixels) * ceil_div(in_channels, S::kColumns);
      const double cycles = double(own) * product_cycles<S>(sizeof(T), sizeof(T) == 2);
      if (least == 0 || cycles <= least) plan.shape = number, least = cycles, tiles = own;
    });
  }
  const int64_t chunks = ceil_div(pixels, kChunkPixels<T>);
  const int64_t most = std::max<int64_t>(1, std::min(ceil_div(chunks, kLeast), kBlocks / tiles));
  plan.chunks = ceil_div(chunks, most);
  plan.splits = chunks == 0 ? 0 : ceil_div(chunks, plan.chunks);
  return plan;
}

// kRows channels of a chunk of pixels on their way from rows in memory to rows of pixels in shared memory: a thread
// moves two neighbouring pixels of as many channels as a vector has, kItems times.
template <int kRows, int kThreads, typename T>
struct TransposedChunk {
  static constexpr int kPairs = kChunkPixels<T> / 2, kItems = kRows / kWide<T> * kPairs / kThreads;
  static_assert(kRows % kWide<T> == 0 && kRows / kWide<T> * kPairs % kThreads == 0);
  Vector<T> values[kItems][2];

  // From pixel `first_pixel` and channel `first_channel` on; zeros where there is nothing.
  FUSEDSEP_DEVICE void load(const T* rows, int64_t pixels, int64_t channels, int64_t first_pixel,
                            int64_t first_channel) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int item = i * kThreads + int(threadIdx.x);
      const int64_t pixel = first_pixel + item % kPairs * 2, channel = first_channel + item / kPairs * kWide<T>;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        values[i][j] = {};
        if (pixel + j < pixels && channel < channels) {
          values[i][j] = cuda::load(rows + (pixel + j) * channels + channel);
        }
      }
    }
  }
  FUSEDSEP_DEVICE void store(unsigned char* to) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int item = i * kThreads + int(threadIdx.x);
      unsigned char* const place = to + item / kPairs * kWide<T> * kChunkPitch + item % kPairs * 2 * int(sizeof(T));
#pragma unroll
      for (int n = 0; n < kWide<T>; ++n) {
        cuda::store(reinterpret_cast<T*>(place + n * kChunkPitch),
                    Vector<T, 2>{values[i][0].values[n], values[i][1].values[n]});
      }
    }
  }
};

// Rows of the product are output channels, columns input channels. Writes [split][out_channels][in_channels].
template <class S, typename T>
__global__ void __launch_bounds__(S::kThreads)
    weight_gradient_kernel(const T* gp, const T* h, int64_t pixels, int64_t in_channels, int64_t out_channels,
                           int64_t chunks_per_split, float* sums) {
  FUSEDSEP_SHARED(shared);
  constexpr int kStage = (S::kPixels + S::kColumns) * kChunkPitch;
  const int64_t column_tiles = ceil_div(in_channels, S::kColumns), row_tiles = ceil_div(out_channels, S::kPixels);
  const int64_t first_column = blockIdx.x % column_tiles * S::kColumns;
  const int64_t first_row = blockIdx.x / column_tiles % row_tiles * S::kPixels;
  const int64_t split = blockIdx.x / (column_tiles * row_tiles);
  const int64_t all = ceil_div(pixels, kChunkPixels<T>), begin = split * chunks_per_split;
  const int64_t end = begin + chunks_per_split < all ? begin + chunks_per_split : all;

  Product<S, T, sizeof(T) == 2> product;
  TransposedChunk<S::kPixels, S::kThreads, T> rows;
  TransposedChunk<S::kColumns, S::kThreads, T> columns;
  const auto load_chunk = [&](int64_t chunk) {
    rows.load(gp, pixels, padded(out_channels), chunk * kChunkPixels<T>, first_row);
    columns.load(h, pixels, padded(in_channels), chunk * kChunkPixels<T>, first_column);
  };
  load_chunk(begin);
  unsigned char* stage = shared;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    // The other stage may still be read from; this one was before the last barrier.
    rows.store(stage);
    columns.store(stage + S::kPixels * kChunkPitch);
    __syncthreads();
    if (chunk + 1 < end) load_chunk(chunk + 1);
#pragma unroll
    for (int byte = 0; byte < kChunkBytes; byte += kStepBytes) {
      product.step(stage + byte, kChunkPitch, stage + S::kPixels * kChunkPitch + byte);
    }
    stage = stage == shared ? shared + kStage : shared;
  }

  constexpr int kOwn = decltype(product)::kOwn;
  float* const to = sums + split * out_channels * in_channels;
  product.each_row([&](int row, const float (&own)[kOwn]) {
    const int64_t o = first_row + row;
    if (o >= out_channels) return;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int64_t c = first_column + product.own(j);
      if (c < in_channels) to[o * in_channels + c] = own[j];
    }
  });
}

constexpr int kSplitThreads = 128;
template <typename T>
__global__ void __launch_bounds__(kSplitThreads)
    add_splits_kernel(const float* sums, int64_t splits, int64_t weights, T* grad_weight) {
  const int64_t index = int64_t(blockIdx.x) * kSplitThreads + threadIdx.x;
  if (index >= weights) return;
  double total = 0;
#pragma unroll 8
  for (int64_t split = 0; split < splits; ++split) total += double(sums[split * weights + index]);
  grad_weight[index] = from_float<T>(float(total));
}

// `sums` is memory for splits * in_channels * out_channels floats.
template <typename T>
void weight_gradient(const T* gp, const T* h, int64_t pixels, int64_t in_channels, int64_t out_channels,
                     const WeightGradientPlan& plan, float* sums, T* grad_weight, Stream stream) {
  with_shape(plan.shape, [&](auto shape) {
    using S = decltype(shape);
    const int64_t tiles = ceil_div(out_channels, S::kPixels) * ceil_div(in_channels, S::kColumns);
    launch(weight_gradient_kernel<S, T>, tiles * plan.splits, S::kThreads, kWeightGradientBytes<S>, stream, gp, h,
           pixels, in_channels, out_channels, plan.chunks, sums);
  });
  const int64_t weights = in_channels * out_channels;
  launch(add_splits_kernel<T>, ceil_div(weights, kSplitThreads), kSplitThreads, 0, stream, sums, plan.splits, weights,
         grad_weight);
}

}  // namespace fusedsep::cuda
