// SPDX-License-Identifier: BSD-3-Clause
//
// What the operators of training on a CPU have in common: params from their tensors, and the run on torch's threads.
#pragma once

#include <algorithm>
#include <cmath>

#include "formats.h"
#include "norm.h"
#include "run_training.h"
#include "training_checks.h"

namespace fusedsep {

// Params of the passes that see p alone: one pixel of x stands for one of p.
template <typename T>
TrainingParams<T> params_of_product(const Tensor& p, int64_t activation, bool channels_last) {
  TrainingParams<T> params{};
  params.conv.y = const_cast<T*>(p.const_data_ptr<T>());
  params.conv.batch = p.size(0);
  params.conv.in_channels = params.conv.out_channels = p.size(1);
  params.conv.out_height = p.size(2);
  params.conv.out_width = p.size(3);
  params.conv.channels_last = channels_last;
  params.pointwise_activation = Activation(activation);
  return params;
}

template <typename T>
auto run_of(const TrainingParams<T>& params) {
  static const TorchParallelFor parallel_for;
  return TrainingRun<T, TorchParallelFor>(active_isa().training<T>(), params, torch::stable::get_num_threads(),
                                          parallel_for);
}

// The input of a block in the backward. It may be kept as the raw product of the block that it came from, and what
// makes x of it: `normalization` [4, C], rows of center, scale, shift and the code of the activation. A negative code
// says that `map` is x itself, and so does no `normalization`. `map` may have any strides: a product is in the format
// that its block ran in, and whoever kept it may have laid it out anew.
template <typename T>
class KeptInput {
 public:
  KeptInput(const Tensor& map, const Vector& normalization, const std::array<int64_t, 4>& sizes,
            bool wants_channels_last)
      : map_(map), sizes_(sizes), normalized_(is_normalized(normalization, sizes[1])) {
    if (!is_dense(map, sizes, wants_channels_last)) {
      map_ = is_dense(map, sizes, !wants_channels_last)
                 ? Incoming<T>(map, sizes, !wants_channels_last, wants_channels_last).map()
                 : dense(map, sizes, wants_channels_last);
    }
    if (!normalized_) return;
    const int64_t channels = sizes[1];
    const T* rows = normalization->const_data_ptr<T>();
    activation_ = Activation(int64_t(rows[3 * channels]));
    for (int64_t row = 0; row < 3; ++row) {
      rows_.emplace_back(size_t(padded_channels(channels)), T(0));
      std::copy_n(rows + row * channels, channels, rows_.back().data());
    }
  }
  // Make x of it, in NCHW, for passes that cannot form it while they load it.
  void form() {
    if (!normalized_) return;
    auto run = run_of(params_of_product<T>(map_, int64_t(activation_), false));
    const Tensor x = empty_map(sizes_, false, kScalarType<T>);
    run.params.affine2 = affine();
    run.params.y = x.mutable_data_ptr<T>();
    run.normalize();
    map_ = x;
    normalized_ = false;
  }
  // For the passes of the backward.
  void set(TrainingParams<T>& params) const {
    params.conv.x = map_.template const_data_ptr<T>();
    if (!normalized_) return;
    params.x_affine = affine();
    params.x_activation = activation_;
  }
  // For those of a pointwise convolution by itself; `identity` is what makes x of x.
  void set_as_d(TrainingParams<T>& params, const Affine<T>& identity) const {
    params.d = const_cast<T*>(map_.template const_data_ptr<T>());
    params.affine1 = normalized_ ? affine() : identity;
    params.activation = activation_;
  }

 private:
  static bool is_normalized(const Vector& normalization, int64_t channels) {
    if (!normalization.has_value()) return false;
    STD_TORCH_CHECK(normalization->dim() == 2 && normalization->size(0) == 4 && normalization->size(1) == channels &&
                        normalization->is_contiguous() && normalization->is_cpu() &&
                        normalization->scalar_type() == kScalarType<T>,
                    "x_normalization must be a contiguous CPU tensor of shape [4, ", channels, "] and the dtype of x");
    const T code = normalization->const_data_ptr<T>()[3 * channels];
    STD_TORCH_CHECK(code < 0 || (code <= T(kLastTrainedActivation) && code == std::floor(code)),
                    "row 3 of x_normalization must hold the code of an activation, or -1");
    return code >= 0;
  }
  Affine<T> affine() const { return {rows_[0].data(), rows_[1].data(), rows_[2].data()}; }

  Tensor map_;
  std::array<int64_t, 4> sizes_;
  bool normalized_;
  Activation activation_ = Activation::kNone;
  std::vector<std::vector<T>> rows_;
};

// f(T()) for the element type of `x`.
template <class F>
auto dispatch(const Tensor& x, const F& f) {
  return x.scalar_type() == ScalarType::Float ? f(0.0f) : f(0.0);
}

}  // namespace fusedsep
