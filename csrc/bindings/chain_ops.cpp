// SPDX-License-Identifier: BSD-3-Clause
//
// The operator of a chain of layers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <string>
#include <vector>

#include "formats.h"
#include "geometry.h"
#include "run_chain.h"
#include "tensors.h"

namespace fusedsep {
namespace {

// One layer among the numbers that describe a chain, in their order.
constexpr size_t kNumbersPerLayer = 21;
struct LayerNumbers {
  Rows rows;
  int64_t out_channels;
  Geometry geometry;
  int64_t residual, gated, input, input_begin, in_channels, output, output_begin, residual_begin, joined_activation,
      multiplies;

  explicit LayerNumbers(const int64_t* n)
      : rows(Rows(n[0])),
        out_channels(n[1]),
        geometry{n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[11]},
        residual(n[10]),
        gated(n[12]),
        input(n[13]),
        input_begin(n[14]),
        in_channels(n[15]),
        output(n[16]),
        output_begin(n[17]),
        residual_begin(n[18]),
        joined_activation(n[19]),
        multiplies(n[20]) {
    constexpr int64_t kMost = int64_t(1) << 40;
    check_range("a layer's rows", n[0], 0, int64_t(Rows::kNormalizedPixels));
    check_range("a layer's out_channels", out_channels, 1, kMost);
    check_range("a layer's input_begin", input_begin, 0, kMost);
    check_range("a layer's in_channels", in_channels, 0, kMost);
    check_range("a layer's output_begin", output_begin, 0, kMost);
    check_range("a layer's residual_begin", residual_begin, 0, kMost);
    check_geometry(geometry, kLastLayerActivation);
    check_range("a layer's joined_activation", joined_activation, 0, kLastLayerActivation);
    check_range("a layer's multiplies", multiplies, 0, 1);
    STD_TORCH_CHECK(multiplies == 0 || (residual >= 0 && (rows == Rows::kSum || has_weights())),
                    "a layer that multiplies in a chain has a residual, and is a sum or has weights");
    STD_TORCH_CHECK(joined_activation == 0 || rows == Rows::kSum || has_weights(),
                    "no interleaved, pooled or upsampled map in a chain has a joined_activation");
    STD_TORCH_CHECK(rows == Rows::kDepthwiseMap || geometry.activation <= kLastActivation,
                    "of a separable convolution in a chain, activation must be from 0 to ", kLastActivation);
    const bool is_map = rows == Rows::kDepthwiseMap, is_pool = rows == Rows::kMaxPool;
    check_range("a layer's kernel", geometry.kernel, is_pool ? 2 : 3, is_pool ? 13 : is_map ? 11 : 3);
    STD_TORCH_CHECK(is_pool || geometry.kernel % 2 == 1, "a layer's kernel must be odd");
    STD_TORCH_CHECK(!is_map || geometry.pointwise_activation == 0,
                    "a depthwise convolution alone in a chain has one activation");
    STD_TORCH_CHECK(has_weights() || (geometry.activation == 0 && geometry.pointwise_activation == 0),
                    "a layer without weights in a chain has no activation");
    STD_TORCH_CHECK(!is_pool || (geometry.dilation == 1 && residual < 0 &&
                                 std::max({geometry.pad_top, geometry.pad_bottom, geometry.pad_left,
                                           geometry.pad_right}) <= geometry.kernel / 2),
                    "a max pool in a chain has dilation 1, padding of half its kernel at most, and no residual");
  }

  bool combines() const { return rows == Rows::kSum || rows == Rows::kInterleaved; }
  bool has_weights() const { return !combines() && rows != Rows::kMaxPool && rows != Rows::kUpsample; }
};

// A map of a chain, as far as layers have written it.
struct ChainMap {
  int64_t channels = 0, height = 0, width = 0;      // channels: those that it has in the end
  int64_t begin = 0, end = 0;                       // those that are written
  std::vector<std::array<int64_t, 2>> others = {};  // more ranges of such; most maps have none, and allocate nothing

