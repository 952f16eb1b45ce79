// SPDX-License-Identifier: BSD-3-Clause
//
// Fused: a block computes h of S::kPixels pixels, all channels of it, in shared memory, and multiplies it with its
// slice of the output channels, S::kColumns at a time. Unfused: one kernel writes h to memory and another multiplies
// it. Both write y through shared memory, in whole vectors.
#pragma once

#include "depthwise-inl.h"
#include "forward.h"
#include "moments-inl.h"
#include "product-inl.h"

namespace fusedsep::cuda {

// Bytes [begin, end) of kRows rows in shared memory.
template <int kRows, int kThreads>
FUSEDSEP_DEVICE void clear_tails(unsigned char* rows, int pitch, int begin, int end) {
  for (int row = int(threadIdx.x); row < kRows; row += kThreads) {
    for (int byte = begin; byte < end; byte += 16) store(rows + row * pitch + byte, Vector<unsigned char>());
  }
}

// The pixels of a thread in the statistics of a tile: it has one column of it.
template <class S>
constexpr int kMomentPixels = S::kPixels * S::kColumns / S::kThreads;

// Statistics of a tile of y that lies in shared memory, `row_step` and `column_step` elements between pixels and
// columns: those of run r of kMomentPixels pixels and of a channel to moments[r][0] (means) and [r][1] (squared
// differences).
template <class S, typename T>
FUSEDSEP_DEVICE void tile_moments(const T* tile, int row_step, int column_step, int64_t first_pixel, int64_t pixels,
                                  int64_t first_column, int64_t padded_channels, double* moments) {
  const int column = int(threadIdx.x) % S::kColumns, first_row = int(threadIdx.x) / S::kColumns * kMomentPixels<S>;
  const int64_t channel = first_column + column, left = pixels - (first_pixel + first_row);
  if (channel >= padded_channels || left <= 0) return;
  const int rows = left < kMomentPixels<S> ? int(left) : kMomentPixels<S>;
  const T* value = tile + first_row * row_step + column * column_step;
  Moments<1> own;
#pragma unroll 1
  for (int row = 0; row < rows; ++row, value += row_step) own.add({to_float(*value)});
  moments += (first_pixel + first_row) / kMomentPixels<S> * 2 * padded_channels + channel;
  moments[0] = double(own.first[0]) + double(own.mean[0]);
  moments[padded_channels] = double(own.squares[0]);
}

// How a kernel reads and writes: kVectors says that x is read in whole vectors (channels_last alone), kMoments that it
// leaves statistics of y.
template <class S, bool kFused, bool kVectors, bool kTensorCores, bool kMoments, typename T>
__global__ void __launch_bounds__(S::kThreads, kBlocks<S, T>)
    product_kernel(SeparableParams<T> p, const T* h, int64_t slices, bool y_vectors, double* moments) {
  FUSEDSEP_SHARED(shared);
  using Layout = SharedLayout<S, T>;
  const auto weights = packed_at<const T>(p.packed, p.in_channels, p.out_channels);
  // Blocks of the same pixels follow on each other, so that x or h comes from L2.
  const int64_t first_pixel = blockIdx.x / slices * S::kPixels, slice = blockIdx.x % slices;
  const int64_t pixels = p.batch * p.out_height * p.out_width;
  const int64_t row_bytes = weights.in_padded * int64_t(sizeof(T));
  const int64_t tiles = ceil_div(p.out_channels, S::kColumns);
  const int chunks = int(ceil_div(row_bytes, kChunkBytes));
  unsigned char* const stages = shared;
  unsigned char* const rows = stages + Layout::stages(kFused);
  const int row_pitch = int(Layout::row(weights.in_padded));
  const auto pipeline_of = [&](int64_t tile) {
    return Pipeline<S, kFused>{
        {reinterpret_cast<const unsigned char*>(h + first_pixel * weights.in_padded), pixels - first_pixel, row_bytes},
        {reinterpret_cast<const unsigned char*>(weights.product + tile * S::kColumns * weights.in_padded),
         p.out_channels - tile * S::kColumns, row_bytes},
        stages,
        chunks};
  };

  for (int64_t tile = slice; tile < tiles; tile += slices) {
    const auto pipeline = pipeline_of(tile);
    pipeline.start();
    if (kFused && tile == slice) {
      depthwise_tile<kVectors, S::kPixels, S::kThreads>(p, weights, first_pixel, reinterpret_cast<T*>(rows),
                                                        row_pitch / int(sizeof(T)));
      clear_tails<S::kPixels, S::kThreads>(rows, row_pitch, int(row_bytes), chunks * kChunkBytes);
    }
    Product<S, T, kTensorCores> product;
    pipeline.run(rows, row_pitch, product);

    constexpr int kOwn = Product<S, T, kTensorCores>::kOwn;
    const int64_t first_column = tile * S::kColumns;
    float scale[kOwn], shift[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int64_t column = first_column + product.own(j);
      scale[j] = column < p.out_channels ? weights.affine2[column] : 0.0f;
      shift[j] = column < p.out_channels ? weights.affine2[weights.out_padded + column] : 0.0f;
    }
    T* const y = reinterpret_cast<T*>(stages);
    constexpr int kPadding = kRowPadding / int(sizeof(T));
    const int pitch = (p.channels_last ? S::kColumns : S::kPixels) + kPadding;
    const int row_step = p.channels_last ? pitch : 1, column_step = p.channels_last ? 1 : pitch;
    product.each_row([&](int row, float (&sums)[kOwn]) {
      normalize(p.pointwise_activation, scale, shift, sums);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) y[row * row_step + product.own(j) * column_step] = from_float<T>(sums[j]);
    });
    __syncthreads();
    if constexpr (kMoments) {
      tile_moments<S>(y, row_step, column_step, first_pixel, pixels, first_column, weights.out_padded, moments);
    }
    write_tile<S>(y, pitch, p, y_vectors, first_pixel, first_column);
    __syncthreads();
  }
}

