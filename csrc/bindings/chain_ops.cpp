// SPDX-License-Identifier: BSD-3-Clause
//
// The operator of a chain of layers.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "geometry.h"
#include "run_chain.h"
#include "tensors.h"

namespace fusedsep {
namespace {

// One layer among the numbers that describe a chain, in their order.
constexpr size_t kNumbersPerLayer = 13;
struct Layer {
  Rows rows;
  int64_t out_channels;
  Geometry geometry;
  int64_t residual, gated;

  explicit Layer(const int64_t* n)
      : rows(Rows(n[0])),
        out_channels(n[1]),
        geometry{n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[11]},
        residual(n[10]),
        gated(n[12]) {
    check_range("a layer's rows", n[0], 0, 5);
    check_range("a layer's out_channels", out_channels, 1, int64_t(1) << 40);
    check_geometry(geometry, int64_t(Activation::kHardsigmoid));
    STD_TORCH_CHECK(rows == Rows::kDepthwiseMap || geometry.activation <= kLastActivation,
                    "of a separable convolution in a chain, activation must be from 0 to ", kLastActivation);
    const bool is_map = rows == Rows::kDepthwiseMap;
    check_range("a layer's kernel", geometry.kernel, 3, is_map ? 7 : 3);
    STD_TORCH_CHECK(geometry.kernel % 2 == 1, "a layer's kernel must be odd");
    STD_TORCH_CHECK(!is_map || (geometry.dilation == 1 && geometry.pointwise_activation == 0),
                    "a depthwise convolution alone in a chain has dilation 1 and one activation");
  }
};

template <typename T>
Tensor chain_as(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& numbers) {
  const Isa& isa = active_isa();
  const auto& kernels = isa.separable<T>();
  constexpr int64_t kHeaderSize = int64_t(sizeof(PackedHeader) / sizeof(T));
  const T* const weights = packed.const_data_ptr<T>();
  const int64_t batch = x.size(0), weights_size = packed.size(0);
  int64_t channels = x.size(1), height = x.size(2), width = x.size(3), offset = 0;

  std::vector<SeparableParams<T>> layers;
  std::vector<int64_t> residuals, gated;
  // Channels, height and width of the maps: first x, then what the layers give.
  std::vector<std::array<int64_t, 3>> maps{{channels, height, width}};
  for (size_t i = 0; i < numbers.size(); i += kNumbersPerLayer) {
    const Layer layer(numbers.data() + i);
    const Geometry& g = layer.geometry;
    STD_TORCH_CHECK(layer.rows != Rows::kPatchesOfNchw || i == 0, "only the first layer of a chain can read NCHW");
    check_range("a layer's gated", layer.gated, -1, int64_t(i / kNumbersPerLayer) - 1);
    if (layer.gated >= 0) {
      STD_TORCH_CHECK(layer.rows == Rows::kPixels, "a layer with a gated map must be a 1x1 convolution");
      STD_TORCH_CHECK(height == 1 && width == 1 && maps[size_t(layer.gated)][0] == channels,
                      "what stands in front of a layer with a gated map must give a factor for each of its channels");
      STD_TORCH_CHECK(layer.gated != 0 || numbers[0] != int64_t(Rows::kPatchesOfNchw),
                      "an input in NCHW cannot be gated");
      height = maps[size_t(layer.gated)][1];
      width = maps[size_t(layer.gated)][2];
    }
    gated.push_back(layer.gated - 1);
    SeparableParams<T> params{};
    params.rows = layer.rows;
    params.in_channels = reads_patches(params) ? 9 * channels : channels;
    params.height = height;
    params.width = width;
    params.out_channels = layer.out_channels;
    params.kernel = g.kernel;
    if (layer.rows == Rows::kMeans) {
      STD_TORCH_CHECK(height > 0 && width > 0, "x is too small: a map without a pixel has no mean");
      params.out_height = params.out_width = 1;
    } else if (layer.rows == Rows::kPixels) {
      STD_TORCH_CHECK(height > 0 && width > 0, "x is too small: it has no pixel");
      STD_TORCH_CHECK(g.stride == 1 && g.pad_top == 0 && g.pad_bottom == 0 && g.pad_left == 0 && g.pad_right == 0,
                      "a 1x1 convolution in a chain has neither stride nor padding");
      params.out_height = height;
      params.out_width = width;
    } else {
      params.out_height = output_size("height", height, g.pad_top, g.pad_bottom, g);
      params.out_width = output_size("width", width, g.pad_left, g.pad_right, g);
    }
    element_count(batch, params.out_channels, params.out_height, params.out_width);
    element_count(batch, params.in_channels, params.height, params.width);
    params.stride = g.stride;
    params.dilation = g.dilation;
    params.pad_top = g.pad_top;
    params.pad_left = g.pad_left;
    params.channels_last = true;
    params.activation = Activation(g.activation);
    params.pointwise_activation = Activation(g.pointwise_activation);

    const bool depthwise_map = layer.rows == Rows::kDepthwiseMap;
    STD_TORCH_CHECK(!depthwise_map || params.out_channels == channels,
                    "a depthwise convolution alone has as many output channels as input channels");
    const PackedHeader header(isa, params.in_channels, depthwise_map ? 0 : params.out_channels, true, sizeof(T),
                              g.kernel);
    const int64_t size =
        kHeaderSize + (depthwise_map ? kernels.depthwise_map_packed_size(channels, g.kernel)
                                     : kernels.packed_size(params.in_channels, params.out_channels, true));
    STD_TORCH_CHECK(size <= weights_size - offset && std::memcmp(weights + offset, &header, sizeof(header)) == 0,
                    "packed must hold the weights of layer ", i / kNumbersPerLayer, ", packed for isa ", isa.name, ", ",
                    params.in_channels, " -> ", params.out_channels, " channels in channels_last; pack them again");
    params.packed = weights + offset + kHeaderSize;
    offset += size;
    layers.push_back(params);
    channels = params.out_channels;
    height = params.out_height;
    width = params.out_width;
    maps.push_back({channels, height, width});
    check_range("a layer's residual", layer.residual, -1, int64_t(i / kNumbersPerLayer));
    STD_TORCH_CHECK(layer.residual < 0 || layer.rows != Rows::kMeans, "the means of a chain cannot have a residual");
    STD_TORCH_CHECK(layer.residual < 0 || maps[size_t(layer.residual)] == maps.back(),
                    "the residual of a layer must be a map of the same shape");
    STD_TORCH_CHECK(layer.residual != 0 || numbers[0] != int64_t(Rows::kPatchesOfNchw),
                    "an input in NCHW cannot be a residual");
    residuals.push_back(layer.residual - 1);
  }
  STD_TORCH_CHECK(offset == weights_size, "packed must hold the weights of the layers and nothing else");

  const bool is_map = layers.back().rows != Rows::kMeans;
  const std::array<int64_t, 4> sizes{batch, channels, height, width};
  Tensor y = is_map ? empty_strided<4>(sizes, dense_strides(sizes, true), x.scalar_type())
                    : empty_strided<2>({batch, channels}, {channels, 1}, x.scalar_type());
  const int64_t threads = torch::stable::get_num_threads();
  ChainRunner<T>(kernels, layers, residuals, gated)
      .run(x.const_data_ptr<T>(), y.mutable_data_ptr<T>(), batch, threads, TorchParallelFor());
  return y;
}

Tensor chain(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& layers) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) >= 1 && x.size(1) < (int64_t(1) << 40) && x.is_cpu(),
                  "x must be a CPU tensor of shape [N, C, H, W]");
  STD_TORCH_CHECK(!layers.empty() && layers.size() % kNumbersPerLayer == 0, "layers must be a multiple of ",
                  kNumbersPerLayer, " numbers, got ", layers.size());
  const bool channels_last = layers[0] != int64_t(Rows::kPatchesOfNchw);
  STD_TORCH_CHECK(is_dense(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, channels_last), "x must be contiguous in ",
                  channels_last ? "channels_last" : "NCHW", " memory format");
  STD_TORCH_CHECK(
      packed.dim() == 1 && packed.is_contiguous() && packed.is_cpu() && packed.scalar_type() == x.scalar_type(),
      "packed must be what fusedsep::pack returned, concatenated, of the dtype of x");
  if (x.scalar_type() == ScalarType::Float) return chain_as<float>(x, packed, layers);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double, "x must be float32 or float64");
  return chain_as<double>(x, packed, layers);
}

}  // namespace
}  // namespace fusedsep

// `layers` has 13 numbers for each: rows (csrc/kernels/separable.h), out_channels, stride, dilation, pad_left,
// pad_right, pad_top, pad_bottom, activation, pointwise_activation, residual, kernel, gated. `residual` is the number
// of the map that is added to what the layer gives: 0 for x, i for that of layer i - 1, and -1 for none. `gated` is
// that of the map that a 1x1 convolution reads, times what the layer in front of it gives for each channel; -1 for a
// layer that reads what the layer in front of it gives. `packed` is what `pack`, or `pack_depthwise`, returned for
// each, in channels_last, one after the other.
STABLE_TORCH_LIBRARY_FRAGMENT(fusedsep, m) { m.def("chain(Tensor x, Tensor packed, int[] layers) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(fusedsep, CPU, m) { m.impl("chain", TORCH_BOX(&fusedsep::chain)); }
