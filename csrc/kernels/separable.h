// SPDX-License-Identifier: BSD-3-Clause
//
// Depthwise 3x3 convolution, activation, pointwise 1x1 convolution, activation: the contract of the kernels.
//
//   h[n,c,i,j] = act1( b1[c] + sum over u,v in 0..2 of  w1[c,u,v] * x[n, c, i*S + u*D - pad_top, j*S + v*D - pad_left]
//   ) y[n,o,i,j] = act2( b2[o] + sum over c of            w2[o,c]   * h[n,c,i,j] )
//
// with S = stride, D = dilation, x = 0 outside the map. BatchNorm with fixed statistics is folded into w1, b1, w2, b2
// when they are packed. `h` exists only as a tile of output pixels in `scratch`.
//
// Layouts   Maps are dense, in one of two memory formats: channels_last [n][i][j][c] or NCHW [n][c][i][j]. Inside a
//           tile, output pixels are numbered p = i * out_width + j. All sizes and offsets count elements, not bytes.
// Aliasing  x, the packed weights and scratch must not overlap y.
// Order     h is one chain of (fused) multiply-adds over u, then v; y is a sum, in order, of chains over at most 128
//           neighbouring c. Biases come last: a folded BN may have a large one, and every step of a chain that started
//           from it would round at its magnitude. Lengths of chains depend on in_channels and the ISA alone; neither
//           the tile nor the split over threads changes a result, so results are bit-identical for every thread count
//           and batch.
// Memory    Kernels neither allocate nor start threads. The caller passes scratch of `scratch_size()` elements, 64-byte
//           aligned, one for each tile that is worked on at a time.
// Threads   `depthwise` may run concurrently on disjoint channel ranges of one scratch, `pointwise` on disjoint ranges
// of
//           output panels of one scratch, and both on different scratches without restriction.
// Reads     Nothing outside x, the packed weights and scratch is read, not even by vector tails.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedsep {

enum class Activation : int32_t {
  kNone = 0,
  kRelu = 1,
  kRelu6 = 2,
  kHardswish = 3,
  // In channels_last, of a depthwise convolution alone and behind a product: a pass over what was stored.
  kSilu = 4,
  kSigmoid = 5,
  kHardsigmoid = 6,
  kGelu = 7,
};

// What `h` is. Besides the depthwise stage, which gives this library its name, there are those that other layers of a
// network need, so that their products run in the same kernels; these are for channels_last alone.
enum class Rows : int32_t {
  kDepthwise = 0,
  // 3x3 patches of an image, which make a product of a whole convolution: h[(u*3 + v)*C + c] is
  // x[n, c, i*S + u*D - pad_top, j*S + v*D - pad_left], with C = in_channels / 9 channels in x. They are read where
  // they lie in x, and never stored: `depthwise` has nothing to do.
  kPatches = 1,
  kPatchesOfNchw = 2,  // from x in NCHW, with the channel before the tap: h[c*9 + u*3 + v]
  // The mean of each map, for a product that is a classifier: out_height = out_width = 1.
  kMeans = 3,
  kPixels = 4,  // x itself, for a 1x1 convolution alone
  // No product follows: the depthwise convolution alone, where `kernel` may be odd and up to 11; y is h. It has kernels
  // of its own, `depthwise_map`.
  kDepthwiseMap = 5,
  // No convolution at all, and no weights, for `combine`: y = act(x + residual), act(x * residual), act(x * gate) or
  // act(x),
  kSum = 6,
  // and the channels of both in turns: y[2c] = x[c], y[2c + 1] = residual[c].
  kInterleaved = 7,
  // The largest of kernel x kernel pixels, of those inside the map, for `max_pool`; NaN if one of them is.
  kMaxPool = 8,
  // y[n, c, i, j] = x[n, c, i / 2, j / 2], for `upsample`.
  kUpsample = 9,
  // Each pixel of x less the mean of its channels, over their standard deviation, for a product as in kPixels:
  // LayerNorm, whose own factors belong to the product. The square root is of the biased variance and a number that the
  // packed weights have in the place of the depthwise bias.
  kNormalizedPixels = 10,
};

// Weights and values a channel of maps of T: of the same type, except for the 16-bit types of csrc/cuda/element.h.
template <typename T>
struct WeightOf {
  using type = T;
};
template <typename T>
using Weight = typename WeightOf<T>::type;