  bool is_empty() const { return begin == end; }
  void write(int64_t from, int64_t to) {
    if (is_empty()) {
      begin = from;
      end = to;
    } else if (from == end) {
      end = to;
    } else {
      others.push_back({from, to});
    }
  }
  bool holds(int64_t from, int64_t to) const {
    for (bool more = true; more && from < to;) {
      const int64_t before = from;
      if (begin <= from && from < end) from = end;
      for (const auto& range : others) {
        if (range[0] <= from && from < range[1]) from = range[1];
      }
      more = from > before;
    }
    return from >= to;
  }
  bool overlaps(int64_t from, int64_t to) const {
    return (begin < to && from < end) || std::any_of(others.begin(), others.end(), [&](const auto& range) {
             return range[0] < to && from < range[1];
           });
  }
};

// The layers that numbers describe, and their maps: 0 is x, i the one that layer i - 1 writes, alone or with others.
template <typename T>
class ChainReader {
 public:
  ChainReader(const SeparableKernels<T>& kernels, const Isa& isa, const Tensor& x, const Tensor& packed,
              const std::vector<int64_t>& numbers)
      : kernels_(kernels), isa_(isa), packed_(packed), batch_(x.size(0)) {
    numbers_.reserve(numbers.size() / kNumbersPerLayer);
    layers_.reserve(numbers.size() / kNumbersPerLayer);
    for (size_t i = 0; i < numbers.size(); i += kNumbersPerLayer) numbers_.emplace_back(numbers.data() + i);
    reads_nchw_ = numbers_.front().rows == Rows::kPatchesOfNchw;
    maps_.resize(numbers_.size() + 1);
    maps_[0] = {x.size(1), x.size(2), x.size(3), 0, x.size(1)};
    for (size_t i = 0; i < numbers_.size(); ++i) {
      check_range("a layer's output", numbers_[i].output, -1, int64_t(i) + 1);
      STD_TORCH_CHECK(numbers_[i].output != 0, "a layer cannot write to the input");
      ChainMap& map = maps_[size_t(output_of(i))];
      map.channels = std::max(map.channels, numbers_[i].output_begin + numbers_[i].out_channels);
    }
    for (size_t i = 0; i < numbers_.size(); ++i) read(i);
    STD_TORCH_CHECK(offset_ == packed.size(0), "packed must hold the weights of the layers and nothing else");
    STD_TORCH_CHECK(output().holds(0, output().channels), "the layers must write all channels of the output");
  }

  const std::vector<Layer<T>>& layers() const { return layers_; }
  const ChainMap& output() const { return maps_[size_t(layers_.back().output.map)]; }

 private:
  int64_t output_of(size_t i) const { return numbers_[i].output < 0 ? int64_t(i) + 1 : numbers_[i].output; }

  // Channels of a map that is there already.
  const ChainMap& checked(size_t i, const Span& span, int64_t channels) const {
    const ChainMap& map = maps_[size_t(span.map)];
    STD_TORCH_CHECK(!reads_nchw_ || span.map != 0 || i == 0, "only the first layer of a chain reads an input in NCHW");
    STD_TORCH_CHECK(map.holds(span.begin, span.begin + channels), "layer ", i, " reads channels ", span.begin, " to ",
                    span.begin + channels, " of map ", span.map, ", which no layer in front of it has written");
    return map;
  }

  // Where the layer finds its map: by default what the layer in front of it writes.
  void read_input(size_t i, Layer<T>& layer) {
    const LayerNumbers& n = numbers_[i];
    const int64_t last_map = int64_t(i);
    check_range("a layer's input", n.input, -1, last_map);
    check_range("a layer's gated", n.gated, -1, last_map - 1);
    Span front{0, 0};
    int64_t front_channels = maps_[0].channels;
    if (i > 0) {
      front = layers_[i - 1].output;
      front_channels = layers_[i - 1].params.out_channels;
    }
    SeparableParams<T>& params = layer.params;
    int64_t channels = front_channels;
    layer.input = front;
    if (n.gated >= 0) {
      STD_TORCH_CHECK(n.rows == Rows::kPixels || (n.rows == Rows::kSum && n.residual < 0),
                      "a layer with a gated map must be a 1x1 convolution, or a sum without a residual");
      STD_TORCH_CHECK(n.input < 0, "a layer with a gated map reads that map");
      STD_TORCH_CHECK(n.gated != 0 || !reads_nchw_, "an input in NCHW cannot be gated");
      const ChainMap &gate = maps_[size_t(front.map)], &map = maps_[size_t(n.gated)];
      const int64_t wanted = n.in_channels > 0 ? n.in_channels : map.channels - n.input_begin;
      STD_TORCH_CHECK(
          gate.height == 1 && gate.width == 1 && gate.channels == front_channels && wanted == front_channels,
          "what stands in front of a layer with a gated map must give a factor for each of its channels");
      layer.gate = front;
      layer.input = {n.gated, n.input_begin};
    } else if (n.input >= 0) {
      layer.input = {n.input, n.input_begin};
      channels = n.in_channels > 0 ? n.in_channels : maps_[size_t(n.input)].channels - n.input_begin;
      check_range("a layer's in_channels", channels, 1, maps_[size_t(n.input)].channels);
    }
    const ChainMap& map = checked(i, layer.input, channels);
    params.x_pitch = map.channels;
    params.in_channels = reads_patches(params) ? 9 * channels : channels;
    params.height = map.height;
    params.width = map.width;
  }

