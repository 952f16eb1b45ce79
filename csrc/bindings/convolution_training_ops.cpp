// SPDX-License-Identifier: BSD-3-Clause
//
// Training of one convolution, its BN and its activation, in LibTorch's stable ABI: the second half of training_ops.cpp
// by itself. A pointwise convolution reads its input where the other reads the depthwise map; a 3x3 convolution of few
// channels, the first one of a network, reads the patches of an image.
#include <torch/csrc/stable/library.h>

#include "convolution_training_call.h"

namespace fusedsep {
namespace {

// The geometry of one call, from tensors that were checked.
struct PointwiseCall {
  std::array<int64_t, 4> in_sizes, out_sizes;
  bool channels_last;

  PointwiseCall(const Tensor& x, const ConvolutionModules& m, int64_t activation, bool channels_last, bool in_backward)
      : channels_last(channels_last) {
    check_input(x, channels_last, in_backward);
    in_sizes = sizes_of(x);
    const auto [batch, in_channels, height, width] = in_sizes;
    check_pointwise_weight(in_channels, x.scalar_type(), m.weight);
    const int64_t out_channels = m.weight.size(0);
    m.check(x.scalar_type(), activation, in_backward);
    element_count(batch, std::max(in_channels, out_channels), height, width);
    out_sizes = {batch, out_channels, height, width};
  }
  bool runs_channels_last() const { return fusedsep::runs_channels_last(channels_last, in_sizes[3]); }
  double count() const { return double(in_sizes[0]) * double(in_sizes[2]) * double(in_sizes[3]); }

  // Reading `p`, a map of out_sizes.
  template <typename T>
  TrainingParams<T> params(const Tensor& p, int64_t activation, bool in_channels_last) const {
    TrainingParams<T> params = params_of_product<T>(p, activation, in_channels_last);
    params.conv.in_channels = in_sizes[1];
    return params;
  }
};

template <typename T>
Norm<T> identity(int64_t channels) {
  Norm<T> norm(std::nullopt, std::nullopt, std::nullopt, Statistics::kNone, 0, channels);
  norm.set_statistics(nullptr, nullptr);
  return norm;
}

Five pointwise_conv2d_training(const Tensor& x, const Tensor& weight, const Vector& bias, const Vector& bn_weight,
                               const Vector& bn_bias, const Vector& bn_mean, const Vector& bn_var, int64_t bn_mode,
                               double bn_eps, int64_t activation, bool channels_last) {
  const ConvolutionModules modules{weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_mode, bn_eps};
  const PointwiseCall call(x, modules, activation, channels_last, false);
  return dispatch(x, [&](auto zero) -> Five {
    using T = decltype(zero);
    const bool in_channels_last = call.runs_channels_last();
    const Incoming<T> own_x(x, call.in_sizes, channels_last, in_channels_last);
    Tensor p = empty_map(call.out_sizes, in_channels_last, x.scalar_type());
    Outgoing<T> y(call.out_sizes, channels_last, in_channels_last);
    const Norm<T> same = identity<T>(call.in_sizes[1]);
    Norm<T> norm = modules.norm<T>();
    auto run = run_of(call.params<T>(p, activation, in_channels_last));
    run.params.d = const_cast<T*>(own_x.data());
    run.params.affine1 = same.affine();
    run.pack(nullptr, weight.const_data_ptr<T>(), false);
    return forward_outputs(run, norm, modules, p, y, activation,
                           [&](double* mean, double* variance) { run.forward(mean, variance); });
  });
}

Five pointwise_conv2d_training_backward(const Tensor& grad_y, const Tensor& x, const Vector& x_normalization,
                                        const Tensor& p, const Tensor& weight, const Vector& bias,
                                        const Vector& bn_weight, const Vector& bn_bias, const Vector& bn_mean,
                                        const Vector& bn_var, int64_t bn_mode, double bn_eps, int64_t activation,
                                        bool channels_last, int64_t wanted) {
  const ConvolutionModules modules{weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_mode, bn_eps};
  const PointwiseCall call(x, modules, activation, channels_last, true);
  const ScalarType dtype = x.scalar_type();
  check_map("grad_y", grad_y, call.out_sizes, dtype);
  check_map("p", p, call.out_sizes, dtype);
  return dispatch(x, [&](auto zero) -> Five {
    using T = decltype(zero);
    const bool in_channels_last = call.runs_channels_last();
    const KeptInput<T> own_x(x, x_normalization, call.in_sizes, in_channels_last);
    const Tensor own_p = dense(p, call.out_sizes, in_channels_last);  // whoever kept it may have laid it out anew
    const Tensor dense_grad_y = dense(grad_y, call.out_sizes, channels_last);
    const Incoming<T> own_grad_y(dense_grad_y, call.out_sizes, channels_last, in_channels_last);
    const Norm<T> same = identity<T>(call.in_sizes[1]);
    Norm<T> norm = modules.norm_in_backward<T>();
    auto run = run_of(call.params<T>(own_p, activation, in_channels_last));
    own_x.set_as_d(run.params, same.affine());
    run.params.grad_y = own_grad_y.data();
    return backward_outputs(run, norm, call, weight, channels_last, in_channels_last, wanted,
                            [&](T* grad_x, T* grad_weight) {
                              run.params.g1 = grad_x;
                              run.pack(nullptr, weight.const_data_ptr<T>(), true);
                              run.pointwise_backward(nullptr, nullptr, grad_weight);
                            });
  });
}

// The geometry of one call of the 3x3 convolution, from tensors that were checked. `channels_last` is the format of y;
// p is always channels_last.
struct PatchesCall {
  std::array<int64_t, 4> in_sizes, out_sizes;
  Geometry geometry;
  Rows rows;

