// SPDX-License-Identifier: BSD-3-Clause
//
// Training of one convolution, its BN and its activation, in LibTorch's stable ABI: the second half of training_ops.cpp
// by itself. A pointwise convolution reads its input where the other reads the depthwise map; a 3x3 convolution of few
// channels, the first one of a network, reads the patches of an image.
#include <torch/csrc/stable/library.h>

#include "training_call.h"

namespace fusedsep {
namespace {

// The arguments that stand for the two modules.
struct ConvolutionModules {
  const Tensor& weight;
  const Vector &bias, &bn_weight, &bn_bias, &bn_mean, &bn_var;
  int64_t bn_mode;
  double bn_eps;

  template <typename T>
  Norm<T> norm() const {
    return {bias, bn_weight, bn_bias, Statistics(bn_mode), bn_eps, weight.size(0)};
  }
  // With the statistics that y was normalized with.
  template <typename T>
  Norm<T> norm_in_backward() const {
    Norm<T> result = norm<T>();
    result.set_statistics(bn_mode == 0 ? nullptr : bn_mean->const_data_ptr<T>(),
                          bn_mode == 0 ? nullptr : bn_var->const_data_ptr<T>());
    return result;
  }
  // Besides `weight`.
  void check(ScalarType dtype, int64_t activation, bool in_backward) const {
    check_norm("bn", weight.size(0), bn_weight, bn_bias, bn_mean, bn_var, bn_mode, dtype, in_backward);
    check_vector("bias", bias, weight.size(0), dtype, Place::cpu());
    check_range("activation", activation, 0, 3);
  }
};

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// What the operators return, when the params of `run` have all that makes p and where y goes.
template <typename T, class Run>
Five forward_outputs(Run& run, Norm<T>& norm, const ConvolutionModules& m, const Tensor& p, Outgoing<T>& y,
                     int64_t activation) {
  const int64_t channels = p.size(1);
  const auto [mean, var] = take_statistics(norm, channels, m.bn_mean, m.bn_var,
                                           [&](double* mean, double* variance) { run.forward(mean, variance); });
  run.params.affine2 = norm.affine();
  run.params.y = y.data();
  run.normalize();
  return {y.map(), p, mean, var, normalization_of(norm, channels, activation)};
}

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
    return forward_outputs(run, norm, modules, p, y, activation);
  });
}

// Bits of `wanted`, and places in the results.
enum { kGradX, kGradWeight, kGradBias, kGradBnWeight, kGradBnBias };

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
  const auto wants = [wanted](int i) { return (wanted >> i & 1) != 0; };

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
    run.params.affine2 = norm.affine();

    Channels sum(size_t(norm.padded())), moment(sum.size());
    run.normalize_backward_reduce(sum.data(), moment.data());
    run.params.correction2 = norm.correction(sum, moment, call.count());

    Tensor grad_x = nothing(dtype), grad_weight = nothing(dtype);
    if (wants(kGradX) || wants(kGradWeight)) {
      std::optional<Outgoing<T>> own_grad_x;
      if (wants(kGradX)) own_grad_x.emplace(call.in_sizes, channels_last, in_channels_last);
      if (wants(kGradWeight)) grad_weight = empty_map(sizes_of(weight), false, dtype);
      run.params.g1 = wants(kGradX) ? own_grad_x->data() : nullptr;
      run.pack(nullptr, weight.const_data_ptr<T>(), true);
      run.pointwise_backward(nullptr, nullptr, wants(kGradWeight) ? grad_weight.mutable_data_ptr<T>() : nullptr);
      if (wants(kGradX)) grad_x = own_grad_x->map();
    }
    return {grad_x, grad_weight, wants(kGradBias) ? norm.grad_bias(sum) : nothing(dtype),
            wants(kGradBnWeight) ? norm.grad_weight(moment) : nothing(dtype),
            wants(kGradBnBias) ? norm.grad_shift(sum) : nothing(dtype)};
  });
}