  void read_sizes(const LayerNumbers& n, SeparableParams<T>& params) const {
    const Geometry& g = n.geometry;
    params.out_height = params.height;
    params.out_width = params.width;
    if (n.rows == Rows::kMeans) {
      STD_TORCH_CHECK(params.height > 0 && params.width > 0, "x is too small: a map without a pixel has no mean");
      params.out_height = params.out_width = 1;
    } else if (n.rows == Rows::kPixels || n.rows == Rows::kNormalizedPixels || n.rows == Rows::kUpsample ||
               n.combines()) {
      STD_TORCH_CHECK(params.height > 0 && params.width > 0, "x is too small: it has no pixel");
      STD_TORCH_CHECK(g.stride == 1 || n.rows == Rows::kPixels,
                      "maps that are normalized, combined or upsampled in a chain have no stride");
      STD_TORCH_CHECK(g.pad_top == 0 && g.pad_bottom == 0 && g.pad_left == 0 && g.pad_right == 0,
                      "a 1x1 convolution in a chain has no padding");
      params.out_height = (params.height + g.stride - 1) / g.stride;
      params.out_width = (params.width + g.stride - 1) / g.stride;
      if (n.rows == Rows::kUpsample) {
        params.out_height *= 2;
        params.out_width *= 2;
      }
    } else {
      params.out_height = output_size("height", params.height, g.pad_top, g.pad_bottom, g);
      params.out_width = output_size("width", params.width, g.pad_left, g.pad_right, g);
    }
    STD_TORCH_CHECK(n.rows != Rows::kDepthwiseMap || params.out_channels == params.in_channels,
                    "a depthwise convolution alone has as many output channels as input channels");
    const bool keeps_channels = n.rows == Rows::kSum || n.rows == Rows::kMaxPool || n.rows == Rows::kUpsample;
    STD_TORCH_CHECK(!keeps_channels || params.out_channels == params.in_channels,
                    "a sum, a max pool or an upsampled map has as many channels as what it reads");
    STD_TORCH_CHECK(n.rows != Rows::kInterleaved || params.out_channels == 2 * params.in_channels,
                    "maps that are interleaved give twice as many channels");
    element_count(batch_, params.out_channels, params.out_height, params.out_width);
    element_count(batch_, params.in_channels, params.height, params.width);
  }

  void read_weights(size_t i, SeparableParams<T>& params) {
    if (!numbers_[i].has_weights()) return;
    constexpr int64_t kHeaderSize = int64_t(sizeof(PackedHeader) / sizeof(T));
    const T* const weights = packed_.const_data_ptr<T>() + offset_;
    const bool is_map = params.rows == Rows::kDepthwiseMap;
    const PackedHeader header(isa_, params.in_channels, is_map ? 0 : params.out_channels, true, sizeof(T),
                              params.kernel);
    const int64_t size = kHeaderSize + (is_map ? kernels_.depthwise_map_packed_size(params.in_channels, params.kernel)
                                               : kernels_.packed_size(params.in_channels, params.out_channels, true));
    STD_TORCH_CHECK(size <= packed_.size(0) - offset_ && std::memcmp(weights, &header, sizeof(header)) == 0,
                    "packed must hold the weights of layer ", i, ", packed for isa ", isa_.name, ", ",
                    params.in_channels, " -> ", params.out_channels, " channels in channels_last; pack them again");
    params.packed = weights + kHeaderSize;
    offset_ += size;
  }