  PatchesCall(const Tensor& x, const ConvolutionModules& m, const Geometry& g, bool in_backward) : geometry(g) {
    check_geometry(g, kLastTrainedActivation);
    check_input(x, false, true);
    in_sizes = sizes_of(x);
    const auto [batch, in_channels, height, width] = in_sizes;
    rows = is_dense(x, in_sizes, false) ? Rows::kPatchesOfNchw : Rows::kPatches;
    STD_TORCH_CHECK(rows == Rows::kPatchesOfNchw || is_dense(x, in_sizes, true),
                    "x must be contiguous in NCHW or channels_last memory format");
    STD_TORCH_CHECK(m.weight.dim() == 4 && m.weight.size(0) >= 1 && m.weight.size(1) == in_channels &&
                        m.weight.size(2) == 3 && m.weight.size(3) == 3 && m.weight.is_contiguous() &&
                        m.weight.is_cpu() && m.weight.scalar_type() == x.scalar_type(),
                    "weight must be a contiguous CPU tensor of shape [N, ", in_channels, ", 3, 3] and the dtype of x");
    m.check(x.scalar_type(), g.activation, in_backward);
    const int64_t out_height = output_size("height", height, g.pad_top, g.pad_bottom, g);
    const int64_t out_width = output_size("width", width, g.pad_left, g.pad_right, g);
    out_sizes = {batch, m.weight.size(0), out_height, out_width};
    element_count(batch, std::max(9 * in_channels, out_sizes[1]), out_height, out_width);
  }
  int64_t depth() const { return 9 * in_sizes[1]; }
  double count() const { return double(out_sizes[0]) * double(out_sizes[2]) * double(out_sizes[3]); }

  template <typename T>
  TrainingParams<T> params(const Tensor& x, const Tensor& p) const {
    TrainingParams<T> params = params_of_product<T>(p, geometry.activation, true);
    SeparableParams<T>& conv = params.conv;
    conv.x = x.const_data_ptr<T>();
    conv.in_channels = depth();
    conv.height = in_sizes[2];
    conv.width = in_sizes[3];
    conv.stride = geometry.stride;
    conv.dilation = geometry.dilation;
    conv.pad_top = geometry.pad_top;
    conv.pad_left = geometry.pad_left;
    conv.rows = rows;
    return params;
  }
  // Weights [N][C][3][3] as [N][k], in the order that `rows` numbers the taps in, or back.
  template <typename T>
  void reorder(const T* from, bool back, T* to) const {
    const int64_t channels = in_sizes[1];
    for (int64_t o = 0; o < out_sizes[1]; ++o) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t tap = 0; tap < 9; ++tap) {
          const int64_t own = o * depth() + c * 9 + tap;
          const int64_t k = rows == Rows::kPatchesOfNchw ? own : o * depth() + tap * channels + c;
          to[back ? own : k] = from[back ? k : own];
        }
      }
    }
  }
};

