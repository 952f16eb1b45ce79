// SPDX-License-Identifier: BSD-3-Clause
//
// The operators of training, in LibTorch's stable ABI: forward and backward as one call each.
#include <torch/csrc/stable/library.h>

#include "training_call.h"

namespace fusedsep {
namespace {

template <typename T>
Norm<T> norm1_of(const Modules& m, const Call& call) {
  return {m.dw_bias, m.bn1_weight, m.bn1_bias, Statistics(m.bn1_mode), m.bn1_eps, call.in_channels};
}
template <typename T>
Norm<T> norm2_of(const Modules& m, const Call& call) {
  return {m.pw_bias, m.bn2_weight, m.bn2_bias, Statistics(m.bn2_mode), m.bn2_eps, call.out_channels};
}

Seven separable_conv2d_training(const Tensor& x, const Tensor& dw_weight, const Vector& dw_bias,
                                const Vector& bn1_weight, const Vector& bn1_bias, const Vector& bn1_mean,
                                const Vector& bn1_var, const Tensor& pw_weight, const Vector& pw_bias,
                                const Vector& bn2_weight, const Vector& bn2_bias, const Vector& bn2_mean,
                                const Vector& bn2_var, int64_t bn1_mode, double bn1_eps, int64_t bn2_mode,
                                double bn2_eps, int64_t stride, int64_t dilation, int64_t pad_left, int64_t pad_right,
                                int64_t pad_top, int64_t pad_bottom, int64_t activation, int64_t pointwise_activation,
                                bool channels_last) {
  const Geometry geometry{stride, dilation, pad_left, pad_right, pad_top, pad_bottom, activation, pointwise_activation};
  const Call call(x, dw_weight, pw_weight.size(0), geometry, channels_last);
  const ScalarType dtype = x.scalar_type();
  const Modules modules{dw_weight,  dw_bias,  bn1_weight, bn1_bias, bn1_mean, bn1_var, pw_weight, pw_bias,
                        bn2_weight, bn2_bias, bn2_mean,   bn2_var,  bn1_mode, bn1_eps, bn2_mode,  bn2_eps};
  modules.check(call, dtype, false);

  return dispatch(x, [&](auto zero) -> Seven {
    using T = decltype(zero);
    const bool in_channels_last = call.runs_channels_last();
    const Incoming<T> own_x(x, call.in_sizes(), channels_last, in_channels_last);
    Tensor p = empty_map(call.out_sizes(), in_channels_last, dtype);
    Outgoing<T> y(call.out_sizes(), channels_last, in_channels_last);
    Norm<T> norm1 = norm1_of<T>(modules, call), norm2 = norm2_of<T>(modules, call);
    auto run = run_of(call.params<T>(own_x.data(), activation, pointwise_activation, in_channels_last));
    run.params.conv.y = p.mutable_data_ptr<T>();
    run.params.y = y.data();
    const bool keep_d = norm1.statistics == Statistics::kBatch;  // two passes want it
    // It lies where y will, if it fits: no page of memory more, and what was just read is written.
    const bool d_in_y = call.in_channels <= call.out_channels;
    Tensor d = keep_d && !d_in_y ? empty_map(call.hidden_sizes(), in_channels_last, dtype) : nothing(dtype);
    run.params.d = !keep_d ? nullptr : d_in_y ? y.data() : d.mutable_data_ptr<T>();
    run.pack(dw_weight.const_data_ptr<T>(), pw_weight.const_data_ptr<T>(), false);

    const auto [mean1, var1] =
        take_statistics(norm1, call.in_channels, bn1_mean, bn1_var, [&](double* mean, double* variance) {
          if (mean != nullptr) run.depthwise_statistics(mean, variance);
        });
    run.params.affine1 = norm1.affine();
    const auto [mean2, var2] = take_statistics(norm2, call.out_channels, bn2_mean, bn2_var,
                                               [&](double* mean, double* variance) { run.forward(mean, variance); });
    run.params.affine2 = norm2.affine();
    run.normalize();
    return {y.map(), p, mean1, var1, mean2, var2, normalization_of(norm2, call.out_channels, pointwise_activation)};
  });
}

Nine separable_conv2d_training_backward(const Tensor& grad_y, const Tensor& x, const Vector& x_normalization,
                                        const Tensor& p, const Tensor& dw_weight, const Vector& dw_bias,
                                        const Vector& bn1_weight, const Vector& bn1_bias, const Vector& bn1_mean,
                                        const Vector& bn1_var, const Tensor& pw_weight, const Vector& pw_bias,
                                        const Vector& bn2_weight, const Vector& bn2_bias, const Vector& bn2_mean,
                                        const Vector& bn2_var, int64_t bn1_mode, double bn1_eps, int64_t bn2_mode,
                                        double bn2_eps, int64_t stride, int64_t dilation, int64_t pad_left,
                                        int64_t pad_right, int64_t pad_top, int64_t pad_bottom, int64_t activation,
                                        int64_t pointwise_activation, bool channels_last, int64_t wanted) {
  const Geometry geometry{stride, dilation, pad_left, pad_right, pad_top, pad_bottom, activation, pointwise_activation};
  const Call call(x, dw_weight, pw_weight.size(0), geometry, channels_last, true);
  const ScalarType dtype = x.scalar_type();
  const Modules modules{dw_weight,  dw_bias,  bn1_weight, bn1_bias, bn1_mean, bn1_var, pw_weight, pw_bias,
                        bn2_weight, bn2_bias, bn2_mean,   bn2_var,  bn1_mode, bn1_eps, bn2_mode,  bn2_eps};
  modules.check(call, dtype, true);
  check_map("grad_y", grad_y, call.out_sizes(), dtype);
  check_map("p", p, call.out_sizes(), dtype);

  const auto wants = [wanted](int i) { return (wanted >> i & 1) != 0; };
  const bool wants_depthwise = wants(kX) || wants(kDwWeight);
  const bool wants_g1 = wants_depthwise || wants(kDwBias) || wants(kBn1Weight) || wants(kBn1Bias);

  return dispatch(x, [&](auto zero) -> Nine {
    using T = decltype(zero);
    const bool in_channels_last = call.runs_channels_last();
    KeptInput<T> own_x(x, x_normalization, call.in_sizes(), in_channels_last);
    if (!in_channels_last) own_x.form();
    const Tensor own_p = dense(p, call.out_sizes(), in_channels_last);  // whoever kept it may have laid it out anew
    const Tensor dense_grad_y = dense(grad_y, call.out_sizes(), channels_last);
    const Incoming<T> own_grad_y(dense_grad_y, call.out_sizes(), channels_last, in_channels_last);
    Norm<T> norm1 = norm1_of<T>(modules, call), norm2 = norm2_of<T>(modules, call);
    norm1.set_statistics(bn1_mode == 0 ? nullptr : bn1_mean->const_data_ptr<T>(),
                         bn1_mode == 0 ? nullptr : bn1_var->const_data_ptr<T>());
    norm2.set_statistics(bn2_mode == 0 ? nullptr : bn2_mean->const_data_ptr<T>(),
                         bn2_mode == 0 ? nullptr : bn2_var->const_data_ptr<T>());
    auto run = run_of(call.params<T>(nullptr, activation, pointwise_activation, in_channels_last));
    own_x.set(run.params);
    run.params.conv.y = const_cast<T*>(own_p.const_data_ptr<T>());
    run.params.grad_y = own_grad_y.data();
    run.params.affine1 = norm1.affine();
    run.params.affine2 = norm2.affine();

    Channels sum2(size_t(norm2.padded())), moment2(sum2.size());
    run.normalize_backward_reduce(sum2.data(), moment2.data());
    run.params.correction2 = norm2.correction(sum2, moment2, call.count());

    Tensor grad_x = nothing(dtype), grad_dw_weight = nothing(dtype), grad_pw_weight = nothing(dtype),
           g1 = nothing(dtype);
    std::optional<Outgoing<T>> own_grad_x;
    Channels sum1(size_t(norm1.padded())), moment1(sum1.size());
    if (wants_g1 || wants(kPwWeight)) {
      run.pack(dw_weight.const_data_ptr<T>(), pw_weight.const_data_ptr<T>(), true);
      if (wants(kX)) own_grad_x.emplace(call.in_sizes(), channels_last, in_channels_last);
      // The gradient of a map of the same size takes its place, row by row.
      const bool g1_in_grad_x = wants(kX) && call.hidden_sizes() == call.in_sizes();
      if (wants_g1 && !g1_in_grad_x) g1 = empty_map(call.hidden_sizes(), in_channels_last, dtype);
      if (wants(kPwWeight)) grad_pw_weight = empty_map({call.out_channels, call.in_channels, 1, 1}, false, dtype);
      run.params.g1 = g1_in_grad_x ? own_grad_x->data() : g1.mutable_data_ptr<T>();
      run.pointwise_backward(wants_g1 ? sum1.data() : nullptr, moment1.data(),
                             wants(kPwWeight) ? grad_pw_weight.mutable_data_ptr<T>() : nullptr);
    }
    if (wants_depthwise) {
      run.params.correction1 = norm1.correction(sum1, moment1, call.count());
      if (wants(kDwWeight)) grad_dw_weight = empty_map({call.in_channels, 1, 3, 3}, false, dtype);
      run.params.grad_x = wants(kX) ? own_grad_x->data() : nullptr;
      run.depthwise_backward(wants(kDwWeight) ? grad_dw_weight.mutable_data_ptr<T>() : nullptr);
      if (wants(kX)) grad_x = own_grad_x->map();
    }
    return {grad_x,
            grad_dw_weight,
            wants(kDwBias) ? norm1.grad_bias(sum1) : nothing(dtype),
            wants(kBn1Weight) ? norm1.grad_weight(moment1) : nothing(dtype),
            wants(kBn1Bias) ? norm1.grad_shift(sum1) : nothing(dtype),
            grad_pw_weight,
            wants(kPwBias) ? norm2.grad_bias(sum2) : nothing(dtype),
            wants(kBn2Weight) ? norm2.grad_weight(moment2) : nothing(dtype),
            wants(kBn2Bias) ? norm2.grad_shift(sum2) : nothing(dtype)};
  });
}

}  // namespace
}  // namespace fusedsep