  void write_output(size_t i, Layer<T>& layer) {
    const SeparableParams<T>& params = layer.params;
    layer.output = {output_of(i), numbers_[i].output_begin};
    ChainMap& map = maps_[size_t(layer.output.map)];
    const int64_t begin = layer.output.begin, end = begin + params.out_channels;
    STD_TORCH_CHECK(map.is_empty() || (map.height == params.out_height && map.width == params.out_width),
                    "layers that write one map must give the same height and width");
    STD_TORCH_CHECK(!map.overlaps(begin, end), "layer ", i, " writes what another layer has written");
    map.height = params.out_height;
    map.width = params.out_width;
    map.write(begin, end);
    layer.params.y_pitch = map.channels;
  }

  void read_residual(size_t i, Layer<T>& layer) const {
    const LayerNumbers& n = numbers_[i];
    check_range("a layer's residual", n.residual, -1, int64_t(i));
    STD_TORCH_CHECK(n.residual >= 0 || n.rows != Rows::kInterleaved, "a map is interleaved with a second one");
    if (n.residual < 0) return;
    STD_TORCH_CHECK(n.rows != Rows::kMeans, "the means of a chain cannot have a residual");
    STD_TORCH_CHECK(n.residual != 0 || !reads_nchw_, "an input in NCHW cannot be a residual");
    layer.residual = {n.residual, n.residual_begin};
    const int64_t channels = n.rows == Rows::kInterleaved ? layer.params.in_channels : layer.params.out_channels;
    const ChainMap& map = maps_[size_t(n.residual)];
    STD_TORCH_CHECK(map.height == layer.params.out_height && map.width == layer.params.out_width &&
                        channels <= map.channels - n.residual_begin,
                    "the residual of a layer must be a map of the same shape");
    checked(i, layer.residual, channels);
    layer.params.residual_pitch = map.channels;
  }

  void read(size_t i) {
    const LayerNumbers& n = numbers_[i];
    STD_TORCH_CHECK(n.rows != Rows::kPatchesOfNchw || i == 0, "only the first layer of a chain can read NCHW");
    Layer<T> layer{};
    SeparableParams<T>& params = layer.params;
    params.rows = n.rows;
    params.kernel = n.geometry.kernel;
    params.stride = n.geometry.stride;
    params.dilation = n.geometry.dilation;
    params.pad_top = n.geometry.pad_top;
    params.pad_left = n.geometry.pad_left;
    params.channels_last = true;
    params.activation = Activation(n.geometry.activation);
    params.pointwise_activation = Activation(n.geometry.pointwise_activation);
    params.joined_activation = Activation(n.joined_activation);
    params.multiplies = n.multiplies != 0;
    params.out_channels = n.out_channels;
    read_input(i, layer);
    read_sizes(n, params);
    read_weights(i, params);
    read_residual(i, layer);
    write_output(i, layer);
    layers_.push_back(layer);
  }