// h as rows of in_padded elements in memory. A block has kGroups groups of channels; the blocks of the same channels
// share the pixels, neighbours among them, as often as it takes.
constexpr int kRowsThreads = 128;
constexpr int kRowsBlocks = 4;  // that a multiprocessor is to hold
template <bool kVectors>
struct RowsKernel {
  template <typename T>
  static constexpr int kGroup = kVectors ? kWide<T> : kElements;
  static constexpr int kGroups = kVectors ? 32 : 8;
};
template <bool kVectors, typename T>
__global__ void __launch_bounds__(kRowsThreads, sizeof(T) == 4 ? kRowsBlocks : 0)
    depthwise_kernel(SeparableParams<T> p, T* h, int64_t slices) {
  constexpr int kGroup = RowsKernel<kVectors>::template kGroup<T>;
  const auto weights = packed_at<const T>(p.packed, p.in_channels, p.out_channels);
  const int64_t pixels = p.batch * p.out_height * p.out_width;
  const int channel = int(blockIdx.x % slices) * RowsKernel<kVectors>::kGroups * kGroup;
  const int64_t block = blockIdx.x / slices, blocks = gridDim.x / slices;
  const int left = int(weights.in_padded - channel) / kGroup;
  const int groups = left < RowsKernel<kVectors>::kGroups ? left : RowsKernel<kVectors>::kGroups;
  const int thread = int(threadIdx.x);
  if constexpr (kVectors) {
    const int pixel_lanes = kRowsThreads / groups, group = thread % groups;
    if (thread / groups >= pixel_lanes) return;
    const int64_t first = block * pixel_lanes + thread / groups, step = blocks * pixel_lanes;
    if (first >= pixels) return;
    T* const to = h + first * weights.in_padded + channel + group * kGroup;
    depthwise_vectors(p, weights, channel + group * kGroup, PixelWalk<T>(p, first, step),
                      int(ceil_div(pixels - first, step)),
                      [&](int n, const Vector<T>& values) { store(to + n * step * weights.in_padded, values); });
  } else {
    for (int64_t pixel = block * kRowsThreads + thread; pixel < pixels; pixel += blocks * kRowsThreads) {
      T* const to = h + pixel * weights.in_padded + channel;
      depthwise_elements(p, weights, channel, PixelWalk<T>(p, pixel, 0), groups, 1,
                         [&](int n, const Vector<T, kGroup>& values) { store(to + n * kGroup, values); });
    }
  }
}
template <bool kVectors, typename T>
void write_rows(const SeparableParams<T>& p, const Device& device, T* h, Stream stream) {
  using K = RowsKernel<kVectors>;
  const int64_t groups = padded(p.in_channels) / K::template kGroup<T>, slices = ceil_div(groups, K::kGroups);
  const int64_t pixels = p.batch * p.out_height * p.out_width;
  const int64_t pixel_lanes = kVectors ? kRowsThreads / std::min<int64_t>(groups, K::kGroups) : kRowsThreads;
  // As many blocks as run at once: weights are then loaded once a thread.
  const int64_t blocks =
      std::min(ceil_div(pixels, pixel_lanes), ceil_div(device.multiprocessors * kRowsBlocks, slices));
  launch(depthwise_kernel<kVectors, T>, blocks * slices, kRowsThreads, 0, stream, p, h, slices);
}

