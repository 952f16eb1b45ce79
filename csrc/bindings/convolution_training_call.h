// SPDX-License-Identifier: BSD-3-Clause
//
// What the operators that train one convolution with its BN have in common: the arguments of both, and what is around
// the passes of the convolution itself.
#pragma once

#include <optional>

#include "training_call.h"

// Arguments of the schemas.
#define FUSEDSEP_CONVOLUTION                                                                           \
  "Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? bn_mean, Tensor? bn_var, " \
  "int bn_mode, float bn_eps, "

namespace fusedsep {

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
    check_range("activation", activation, 0, kLastTrainedActivation);
  }
};

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// What the operators return, when the params of `run` have all that makes p and where y goes; `forward` makes it, with
// its mean and variance.
template <typename T, class Run, class Forward>
Five forward_outputs(Run& run, Norm<T>& norm, const ConvolutionModules& m, const Tensor& p, Outgoing<T>& y,
                     int64_t activation, const Forward& forward) {
  const int64_t channels = p.size(1);
  const auto [mean, var] = take_statistics(norm, channels, m.bn_mean, m.bn_var, forward);
  run.params.affine2 = norm.affine();
  run.params.y = y.data();
  run.normalize();
  return {y.map(), p, mean, var, normalization_of(norm, channels, activation)};
}

// Bits of `wanted`, and places in the results.
enum { kGradX, kGradWeight, kGradBias, kGradBnWeight, kGradBnBias };

// What the backward operators return, when the params of `run` have p, grad_y and x. `convolution(grad_x, grad_weight)`
// computes the gradients of the convolution itself, those that are not null; grad_x in `in_channels_last`.
template <typename T, class Run, class Call, class Convolution>
Five backward_outputs(Run& run, Norm<T>& norm, const Call& call, const Tensor& weight, bool channels_last,
                      bool in_channels_last, int64_t wanted, const Convolution& convolution) {
  const auto wants = [wanted](int i) { return (wanted >> i & 1) != 0; };
  const ScalarType dtype = weight.scalar_type();
  run.params.affine2 = norm.affine();
  Channels sum(size_t(norm.padded())), moment(sum.size());
  run.normalize_backward_reduce(sum.data(), moment.data());
  run.params.correction2 = norm.correction(sum, moment, call.count());

  Tensor grad_x = nothing(dtype), grad_weight = nothing(dtype);
  if (wants(kGradX) || wants(kGradWeight)) {
    std::optional<Outgoing<T>> own_grad_x;
    if (wants(kGradX)) own_grad_x.emplace(call.in_sizes, channels_last, in_channels_last);
    if (wants(kGradWeight)) grad_weight = empty_map(sizes_of(weight), false, dtype);
    convolution(wants(kGradX) ? own_grad_x->data() : nullptr,
                wants(kGradWeight) ? grad_weight.mutable_data_ptr<T>() : nullptr);
    if (wants(kGradX)) grad_x = own_grad_x->map();
  }
  return {grad_x, grad_weight, wants(kGradBias) ? norm.grad_bias(sum) : nothing(dtype),
          wants(kGradBnWeight) ? norm.grad_weight(moment) : nothing(dtype),
          wants(kGradBnBias) ? norm.grad_shift(sum) : nothing(dtype)};
}

}  // namespace fusedsep