  const SeparableKernels<T>& kernels_;
  const Isa& isa_;
  const Tensor& packed_;
  int64_t batch_, offset_ = 0;  // offset: of the next weights
  bool reads_nchw_ = false;
  std::vector<LayerNumbers> numbers_;
  std::vector<ChainMap> maps_;
  std::vector<Layer<T>> layers_;
};

template <typename T>
Tensor chain_as(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& numbers, bool channels_last) {
  const Isa& isa = active_isa();
  const auto& kernels = isa.separable<T>();
  const ChainReader<T> chain(kernels, isa, x, packed, numbers);
  const int64_t batch = x.size(0);
  const ChainMap& output = chain.output();
  const bool reads_nchw = chain.layers().front().params.rows == Rows::kPatchesOfNchw;
  const std::array<int64_t, 4> in_sizes{batch, x.size(1), x.size(2), x.size(3)};
  // What the first layer reads as it lies, be it NCHW, stays so.
  const Incoming<T> own_x(x, in_sizes, reads_nchw || is_dense(x, in_sizes, true), true);
  const ChainRunner<T> runner(kernels, chain.layers());
  const int64_t threads = torch::stable::get_num_threads();
  if (chain.layers().back().params.rows == Rows::kMeans) {
    Tensor y = empty_strided<2>({batch, output.channels}, {output.channels, 1}, x.scalar_type());
    runner.run(own_x.data(), y.mutable_data_ptr<T>(), batch, threads, TorchParallelFor());
    return y;
  }
  Outgoing<T> y({batch, output.channels, output.height, output.width}, channels_last, true);
  runner.run(own_x.data(), y.data(), batch, threads, TorchParallelFor());
  return y.map();
}

// Whole numbers, each behind the other with one character between them.
std::vector<int64_t> read_numbers(const std::string& text) {
  std::vector<int64_t> numbers;
  numbers.reserve(text.size() / 2 + 1);
  const char* at = text.data();
  const char* const end = at + text.size();
  while (at < end) {
    int64_t number = 0;
    const auto [behind, error] = std::from_chars(at, end, number);
    STD_TORCH_CHECK(error == std::errc(), "layers must be numbers, got '",
                    std::string(at, size_t(std::min<ptrdiff_t>(end - at, 20))), "'");
    numbers.push_back(number);
    at = behind + 1;
  }
  return numbers;
}

Tensor chain(const Tensor& x, const Tensor& packed, const std::string& text, bool channels_last) {
  const std::vector<int64_t> layers = read_numbers(text);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) >= 1 && x.size(1) < (int64_t(1) << 40) && x.is_cpu(),
                  "x must be a CPU tensor of shape [N, C, H, W]");
  STD_TORCH_CHECK(!layers.empty() && layers.size() % kNumbersPerLayer == 0, "layers must be a multiple of ",
                  kNumbersPerLayer, " numbers, got ", layers.size());
  const std::array<int64_t, 4> sizes{x.size(0), x.size(1), x.size(2), x.size(3)};
  const bool is_nchw = is_dense(x, sizes, false), reads_nchw = layers[0] == int64_t(Rows::kPatchesOfNchw);
  STD_TORCH_CHECK(is_nchw || (!reads_nchw && is_dense(x, sizes, true)), "x must be contiguous in NCHW",
                  reads_nchw ? "" : " or in channels_last", " memory format");
  STD_TORCH_CHECK(
      packed.dim() == 1 && packed.is_contiguous() && packed.is_cpu() && packed.scalar_type() == x.scalar_type(),
      "packed must be what fusedsep::pack returned, concatenated, of the dtype of x");
  if (x.scalar_type() == ScalarType::Float) return chain_as<float>(x, packed, layers, channels_last);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double, "x must be float32 or float64");
  return chain_as<double>(x, packed, layers, channels_last);
}

}  // namespace
}  // namespace fusedsep

// `layers` is text, since a list of so many numbers would cost more to hand over at each call than to read here: lines
// of 21 numbers with spaces between them: rows (csrc/kernels/separable.h), out_channels, stride, dilation, pad_left,
// pad_right, pad_top, pad_bottom, activation, pointwise_activation, residual, kernel, gated, input, input_begin,
// in_channels, output, output_begin, residual_begin, joined_activation, multiplies.
//
// Maps have numbers: 0 is x, i that of layer i - 1. A layer reads `in_channels` channels (0: all that follow) of map
// `input` from `input_begin` on; -1 for what the layer in front of it writes. It writes a map of its own if `output` is
// -1, and to channels of map `output` from `output_begin` on otherwise: maps side by side need no copy. `residual` is
// the map whose channels from `residual_begin` on are added to what the layer gives, or that are interleaved with it,
// or that it is multiplied by if `multiplies` is 1; -1 for none; `joined_activation` follows on the sum, or on what
// there is without one. `gated` stands in the place of `input` where a 1x1 convolution, or a sum of one map, reads that
// map times what the layer in front of it gives for each channel; -1 for no such. The last layer writes the output.
// `packed` is what `pack`, or `pack_depthwise`, returned for each layer that has weights, in channels_last, one after
// the other.
//
// x is dense in either memory format, and in NCHW if the first layer reads that. A map is given in channels_last, or in
// NCHW.
STABLE_TORCH_LIBRARY_FRAGMENT(fusedsep, m) {
  m.def("chain(Tensor x, Tensor packed, str layers, bool channels_last=True) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fusedsep, CPU, m) { m.impl("chain", TORCH_BOX(&fusedsep::chain)); }