// The geometry of one call of the 3x3 convolution, from tensors that were checked. `channels_last` is the format of y;
// p is always channels_last.
struct PatchesCall {
  std::array<int64_t, 4> in_sizes, out_sizes;
  Geometry geometry;
  Rows rows;

  PatchesCall(const Tensor& x, const ConvolutionModules& m, const Geometry& g, bool in_backward) : geometry(g) {
    check_geometry(g);
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
    return forward_outputs(run, norm, modules, p, y, activation);
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
  const auto wants = [wanted](int i) { return (wanted >> (i - 1) & 1) != 0; };  // there is no grad_x

  return dispatch(x, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    const Tensor own_p = dense(p, call.out_sizes, true);
    const Tensor dense_grad_y = dense(grad_y, call.out_sizes, channels_last);
    const Incoming<T> own_grad_y(dense_grad_y, call.out_sizes, channels_last, true);
    Norm<T> norm = modules.norm_in_backward<T>();
    auto run = run_of(call.params<T>(x, own_p));
    run.params.grad_y = own_grad_y.data();
    run.params.affine2 = norm.affine();

    Channels sum(size_t(norm.padded())), moment(sum.size());
    run.normalize_backward_reduce(sum.data(), moment.data());
    run.params.correction2 = norm.correction(sum, moment, call.count());

    Tensor grad_weight = nothing(dtype);
    if (wants(kGradWeight)) {
      grad_weight = empty_map(sizes_of(weight), false, dtype);
      std::vector<T> rows(size_t(weight.numel()));
      run.convolution_backward(rows.data());
      call.reorder(rows.data(), true, grad_weight.mutable_data_ptr<T>());
    }
    return {grad_weight, wants(kGradBias) ? norm.grad_bias(sum) : nothing(dtype),
            wants(kGradBnWeight) ? norm.grad_weight(moment) : nothing(dtype),
            wants(kGradBnBias) ? norm.grad_shift(sum) : nothing(dtype)};
  });
}

}  // namespace
}  // namespace fusedsep

// Modes of the BN and bits of `wanted` as in training_ops.cpp.
STABLE_TORCH_LIBRARY_FRAGMENT(fusedsep, m) {
#define FUSEDSEP_MODULES                                                                               \
  "Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? bn_mean, Tensor? bn_var, " \
  "int bn_mode, float bn_eps, "
  m.def("pointwise_conv2d_training(Tensor x, " FUSEDSEP_MODULES
        "int activation, bool channels_last) -> (Tensor y, Tensor p, Tensor mean, Tensor var, Tensor normalization)");
  m.def(
      "pointwise_conv2d_training_backward(Tensor grad_y, Tensor x, Tensor? x_normalization, Tensor p, " FUSEDSEP_MODULES
      "int activation, bool channels_last, int wanted) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, "
      "Tensor grad_bn_weight, Tensor grad_bn_bias)");
  m.def("conv2d_training(Tensor x, " FUSEDSEP_MODULES FUSEDSEP_GEOMETRY
        "int activation, bool channels_last) -> (Tensor y, Tensor p, Tensor mean, Tensor var, Tensor normalization)");
  m.def("conv2d_training_backward(Tensor grad_y, Tensor x, Tensor p, " FUSEDSEP_MODULES FUSEDSEP_GEOMETRY
        "int activation, bool channels_last, int wanted) -> (Tensor grad_weight, Tensor grad_bias, "
        "Tensor grad_bn_weight, Tensor grad_bn_bias)");
#undef FUSEDSEP_MODULES
}

STABLE_TORCH_LIBRARY_IMPL(fusedsep, CPU, m) {
  m.impl("pointwise_conv2d_training", TORCH_BOX(&fusedsep::pointwise_conv2d_training));
  m.impl("pointwise_conv2d_training_backward", TORCH_BOX(&fusedsep::pointwise_conv2d_training_backward));
  m.impl("conv2d_training", TORCH_BOX(&fusedsep::conv2d_training));
  m.impl("conv2d_training_backward", TORCH_BOX(&fusedsep::conv2d_training_backward));
}
