// SPDX-License-Identifier: BSD-3-Clause
//
// Training of a depthwise convolution of 3x3, 5x5 or 7x7 taps, its BN and its activation, in LibTorch's stable ABI:
// where no pointwise convolution follows at once, or where the taps are more than nine.
#include <torch/csrc/stable/library.h>

#include "convolution_training_call.h"

namespace fusedsep {
namespace {

// The geometry of one call of the depthwise convolution, from tensors that were checked. It runs in channels_last;
// `channels_last` is the format of x and y.
struct DepthwiseCall {
  std::array<int64_t, 4> in_sizes, out_sizes;
  Geometry geometry;
  bool channels_last;

  DepthwiseCall(const Tensor& x, const ConvolutionModules& m, const Geometry& g, bool channels_last, bool in_backward)
      : geometry(g), channels_last(channels_last) {
    check_geometry(g, kLastTrainedActivation);
    check_range("dilation", g.dilation, 1, 1);
    check_input(x, channels_last, in_backward);
    in_sizes = sizes_of(x);
    const auto [batch, channels, height, width] = in_sizes;
    const Tensor& weight = m.weight;
    STD_TORCH_CHECK(
        weight.dim() == 4 && weight.size(0) == channels && weight.size(1) == 1 && weight.size(2) == weight.size(3) &&
            weight.size(2) % 2 == 1 && weight.size(2) >= 3 && weight.size(2) <= 7 && weight.is_contiguous() &&
            weight.is_cpu() && weight.scalar_type() == x.scalar_type(),
        "weight must be a contiguous CPU tensor of shape [", channels, ", 1, k, k], k = 3, 5 or 7, and the dtype of x");
    geometry.kernel = weight.size(2);
    m.check(x.scalar_type(), g.activation, in_backward);
    out_sizes = {batch, channels, output_size("height", height, g.pad_top, g.pad_bottom, geometry),
                 output_size("width", width, g.pad_left, g.pad_right, geometry)};
    element_count(batch, channels, out_sizes[2], out_sizes[3]);
  }
  double count() const { return double(out_sizes[0]) * double(out_sizes[2]) * double(out_sizes[3]); }

  template <typename T>
  TrainingParams<T> params(const Tensor& p) const {
    TrainingParams<T> params = params_of_product<T>(p, geometry.activation, true);
    SeparableParams<T>& conv = params.conv;
    conv.height = in_sizes[2];
    conv.width = in_sizes[3];
    conv.stride = geometry.stride;
    conv.dilation = 1;
    conv.pad_top = geometry.pad_top;
    conv.pad_left = geometry.pad_left;
    conv.rows = Rows::kDepthwiseMap;
    conv.kernel = geometry.kernel;
    return params;
  }
};

Five depthwise_conv2d_training(const Tensor& x, const Tensor& weight, const Vector& bias, const Vector& bn_weight,
                               const Vector& bn_bias, const Vector& bn_mean, const Vector& bn_var, int64_t bn_mode,
                               double bn_eps, int64_t stride, int64_t dilation, int64_t pad_left, int64_t pad_right,
                               int64_t pad_top, int64_t pad_bottom, int64_t activation, bool channels_last) {
  const ConvolutionModules modules{weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_mode, bn_eps};
  const DepthwiseCall call(x, modules, {stride, dilation, pad_left, pad_right, pad_top, pad_bottom, activation, 0},
                           channels_last, false);
  return dispatch(x, [&](auto zero) -> Five {
    using T = decltype(zero);
    const Incoming<T> own_x(x, call.in_sizes, channels_last, true);
    Tensor p = empty_map(call.out_sizes, true, x.scalar_type());
    Outgoing<T> y(call.out_sizes, channels_last, true);
    Norm<T> norm = modules.norm<T>();
    auto run = run_of(call.params<T>(p));
    run.params.conv.x = own_x.data();
    run.pack_taps(weight.const_data_ptr<T>(), false);
    return forward_outputs(run, norm, modules, p, y, activation,
                           [&](double* mean, double* variance) { run.depthwise_map_forward(mean, variance); });
  });
}

Five depthwise_conv2d_training_backward(const Tensor& grad_y, const Tensor& x, const Vector& x_normalization,
                                        const Tensor& p, const Tensor& weight, const Vector& bias,
                                        const Vector& bn_weight, const Vector& bn_bias, const Vector& bn_mean,
                                        const Vector& bn_var, int64_t bn_mode, double bn_eps, int64_t stride,
                                        int64_t dilation, int64_t pad_left, int64_t pad_right, int64_t pad_top,
                                        int64_t pad_bottom, int64_t activation, bool channels_last, int64_t wanted) {
  const ConvolutionModules modules{weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_mode, bn_eps};
  const DepthwiseCall call(x, modules, {stride, dilation, pad_left, pad_right, pad_top, pad_bottom, activation, 0},
                           channels_last, true);
  const ScalarType dtype = x.scalar_type();
  check_map("grad_y", grad_y, call.out_sizes, dtype);
  check_map("p", p, call.out_sizes, dtype);
  return dispatch(x, [&](auto zero) -> Five {
    using T = decltype(zero);
    const KeptInput<T> own_x(x, x_normalization, call.in_sizes, true);
    const Tensor own_p = dense(p, call.out_sizes, true);
    const Tensor dense_grad_y = dense(grad_y, call.out_sizes, channels_last);
    const Incoming<T> own_grad_y(dense_grad_y, call.out_sizes, channels_last, true);
    Norm<T> norm = modules.norm_in_backward<T>();
    auto run = run_of(call.params<T>(own_p));
    own_x.set(run.params);
    run.params.grad_y = own_grad_y.data();
    return backward_outputs(run, norm, call, weight, channels_last, true, wanted, [&](T* grad_x, T* grad_weight) {
      run.params.grad_x = grad_x;
      run.pack_taps(weight.const_data_ptr<T>(), true);
      run.depthwise_backward(grad_weight);
    });
  });
}

}  // namespace
}  // namespace fusedsep

// Modes of the BN and bits of `wanted` as in training_ops.cpp.
STABLE_TORCH_LIBRARY_FRAGMENT(fusedsep, m) {
  m.def("depthwise_conv2d_training(Tensor x, " FUSEDSEP_CONVOLUTION FUSEDSEP_GEOMETRY
        "int activation, bool channels_last) -> (Tensor y, Tensor p, Tensor mean, Tensor var, Tensor normalization)");
  m.def(
      "depthwise_conv2d_training_backward(Tensor grad_y, Tensor x, Tensor? x_normalization, Tensor "
      "p, " FUSEDSEP_CONVOLUTION FUSEDSEP_GEOMETRY
      "int activation, bool channels_last, int wanted) -> (Tensor grad_x, "
      "Tensor grad_weight, Tensor grad_bias, Tensor grad_bn_weight, Tensor grad_bn_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(fusedsep, CPU, m) {
  m.impl("depthwise_conv2d_training", TORCH_BOX(&fusedsep::depthwise_conv2d_training));
  m.impl("depthwise_conv2d_training_backward", TORCH_BOX(&fusedsep::depthwise_conv2d_training_backward));
}
