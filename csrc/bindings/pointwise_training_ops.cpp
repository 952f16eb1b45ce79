// SPDX-License-Identifier: BSD-3-Clause
//
// Training of a pointwise convolution, its BN and its activation, in LibTorch's stable ABI: the second half of
// training_ops.cpp by itself, which reads its input where the other reads the depthwise map.
#include <torch/csrc/stable/library.h>

#include "training_call.h"

namespace fusedsep {
namespace {

// The arguments that stand for the two modules.
struct PointwiseModules {
  const Tensor& weight;
  const Vector &bias, &bn_weight, &bn_bias, &bn_mean, &bn_var;
  int64_t bn_mode;
  double bn_eps;

  template <typename T>
  Norm<T> norm() const {
    return {bias, bn_weight, bn_bias, Statistics(bn_mode), bn_eps, weight.size(0)};
  }
};

// The geometry of one call, from tensors that were checked.
struct PointwiseCall {
  std::array<int64_t, 4> in_sizes, out_sizes;
  bool channels_last;

  PointwiseCall(const Tensor& x, const PointwiseModules& m, int64_t activation, bool channels_last, bool in_backward)
      : channels_last(channels_last) {
    check_input(x, channels_last, in_backward);
    in_sizes = sizes_of(x);
    const auto [batch, in_channels, height, width] = in_sizes;
    check_pointwise_weight(in_channels, x.scalar_type(), m.weight);
    const int64_t out_channels = m.weight.size(0);
    check_norm("bn", out_channels, m.bn_weight, m.bn_bias, m.bn_mean, m.bn_var, m.bn_mode, x.scalar_type(),
               in_backward);
    check_vector("bias", m.bias, out_channels, x.scalar_type(), Place::cpu());
    check_range("activation", activation, 0, 3);
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pointwise_conv2d_training(
    const Tensor& x, const Tensor& weight, const Vector& bias, const Vector& bn_weight, const Vector& bn_bias,
    const Vector& bn_mean, const Vector& bn_var, int64_t bn_mode, double bn_eps, int64_t activation,
    bool channels_last) {
  const PointwiseModules modules{weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_mode, bn_eps};
  const PointwiseCall call(x, modules, activation, channels_last, false);
  return dispatch(x, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> {
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
    run.params.y = y.data();
    run.pack(nullptr, weight.const_data_ptr<T>(), false);
    const auto [mean, var] = take_statistics(norm, call.out_sizes[1], bn_mean, bn_var,
                                             [&](double* mean, double* variance) { run.forward(mean, variance); });
    run.params.affine2 = norm.affine();
    run.normalize();
    return {y.map(), p, mean, var, normalization_of(norm, call.out_sizes[1], activation)};
  });
}

// Bits of `wanted`, and places in the results.
enum { kGradX, kGradWeight, kGradBias, kGradBnWeight, kGradBnBias };

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pointwise_conv2d_training_backward(
    const Tensor& grad_y, const Tensor& x, const Vector& x_normalization, const Tensor& p, const Tensor& weight,
    const Vector& bias, const Vector& bn_weight, const Vector& bn_bias, const Vector& bn_mean, const Vector& bn_var,
    int64_t bn_mode, double bn_eps, int64_t activation, bool channels_last, int64_t wanted) {
  const PointwiseModules modules{weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_mode, bn_eps};
  const PointwiseCall call(x, modules, activation, channels_last, true);
  const ScalarType dtype = x.scalar_type();
  check_map("grad_y", grad_y, call.out_sizes, dtype);
  check_map("p", p, call.out_sizes, dtype);
  const auto wants = [wanted](int i) { return (wanted >> i & 1) != 0; };

  return dispatch(x, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    const bool in_channels_last = call.runs_channels_last();
    const KeptInput<T> own_x(x, x_normalization, call.in_sizes, in_channels_last);
    const Tensor own_p = dense(p, call.out_sizes, in_channels_last);  // whoever kept it may have laid it out anew
    const Tensor dense_grad_y = dense(grad_y, call.out_sizes, channels_last);
    const Incoming<T> own_grad_y(dense_grad_y, call.out_sizes, channels_last, in_channels_last);
    const Norm<T> same = identity<T>(call.in_sizes[1]);
    Norm<T> norm = modules.norm<T>();
    norm.set_statistics(bn_mode == 0 ? nullptr : bn_mean->const_data_ptr<T>(),
                        bn_mode == 0 ? nullptr : bn_var->const_data_ptr<T>());
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

}  // namespace
}  // namespace fusedsep

// Modes of the BN and bits of `wanted` as in training_ops.cpp.
STABLE_TORCH_LIBRARY_FRAGMENT(fusedsep, m) {
#define FUSEDSEP_MODULES                                                                               \
  "Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? bn_mean, Tensor? bn_var, " \
  "int bn_mode, float bn_eps, int activation, bool channels_last"
  m.def("pointwise_conv2d_training(Tensor x, " FUSEDSEP_MODULES
        ") -> (Tensor y, Tensor p, Tensor mean, Tensor var, Tensor normalization)");
  m.def(
      "pointwise_conv2d_training_backward(Tensor grad_y, Tensor x, Tensor? x_normalization, Tensor p, " FUSEDSEP_MODULES
      ", int wanted) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_bn_weight, "
      "Tensor grad_bn_bias)");
#undef FUSEDSEP_MODULES
}

STABLE_TORCH_LIBRARY_IMPL(fusedsep, CPU, m) {
  m.impl("pointwise_conv2d_training", TORCH_BOX(&fusedsep::pointwise_conv2d_training));
  m.impl("pointwise_conv2d_training_backward", TORCH_BOX(&fusedsep::pointwise_conv2d_training_backward));
}
