// SPDX-License-Identifier: BSD-3-Clause
//
// What the operators of inference have in common on every device: checks of their tensors, and params from them.
#pragma once

#include <optional>

#include "../kernels/separable.h"
#include "geometry.h"
#include "tensors.h"

namespace fusedsep {

// A scale or a bias that is packed.
inline void check_vector(const char* name, const std::optional<Tensor>& vector, int64_t channels, const Place& place) {
  if (!vector.has_value()) return;
  STD_TORCH_CHECK(vector->dim() == 1 && vector->size(0) == channels && vector->is_contiguous() &&
                      vector->scalar_type() == ScalarType::Double && place.has(*vector),
                  name, " must be a contiguous float64 ", place.name, " tensor of ", channels, " elements");
}
inline const double* vector_data(const std::optional<Tensor>& vector) {
  return vector.has_value() ? vector->const_data_ptr<double>() : nullptr;
}

// The arguments of `pack`.
struct PackCall {
  const Tensor &dw_weight, &pw_weight;
  const std::optional<Tensor>&dw_scale, &dw_bias, &pw_scale, &pw_bias;
  int64_t in_channels, out_channels;

  PackCall(const Tensor& dw_weight, const std::optional<Tensor>& dw_scale, const std::optional<Tensor>& dw_bias,
           const Tensor& pw_weight, const std::optional<Tensor>& pw_scale, const std::optional<Tensor>& pw_bias,
           const Place& place)
      : dw_weight(dw_weight),
        pw_weight(pw_weight),
        dw_scale(dw_scale),
        dw_bias(dw_bias),
        pw_scale(pw_scale),
        pw_bias(pw_bias) {
    STD_TORCH_CHECK(dw_weight.dim() == 4 && dw_weight.size(0) >= 1 && dw_weight.size(1) == 1 &&
                        dw_weight.size(2) == 3 && dw_weight.size(3) == 3 && dw_weight.is_contiguous() &&
                        place.has(dw_weight),
                    "dw_weight must be a contiguous ", place.name, " tensor of shape [C, 1, 3, 3]");
    in_channels = dw_weight.size(0);
    STD_TORCH_CHECK(pw_weight.dim() == 4 && pw_weight.size(0) >= 1 && pw_weight.size(1) == in_channels &&
                        pw_weight.size(2) == 1 && pw_weight.size(3) == 1 && pw_weight.is_contiguous() &&
                        place.has(pw_weight),
                    "pw_weight must be a contiguous ", place.name, " tensor of shape [N, ", in_channels, ", 1, 1]");
    out_channels = pw_weight.size(0);
    STD_TORCH_CHECK(pw_weight.scalar_type() == dw_weight.scalar_type(), "pw_weight must have the dtype of dw_weight");
    check_vector("dw_scale", dw_scale, in_channels, place);
    check_vector("dw_bias", dw_bias, in_channels, place);
    check_vector("pw_scale", pw_scale, out_channels, place);
    check_vector("pw_bias", pw_bias, out_channels, place);
  }

  template <typename T>
  PackParams<T> params(bool channels_last) const {
    return {static_cast<const T*>(dw_weight.const_data_ptr()),
            vector_data(dw_scale),
            vector_data(dw_bias),
            static_cast<const T*>(pw_weight.const_data_ptr()),
            vector_data(pw_scale),
            vector_data(pw_bias),
            in_channels,
            out_channels,
            channels_last};
  }
};

inline void check_separable_conv2d(const Tensor& x, int64_t out_channels, const Geometry& geometry, bool channels_last,
                                   const Place& place) {
  check_geometry(geometry);
  check_range("out_channels", out_channels, 1, int64_t(1) << 40);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) >= 1 && place.has(x), "x must be a ", place.name,
                  " tensor of shape [N, C, H, W]");
  STD_TORCH_CHECK(is_dense(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, channels_last), "x must be contiguous in ",
                  channels_last ? "channels_last" : "NCHW", " memory format");
}

// All but the pointers; of a checked call.
template <typename T>
SeparableParams<T> separable_params(const Tensor& x, int64_t out_channels, const Geometry& g, bool channels_last) {
  SeparableParams<T> params{};
  params.batch = x.size(0);
  params.in_channels = x.size(1);
  params.height = x.size(2);
  params.width = x.size(3);
  params.out_channels = out_channels;
  params.out_height = output_size("height", params.height, g.pad_top, g.pad_bottom, g);
  params.out_width = output_size("width", params.width, g.pad_left, g.pad_right, g);
  params.stride = g.stride;
  params.dilation = g.dilation;
  params.pad_top = g.pad_top;
  params.pad_left = g.pad_left;
  params.channels_last = channels_last;
  params.activation = Activation(g.activation);
  params.pointwise_activation = Activation(g.pointwise_activation);
  element_count(params.batch, out_channels, params.out_height, params.out_width);
  return params;
}

}  // namespace fusedsep
