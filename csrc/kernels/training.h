// SPDX-License-Identifier: BSD-3-Clause
//
// The passes of training: forward with statistics of the batch, and backward. Indices, layouts and geometry as in
// separable.h; n counts the values of a channel, batch * out_height * out_width.
//
//   d = depthwise convolution of x, without bias       u = (d - center1) * scale1 + shift1     h = act1(u)
//   p = pointwise product of h, without bias           t = (p - center2) * scale2 + shift2     y = act2(t)
//
// BatchNorm is the affine map: with statistics of the batch center = mean(d), scale = gamma / sqrt(var(d) + eps),
// shift = beta; with fixed ones center = mean - bias; without BN center = -bias, scale = 1, shift = 0.
//
//   g2 = gy * act2'(t)                                  S1 = sum g2     S2 = sum g2 * (p - center2)       over n
//   gp = scale2 * (g2 - slope2 * (p - center2) - offset2)
//   gW2[o,c] = sum over n of gp[o] * h[c]               gh[c] = sum over o of W2[o,c] * gp[o]
//   g1 = gh * act1'(u)                                  T1 = sum g1     T2 = sum g1 * (d - center1)       over n
//   gd = scale1 * (g1 - slope1 * (d - center1) - offset1)
//   gw1[c,u,v] = sum over n of gd * x at the tap        gx = transposed depthwise convolution of gd
//
// A pointwise convolution by itself is the second half: it reads d, which is its input or what that is kept as, from
// memory, h = act1(u) is the input, and g1 = gh its gradient, without sums.
//
// So is a whole 3x3 convolution of few channels, Rows::kPatches of separable.h, in channels_last: h is the patches,
// which are read where they lie in x, and gW2[o,k] = sum over n of gp[o] * x at tap k. x, an image, has no gradient.
//
// And so is a depthwise convolution alone, Rows::kDepthwiseMap, in channels_last: p is the depthwise map, y = act2(t),
// and gp takes the place of gd. p is kept, and nothing is computed again.
//
// With statistics of the batch slope = S2 / (n * (var + eps)) and offset = S1 / n (S. Ioffe, C. Szegedy,
// "Batch Normalization", 2015, section 3); otherwise both are zero. In the backward only p and g1 are maps in memory: d
// is computed from x again, which is read anyway, and h, gp and gd are tiles alone.
//
// Sums      Statistics are formed per tile, around the mean of the tile, and merged by Chan's formula; sums over n are
//           chains of at most 16 neighbours in T, added up in double (those of the depthwise weight gradient: at most
//           16 such chains added up in T first). The sums of a tile go to its own place, and the caller merges them in
//           the order of tiles. Weight gradients of the pointwise convolution add up groups of tiles in order, small
//           ones in a fixed number of parts that are added up in order. None of this depends on the number of threads.
// Channels  Values a channel (Affine, Correction) and sums (double) lie in arrays of `padded_channels()` elements, zero
//           behind the last channel.
// Tiles     Pixels [begin, end) as in separable.h, but in channels_last they may go on into the next images, so that
//           small maps fill their tiles. `begin` is a multiple of `lanes`.
#pragma once

#include "separable.h"

namespace fusedsep {

// Elements of an array of values a channel: a multiple of 16, which all lanes divide.
inline int64_t padded_channels(int64_t channels) { return (channels + 15) / 16 * 16; }

template <typename T>
struct Affine {
  const T *center, *scale, *shift;
};

// Null pointers where both are zero, so that infinite values do not reach a gradient that they have no part in.
template <typename T>
struct Correction {
  const T *slope, *offset;
};

template <typename T>
struct TrainingParams {
  SeparableParams<T> conv;  // geometry and x; y is the raw product p; packed is what `pack` below wrote; no activations
  // In the backward in channels_last conv.x may be the raw product of the block before, unless x_affine.center is null:
  // x = x_activation((conv.x - x_affine.center) * x_affine.scale + x_affine.shift) is formed while it is loaded.
  Affine<T> x_affine;
  Activation x_activation;
  Activation activation, pointwise_activation;
  Affine<Weight<T>> affine1, affine2;
  Correction<Weight<T>> correction1, correction2;
  T* y;             // batch maps of out_channels
  const T* grad_y;  // the same
  T* g1;            // batch maps of in_channels x out_height x out_width
  // The same: left by depthwise_statistics, read by forward; null: computed again; may lie where y will. In the
  // backward null, but for a pointwise convolution by itself.
  T* d;
  T* grad_x;  // like x; null: not wanted; may be g1 where the two are of one size
};

// Operands of the pointwise weight gradient: gp and h of a group of tiles, side by side, `depth` pixels in all. Tiles
// begin at multiples of `lanes`; what they leave free is zero.
template <typename T>
struct WeightGradient {
  T* rows;          // gp, as row blocks of output channels
  T* columns;       // h, as column panels of input channels
  int64_t depth;    // multiple of `lanes`
  T* grad_weight;   // [out_channels][in_channels]
  bool accumulate;  // add to it
};

// Pixels [begin, end) of x, counted through all images, hold whatever a tile in channels_last reads.
struct PixelRange {
  int64_t begin, end;
};
template <typename T>
PixelRange input_of_tile(const SeparableParams<T>& conv, const Tile& tile) {
  const int64_t out_pixels = conv.out_height * conv.out_width;
  const auto row_of = [&](int64_t pixel, int64_t tap) {
    const int64_t image = tile.image + pixel / out_pixels;
    const int64_t row = pixel % out_pixels / conv.out_width * conv.stride - conv.pad_top + tap;
    return image * conv.height + (row < 0 ? 0 : row > conv.height ? conv.height : row);
  };
  const int64_t begin = row_of(tile.begin, 0), end = row_of(tile.end - 1, 2 * conv.dilation + 1);
  return {begin * conv.width, (end > begin ? end : begin) * conv.width};
}

template <typename T>
struct TrainingKernels {
  int64_t lanes, tile_rows, tile_columns;