// Whether a map may be read or written in whole vectors, of channels or of pixels as its format has them.
template <typename T>
bool has_vectors(const T* map, int64_t channels, int64_t map_pixels, bool channels_last) {
  return is_vector_aligned(map) && (channels_last ? channels : map_pixels) % kWide<T> == 0;
}

template <typename T>
int64_t scratch_elements(const SeparableParams<T>& p, const Plan& plan) {
  return plan.fused ? 0 : p.batch * p.out_height * p.out_width * padded(p.in_channels);
}

template <bool kTensorCores, bool kVectors, typename T>
void separable_forward(const SeparableParams<T>& p, const Plan& plan, const Device& device, T* scratch, Stream stream) {
  const int64_t map_pixels = p.out_height * p.out_width, pixels = p.batch * map_pixels;
  if (!plan.fused) write_rows<kVectors>(p, device, scratch, stream);
  with_shape(plan.shape, [&](auto shape) {
    using S = decltype(shape);
    const int64_t tiles = ceil_div(p.out_channels, S::kColumns);
    const int64_t slices = plan.fused ? std::min(plan.slices, tiles) : tiles;
    launch(plan.fused ? product_kernel<S, true, kVectors, kTensorCores, false, T>
                      : product_kernel<S, false, false, kTensorCores, false, T>,
           ceil_div(pixels, S::kPixels) * slices, S::kThreads,
           SharedLayout<S, T>::size(plan.fused, padded(p.in_channels)), stream, p, scratch, slices,
           has_vectors(p.y, p.out_channels, map_pixels, p.channels_last), static_cast<double*>(nullptr));
  });
}

template <typename T>
void multiply_rows(const SeparableParams<T>& p, const T* rows, double* moments, const Device& device, Stream stream) {
  const int64_t map_pixels = p.out_height * p.out_width, pixels = p.batch * map_pixels;
  constexpr bool kTensorCores = sizeof(T) == 2;
  with_shape(choose_shape_for_rows(p, kTensorCores, device), [&](auto shape) {
    using S = decltype(shape);
    const int64_t tiles = ceil_div(p.out_channels, S::kColumns);
    launch(moments == nullptr ? product_kernel<S, false, false, kTensorCores, false, T>
                              : product_kernel<S, false, false, kTensorCores, true, T>,
           ceil_div(pixels, S::kPixels) * tiles, S::kThreads, SharedLayout<S, T>::size(false, padded(p.in_channels)),
           stream, p, rows, tiles, has_vectors(p.y, p.out_channels, map_pixels, p.channels_last), moments);
  });
}

template <typename T>
int64_t moment_pixels(const SeparableParams<T>& p, const Device& device) {
  return with_shape(choose_shape_for_rows(p, sizeof(T) == 2, device),
                    [](auto shape) { return int64_t(kMomentPixels<decltype(shape)>); });
}

template <typename T>
bool reads_vectors(const SeparableParams<T>& p) {
  return p.channels_last && has_vectors(p.x, p.in_channels, 0, true);
}
template <typename T>
bool uses_tensor_cores(bool allow_tf32) {
  return sizeof(T) == 2 || allow_tf32;
}

template <typename T>
Plan plan_of(const SeparableParams<T>& p, bool allow_tf32, const Device& device) {
  return choose_plan(p, reads_vectors(p), uses_tensor_cores<T>(allow_tf32), device);
}