Five conv2d_training(const Tensor& x, const Tensor& weight, const Vector& bias, const Vector& bn_weight,
                     const Vector& bn_bias, const Vector& bn_mean, const Vector& bn_var, int64_t bn_mode, double bn_eps,
                     int64_t stride, int64_t dilation, int64_t pad_left, int64_t pad_right, int64_t pad_top,
                     int64_t pad_bottom, int64_t activation, bool channels_last) {
  const ConvolutionModules modules{weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_mode, bn_eps};
  const PatchesCall call(x, modules, {stride, dilation, pad_left, pad_right, pad_top, pad_bottom, activation, 0},
                         false);
  return dispatch(x, [&](auto zero) -> Five {
    using T = decltype(zero);
    Tensor p = empty_map(call.out_sizes, true, x.scalar_type());
    Outgoing<T> y(call.out_sizes, channels_last, true);
    Norm<T> norm = modules.norm<T>();
    auto run = run_of(call.params<T>(x, p));
    std::vector<T> rows(size_t(weight.numel()));
    call.reorder(weight.const_data_ptr<T>(), false, rows.data());
    run.pack(nullptr, rows.data(), false);
    return forward_outputs(run, norm, modules, p, y, activation,
                           [&](double* mean, double* variance) { run.forward(mean, variance); });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv2d_training_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& p, const Tensor& weight, const Vector& bias,
    const Vector& bn_weight, const Vector& bn_bias, const Vector& bn_mean, const Vector& bn_var, int64_t bn_mode,
    double bn_eps, int64_t stride, int64_t dilation, int64_t pad_left, int64_t pad_right, int64_t pad_top,
    int64_t pad_bottom, int64_t activation, bool channels_last, int64_t wanted) {
  const ConvolutionModules modules{weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_mode, bn_eps};
  const PatchesCall call(x, modules, {stride, dilation, pad_left, pad_right, pad_top, pad_bottom, activation, 0}, true);
  const ScalarType dtype = x.scalar_type();
  check_map("grad_y", grad_y, call.out_sizes, dtype);
  check_map("p", p, call.out_sizes, dtype);
  return dispatch(x, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    const Tensor own_p = dense(p, call.out_sizes, true);
    const Tensor dense_grad_y = dense(grad_y, call.out_sizes, channels_last);
    const Incoming<T> own_grad_y(dense_grad_y, call.out_sizes, channels_last, true);
    Norm<T> norm = modules.norm_in_backward<T>();
    auto run = run_of(call.params<T>(x, own_p));
    run.params.grad_y = own_grad_y.data();
    const auto [_, grad_weight, grad_bias, grad_bn_weight, grad_bn_bias] =
        backward_outputs(run, norm, call, weight, channels_last, true, wanted << kGradWeight, [&](T*, T* grad_weight) {
          std::vector<T> rows(size_t(weight.numel()));
          run.convolution_backward(rows.data());
          call.reorder(rows.data(), true, grad_weight);
        });
    return {grad_weight, grad_bias, grad_bn_weight, grad_bn_bias};
  });
}

}  // namespace
}  // namespace fusedsep

// Modes of the BN and bits of `wanted` as in training_ops.cpp.
STABLE_TORCH_LIBRARY_FRAGMENT(fusedsep, m) {
  m.def("pointwise_conv2d_training(Tensor x, " FUSEDSEP_CONVOLUTION
        "int activation, bool channels_last) -> (Tensor y, Tensor p, Tensor mean, Tensor var, Tensor normalization)");
  m.def(
      "pointwise_conv2d_training_backward(Tensor grad_y, Tensor x, Tensor? x_normalization, Tensor "
      "p, " FUSEDSEP_CONVOLUTION
      "int activation, bool channels_last, int wanted) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, "
      "Tensor grad_bn_weight, Tensor grad_bn_bias)");
  m.def("conv2d_training(Tensor x, " FUSEDSEP_CONVOLUTION FUSEDSEP_GEOMETRY
        "int activation, bool channels_last) -> (Tensor y, Tensor p, Tensor mean, Tensor var, Tensor normalization)");
  m.def("conv2d_training_backward(Tensor grad_y, Tensor x, Tensor p, " FUSEDSEP_CONVOLUTION FUSEDSEP_GEOMETRY
        "int activation, bool channels_last, int wanted) -> (Tensor grad_weight, Tensor grad_bias, "
        "Tensor grad_bn_weight, Tensor grad_bn_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(fusedsep, CPU, m) {
  m.impl("pointwise_conv2d_training", TORCH_BOX(&fusedsep::pointwise_conv2d_training));
  m.impl("pointwise_conv2d_training_backward", TORCH_BOX(&fusedsep::pointwise_conv2d_training_backward));
  m.impl("conv2d_training", TORCH_BOX(&fusedsep::conv2d_training));
  m.impl("conv2d_training_backward", TORCH_BOX(&fusedsep::conv2d_training_backward));
}