  // Weights for the forward passes, or `transposed` for the backward ones. [in_channels][3][3],
  // [out_channels][in_channels]. A call packs results [begin, end) of the product, output channels or, `transposed`,
  // input channels, from a multiple of `tile_columns` on; that from 0 on the taps too, unless they are null.
  int64_t (*packed_size)(int64_t in_channels, int64_t out_channels, bool channels_last, bool transposed);
  void (*pack)(const T* depthwise_weight, const T* pointwise_weight, int64_t in_channels, int64_t out_channels,
               bool channels_last, bool transposed, int64_t begin, int64_t end, T* packed);

  // to[c][r] = from[r][c], of rows `from_pitch` and `to_pitch` elements apart: a part of a map of one image from one
  // memory format to the other.
  void (*transpose)(const T* from, int64_t from_pitch, int64_t rows, int64_t columns, T* to, int64_t to_pitch);

  // Elements of scratch of the passes below for a tile of `pixels`, for which `input_pixels` of x are formed.
  int64_t (*scratch_size)(int64_t in_channels, int64_t out_channels, int64_t pixels, int64_t input_pixels,
                          bool channels_last);

  // Mean and sum of squared differences from it of d over the tile: sums[0][c], sums[1][c]. Leaves d.
  void (*depthwise_statistics)(const TrainingParams<T>& params, const Tile& tile, T* scratch, double* sums);
  // p of the tile; its mean and squared differences to `sums` unless that is null. Reads d.
  void (*forward)(const TrainingParams<T>& params, const Tile& tile, T* scratch, double* sums);
  // y of the tile, from p.
  void (*normalize)(const TrainingParams<T>& params, const Tile& tile);
  // S1 and S2 of the tile, from grad_y and p.
  void (*normalize_backward_reduce)(const TrainingParams<T>& params, const Tile& tile, double* sums);
  // g1, T1 and T2 of the tile where `sums` is not null (g1 alone where params has both d and g1); its operands of the
  // weight gradient, from pixel `offset` on, where `gradient` is not null.
  void (*pointwise_backward)(const TrainingParams<T>& params, const Tile& tile, T* scratch, double* sums,
                             const WeightGradient<T>* gradient, int64_t offset);
  // Elements of `rows` and `columns`.
  void (*weight_gradient_sizes)(int64_t in_channels, int64_t out_channels, int64_t depth, int64_t* rows,
                                int64_t* columns);
  // Output channels are worked on in blocks; computes blocks [begin, end) of grad_weight.
  int64_t (*weight_gradient_blocks)(int64_t out_channels);
  void (*weight_gradient)(const TrainingParams<T>& params, const WeightGradient<T>& gradient, int64_t begin,
                          int64_t end);

  // The part of a tile in the weight gradient of a convolution whose rows are patches, added to sums[k][o], rows of
  // padded channels.
  int64_t (*convolution_scratch_size)(int64_t in_channels, int64_t out_channels, int64_t pixels);
  void (*convolution_backward)(const TrainingParams<T>& params, const Tile& tile, T* scratch, double* sums);

  // Rows::kDepthwiseMap. Taps [channels][kernel][kernel] for its forward, or `reversed` for its backward.
  int64_t (*depthwise_map_packed_size)(int64_t channels, int64_t kernel);
  void (*pack_taps)(const T* weight, int64_t channels, int64_t kernel, bool reversed, T* packed);
  // p, as depthwise_map of separable.h computes it; its mean and squared differences to sums[0][c], sums[1][c], rows of
  // padded channels, unless `sums` is null.
  int64_t line_channels;
  int64_t (*depthwise_map_scratch_size)(const TrainingParams<T>& params);
  void (*depthwise_map_forward)(const TrainingParams<T>& params, int64_t row_begin, int64_t row_end,
                                int64_t channel_begin, int64_t channel_end, T* scratch, double* sums);

  // Channels of one job of depthwise_backward: a multiple of `lanes` in channels_last, one in NCHW.
  int64_t (*depthwise_backward_channels)(bool channels_last);
  int64_t (*depthwise_backward_scratch_size)(const TrainingParams<T>& params);
  // grad_x of channels [begin, end) of images [first_image, last_image), and their part of the depthwise weight
  // gradient, added to sums[kernel * u + v][c], where `sums` is not null. From g1, x and correction1; for
  // Rows::kDepthwiseMap from grad_y, p, x and correction2.
  void (*depthwise_backward)(const TrainingParams<T>& params, int64_t first_image, int64_t last_image, int64_t begin,
                             int64_t end, T* scratch, double* sums);
};

}  // namespace fusedsep