template <typename T>
void separable_forward(const SeparableParams<T>& p, const Plan& plan, bool allow_tf32, const Device& device, T* scratch,
                       Stream stream) {
  const auto run = [&](auto tensor_cores) {
    constexpr bool kTensorCores = decltype(tensor_cores)::value;
    reads_vectors(p) ? separable_forward<kTensorCores, true>(p, plan, device, scratch, stream)
                     : separable_forward<kTensorCores, false>(p, plan, device, scratch, stream);
  };
  if constexpr (sizeof(T) == 4) {
    if (!allow_tf32) return run(std::false_type());
  }
  run(std::true_type());
}

// Scale and shift of a channel as numbers, or from the tensors of a BN.
struct ScaleAndShift {
  const double *scale, *shift;  // null: 1 and 0
  FUSEDSEP_DEVICE float scale_of(int64_t i) const { return scale == nullptr ? 1.0f : float(scale[i]); }
  FUSEDSEP_DEVICE float shift_of(int64_t i) const { return shift == nullptr ? 0.0f : float(shift[i]); }
};
template <typename T>
FUSEDSEP_DEVICE double bn_scale(const NormTensors<T>& bn, int64_t i) {
  return bn.mean == nullptr ? 1.0 : number(bn.weight, i, 1) / sqrt(number(bn.var, i, 0) + bn.eps);
}
template <typename T>
struct FoldedNorm {
  NormTensors<T> bn;
  FUSEDSEP_DEVICE float scale_of(int64_t i) const { return float(bn_scale(bn, i)); }
  FUSEDSEP_DEVICE float shift_of(int64_t i) const {
    return float(number(bn.shift, i, 0) + (number(bn.bias, i, 0) - number(bn.mean, i, 0)) * bn_scale(bn, i));
  }
};

// One thread for each padded weight of the product, and for each tap and value a channel.
template <typename T, class A>
__global__ void pack_kernel(const T* depthwise_weight, const T* pointwise_weight, int64_t in_channels,
                            int64_t out_channels, A affine1, A affine2, float* memory) {
  const auto packed = packed_at<T>(memory, in_channels, out_channels);
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index < packed.in_padded * out_channels) {
    const int64_t o = index / packed.in_padded, c = index % packed.in_padded;
    packed.product[index] = c < in_channels ? pointwise_weight[o * in_channels + c] : T();
  }
  const auto pack_affine = [index](float* rows, int64_t padded, int64_t channels, const A& affine) {
    if (index >= padded) return;
    rows[index] = index < channels ? affine.scale_of(index) : 0.0f;
    rows[padded + index] = index < channels ? affine.shift_of(index) : 0.0f;
  };
  pack_affine(packed.affine1, packed.in_padded, in_channels, affine1);
  pack_affine(packed.affine2, packed.out_padded, out_channels, affine2);
  if (index < packed.in_padded) {
    for (int tap = 0; tap < 9; ++tap) {
      packed.taps[tap * packed.in_padded + index] = index < in_channels ? depthwise_weight[index * 9 + tap] : T();
    }
  }
}

template <typename T, class A>
void pack_with(const T* depthwise_weight, const T* pointwise_weight, int64_t in_channels, int64_t out_channels,
               const A& affine1, const A& affine2, float* packed, Stream stream) {
  constexpr int kThreads = 256;
  launch(pack_kernel<T, A>, ceil_div(padded(in_channels) * padded(out_channels), kThreads), kThreads, 0, stream,
         depthwise_weight, pointwise_weight, in_channels, out_channels, affine1, affine2, packed);
}
template <typename T>
void pack(const PackParams<T>& p, float* packed, Stream stream) {
  pack_with(p.depthwise_weight, p.pointwise_weight, p.in_channels, p.out_channels,
            ScaleAndShift{p.depthwise_scale, p.depthwise_bias}, ScaleAndShift{p.pointwise_scale, p.pointwise_bias},
            packed, stream);
}
template <typename T>
void pack(const ModuleTensors<T>& p, float* packed, Stream stream) {
  pack_with(p.depthwise_weight, p.pointwise_weight, p.in_channels, p.out_channels, FoldedNorm<T>{p.bn1},
            FoldedNorm<T>{p.bn2}, packed, stream);
}

}  // namespace fusedsep::cuda