// One call: a batch of maps through one depthwise-separable convolution.
template <typename T>
struct SeparableParams {
  const T* x;               // batch maps of in_channels x height x width
  T* y;                     // batch maps of out_channels x out_height x out_width
  const Weight<T>* packed;  // what `pack` wrote for the same ISA, channels and memory format
  int64_t batch;
  int64_t in_channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t stride;    // 1 or 2; in kPixels every second pixel of a row and of a column
  int64_t dilation;  // at least 1
  int64_t pad_top, pad_left;
  bool channels_last;
  Activation activation, pointwise_activation;
  Rows rows = Rows::kDepthwise;  // in_channels counts those of h; only a depthwise stage has an activation and packed
                                 // weights of its own
  int64_t kernel = 3;  // taps in a row and in a column; other than 3 in kDepthwiseMap, and in kMaxPool, of dilation 1
  // In kPixels and kSum, factors [batch][in_channels] of x: what squeeze-and-excitation makes of the map that x is. Or
  // null, as in a kSum that has a residual.
  const T* gate = nullptr;
  // A map of the shape of y that is added to it at the end, or that it `multiplies`; in channels_last, and it does not
  // overlap y.
  const T* residual = nullptr;
  bool multiplies = false;  // not in kUpsample
  // Of what is stored in the end, behind the residual; not in NCHW, and not in kInterleaved, kMaxPool
  // and kUpsample.
  Activation joined_activation = Activation::kNone;
  // In channels_last, elements between neighbouring pixels of x, y and residual where those are some channels of maps
  // that have more; 0: as many as they have channels.
  int64_t x_pitch = 0, y_pitch = 0, residual_pitch = 0;
};

template <typename T>
constexpr int64_t x_pitch_of(const SeparableParams<T>& p) {
  const bool patches = p.rows == Rows::kPatches || p.rows == Rows::kPatchesOfNchw;
  return p.x_pitch != 0 ? p.x_pitch : patches ? p.in_channels / 9 : p.in_channels;
}
template <typename T>
constexpr int64_t y_pitch_of(const SeparableParams<T>& p) {
  return p.y_pitch != 0 ? p.y_pitch : p.out_channels;
}
template <typename T>
constexpr int64_t residual_pitch_of(const SeparableParams<T>& p) {
  return p.residual_pitch != 0 ? p.residual_pitch : p.out_channels;
}

// Output pixels [begin, end) of an image; at least one and at most kMaxTilePixels. In channels_last the pixels of the
// next image follow on those of this one, and a tile may run on into them.
constexpr int64_t kMaxTilePixels = 2048;
struct Tile {
  int64_t image;
  int64_t begin, end;
};

// Raw weights to pack. A null scale means 1, a null bias means 0.
template <typename T>
struct PackParams {
  const T* depthwise_weight;      // [in_channels][3][3]
  const double* depthwise_scale;  // [in_channels]
  const double* depthwise_bias;   // [in_channels]
  const T* pointwise_weight;      // [out_channels][in_channels]
  const double* pointwise_scale;  // [out_channels]
  const double* pointwise_bias;   // [out_channels]
  int64_t in_channels, out_channels;
  bool channels_last;
};

// The kernels of one ISA for one element type.
template <typename T>
struct SeparableKernels {
  // Register tile of the pointwise product: `tile_rows` broadcast operands x `tile_columns` vector lanes.
  int64_t lanes, tile_rows, tile_columns;

  // Elements of the packed weights. Product of positive sizes; the caller has checked that it does not overflow.
  int64_t (*packed_size)(int64_t in_channels, int64_t out_channels, bool channels_last);
  void (*pack)(const PackParams<T>& params, T* packed);

  // Elements of scratch for a tile of `pixels`.
  int64_t (*scratch_size)(int64_t in_channels, int64_t pixels, bool channels_last);

  // Channels [channel_begin, channel_end) of h over the tile; channel_begin is a multiple of `lanes`, and so is
  // channel_end unless it is in_channels.
  void (*depthwise)(const SeparableParams<T>& params, const Tile& tile, int64_t channel_begin, int64_t channel_end,
                    T* scratch);

  // Output channels are worked on in panels: `tile_columns` channels in channels_last, a balanced block of at most
  // `tile_rows` in NCHW. Computes panels [panel_begin, panel_end) over the tile.
  int64_t (*panel_count)(int64_t out_channels, bool channels_last);
  void (*pointwise)(const SeparableParams<T>& params, const Tile& tile, int64_t panel_begin, int64_t panel_end,
                    const T* scratch);

  // Rows::kDepthwiseMap. Of PackParams the depthwise part counts, with `kernel` x `kernel` taps a channel.
  int64_t (*depthwise_map_packed_size)(int64_t channels, int64_t kernel);
  void (*pack_depthwise_map)(const PackParams<T>& params, int64_t kernel, T* packed);
  int64_t (*depthwise_map_scratch_size)(const SeparableParams<T>& params);
  // Output rows [row_begin, row_end), counted on from image to image; channels [channel_begin, channel_end), which are
  // multiples of `line_channels` unless they end with the map.
  int64_t line_channels;
  void (*depthwise_map)(const SeparableParams<T>& params, int64_t row_begin, int64_t row_end, int64_t channel_begin,
                        int64_t channel_end, T* scratch);

  // Rows::kSum and Rows::kInterleaved, for pixels [begin, end), counted on from image to image.
  void (*combine)(const SeparableParams<T>& params, int64_t begin, int64_t end);
  // Rows::kMaxPool and Rows::kUpsample, for output rows [row_begin, row_end), counted on from image to image.
  void (*max_pool)(const SeparableParams<T>& params, int64_t row_begin, int64_t row_end);
  void (*upsample)(const SeparableParams<T>& params, int64_t row_begin, int64_t row_end);
};

}  // namespace fusedsep