// Modes of a BN: 0 none, 1 fixed statistics, 2 statistics of the batch. `wanted` has a bit for each gradient, in order.
STABLE_TORCH_LIBRARY_FRAGMENT(fusedsep, m) {
#define FUSEDSEP_MODULES                                                                                         \
  "Tensor dw_weight, Tensor? dw_bias, Tensor? bn1_weight, Tensor? bn1_bias, Tensor? bn1_mean, Tensor? bn1_var, " \
  "Tensor pw_weight, Tensor? pw_bias, Tensor? bn2_weight, Tensor? bn2_bias, Tensor? bn2_mean, Tensor? bn2_var, " \
  "int bn1_mode, float bn1_eps, int bn2_mode, float bn2_eps, " FUSEDSEP_GEOMETRY                                 \
  "int activation, int pointwise_activation, bool channels_last"
  m.def("separable_conv2d_training(Tensor x, " FUSEDSEP_MODULES
        ") -> (Tensor y, Tensor p, Tensor mean1, Tensor var1, Tensor mean2, Tensor var2, Tensor normalization)");
  m.def(
      "separable_conv2d_training_backward(Tensor grad_y, Tensor x, Tensor? x_normalization, Tensor p, " FUSEDSEP_MODULES
      ", int wanted) -> (Tensor grad_x, Tensor grad_dw_weight, Tensor grad_dw_bias, Tensor grad_bn1_weight, "
      "Tensor grad_bn1_bias, Tensor grad_pw_weight, Tensor grad_pw_bias, Tensor grad_bn2_weight, "
      "Tensor grad_bn2_bias)");
#undef FUSEDSEP_MODULES
}

STABLE_TORCH_LIBRARY_IMPL(fusedsep, CPU, m) {
  m.impl("separable_conv2d_training", TORCH_BOX(&fusedsep::separable_conv2d_training));
  m.impl("separable_conv2d_training_backward", TORCH_BOX(&fusedsep::separable_conv2d_training_backward));
}
