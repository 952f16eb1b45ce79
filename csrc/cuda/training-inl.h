// SPDX-License-Identifier: BSD-3-Clause
//
// The passes of training in their order, and the memory that they share.
#pragma once

#include "maps-inl.h"
#include "norm-inl.h"
#include "weight-gradient-inl.h"

namespace fusedsep::cuda {

// Hands out parts of a piece of memory; of none, it counts.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}
  template <typename T>
  T* take(int64_t count) {
    T* const part = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += ceil_div(count * int64_t(sizeof(T)), kAlignment) * kAlignment;
    return part;
  }
  NormRows rows(int64_t channels) {
    const int64_t size = padded(channels);
    return {take<float>(size), take<float>(size), take<float>(size), take<float>(size), take<float>(size)};
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kAlignment = 256;
  unsigned char* memory_;
  int64_t used_ = 0;
};

// f(std::integral_constant<Reading>()) for maps of that many channels and at these places. NCHW of 16 bits is read an
// element at a time: nobody trains in it (fusedsep/_cuda.py).
template <typename T, class F>
auto with_reading(bool channels_last, int64_t channels, std::initializer_list<const T*> maps, const F& f) {
  const auto is_aligned = [](const T* map) { return reinterpret_cast<uintptr_t>(map) % (4 * sizeof(T)) == 0; };
  if constexpr (sizeof(T) == 4) {
    if (!channels_last) return f(std::integral_constant<Reading, Reading::kPlanes>());
  }
  if (channels_last && channels % 4 == 0 && std::all_of(maps.begin(), maps.end(), is_aligned)) {
    return f(std::integral_constant<Reading, Reading::kVectors>());
  }
  return f(std::integral_constant<Reading, Reading::kElements>());
}

template <typename T>
int64_t output_pixels(const SeparableParams<T>& conv) {
  return conv.batch * conv.out_height * conv.out_width;
}

// Doubles for `rows` sums of a pass over a map, however it is read.
inline int64_t pass_doubles(int64_t pixels, int64_t channels, int64_t rows) {
  const auto of = [&](const Columns& columns) { return slot_doubles(columns.slots(), rows * padded(channels)); };
  return std::max({of(columns_of<Reading::kVectors>(pixels, channels)),
                   of(columns_of<Reading::kElements>(pixels, channels)),
                   of(columns_of<Reading::kPlanes>(pixels, channels))});
}

// Over the pixels and channels of a pass.
template <Reading kReading, class... Parameters, class... Arguments>
void launch_columns(void (*kernel)(Parameters...), const Columns& columns, int64_t shared_bytes, Stream stream,
                    const Arguments&... arguments) {
  launch(kernel, columns.slots() * (columns.padded_channels() / ColumnShape<kReading>::kChannels), kColumnThreads,
         shared_bytes, stream, arguments...);
}

template <typename T>
MomentsOf depthwise_statistics(const SeparableParams<T>& conv, double* sums, Stream stream) {
  return with_reading<T>(conv.channels_last, conv.in_channels, {conv.x}, [&](auto reading) {
    constexpr Reading kReading = reading;
    const Columns columns = columns_of<kReading>(output_pixels(conv), conv.in_channels);
    launch_columns<kReading>(depthwise_statistics_kernel<kReading, T>, columns, kMomentsBytes<kReading>, stream, conv,
                             columns, sums);
    return merge_moments(columns, sums, stream);
  });
}

// What the product leaves statistics of p in.
template <typename T>
Columns product_columns(const SeparableParams<T>& conv, const Device& device) {
  return {output_pixels(conv), conv.out_channels, moment_pixels(conv, device)};
}

template <typename T>
void normalize_product(const SeparableParams<T>& conv, const Affine<float>& affine, Activation activation,
                       const float* code, T* y, Stream stream) {
  with_reading<T>(conv.channels_last, conv.out_channels, {conv.y, y}, [&](auto reading) {
    constexpr Reading kReading = reading;
    const Columns columns = columns_of<kReading>(output_pixels(conv), conv.out_channels);
    launch_columns<kReading>(normalize_kernel<kReading, T>, columns, 0, stream, conv, affine, activation, code, y,
                             columns);
  });
}

// S1 and S2.
template <typename T>
SumsOf normalize_backward_reduce(const TrainingParams<T>& p, double* sums, Stream stream) {
  return with_reading<T>(p.conv.channels_last, p.conv.out_channels, {p.conv.y, p.grad_y}, [&](auto reading) {
    constexpr Reading kReading = reading;
    const Columns columns = columns_of<kReading>(output_pixels(p.conv), p.conv.out_channels);
    launch_columns<kReading>(normalize_backward_reduce_kernel<kReading, T>, columns, kReduceBytes<kReading, 2>, stream,
                             p, columns, sums);
    return merge_sums(sums, columns.slots(), 2 * columns.padded_channels(), stream);
  });
}

template <typename T>
void product_gradient(const TrainingParams<T>& p, T* gp, Stream stream) {
  with_reading<T>(p.conv.channels_last, p.conv.out_channels, {p.conv.y, p.grad_y}, [&](auto reading) {
    constexpr Reading kReading = reading;
    const Columns columns = columns_of<kReading>(output_pixels(p.conv), p.conv.out_channels);
    launch_columns<kReading>(product_gradient_kernel<kReading, T>, columns, 0, stream, p, gp, columns);
  });
}

// gh of gp in rows, in the place of g1.
template <typename T>
void pointwise_backward(const TrainingParams<T>& p, const T* pw_weight, const T* gp, float* packed,
                        const Device& device, Stream stream) {
  const int64_t in_channels = p.conv.in_channels, out_channels = p.conv.out_channels;
  launch(pack_transposed_kernel<T>, ceil_div(padded(in_channels) * padded(out_channels), kMergeThreads), kMergeThreads,
         0, stream, pw_weight, in_channels, out_channels, packed);
  SeparableParams<T> transposed = p.conv;
  transposed.in_channels = out_channels, transposed.out_channels = in_channels;
  transposed.packed = packed, transposed.y = p.g1;
  multiply_rows(transposed, gp, nullptr, device, stream);
}

template <typename T>
void hidden_rows(const TrainingParams<T>& p, T* h, Stream stream) {
  with_reading<T>(p.conv.channels_last, p.conv.in_channels, {p.conv.x}, [&](auto reading) {
    constexpr Reading kReading = reading;
    const Columns columns = columns_of<kReading>(output_pixels(p.conv), p.conv.in_channels);
    launch_columns<kReading>(hidden_kernel<kReading, T>, columns, 0, stream, p, h, columns);
  });
}

// g1 in the place of gh, h as rows, T1 and T2.
template <typename T>
SumsOf activation_backward(const TrainingParams<T>& p, T* h, double* sums, Stream stream) {
  return with_reading<T>(p.conv.channels_last, p.conv.in_channels, {p.conv.x, p.g1}, [&](auto reading) {
    constexpr Reading kReading = reading;
    const Columns columns = columns_of<kReading>(output_pixels(p.conv), p.conv.in_channels);
    launch_columns<kReading>(activation_backward_kernel<kReading, T>, columns, kReduceBytes<kReading, 2>, stream, p, h,
                             columns, sums);
    return merge_sums(sums, columns.slots(), 2 * columns.padded_channels(), stream);
  });
}

// gd in the place of g1, and the gradient of the depthwise weights unless it is null.
template <typename T>
void depthwise_backward(const TrainingParams<T>& p, double* sums, T* grad_weight, Stream stream) {
  with_reading<T>(p.conv.channels_last, p.conv.in_channels, {p.conv.x, p.g1}, [&](auto reading) {
    constexpr Reading kReading = reading;
    const Columns columns = columns_of<kReading>(output_pixels(p.conv), p.conv.in_channels);
    launch_columns<kReading>(depthwise_backward_kernel<kReading, T>, columns, kReduceBytes<kReading, 9>, stream, p,
                             columns, sums);
    if (grad_weight == nullptr) return;
    const SumsOf merged = merge_sums(sums, columns.slots(), 9 * columns.padded_channels(), stream);
    launch(depthwise_weight_kernel<T>, ceil_div(9 * columns.channels, kMergeThreads), kMergeThreads, 0, stream, merged,
           columns.padded_channels(), columns.channels, grad_weight);
  });
}

template <typename T>
void input_gradient(const TrainingParams<T>& p, Stream stream) {
  with_reading<T>(p.conv.channels_last, p.conv.in_channels, {p.grad_x, p.g1}, [&](auto reading) {
    constexpr Reading kReading = reading;
    const Columns columns = columns_of<kReading>(p.conv.batch * p.conv.height * p.conv.width, p.conv.in_channels);
    launch_columns<kReading>(input_gradient_kernel<kReading, T>, columns, 0, stream, p, columns);
  });
}

// The weights of the forward, packed.
template <typename T>
void pack_raw(const TrainingParams<T>& p, const TrainingModules<T>& modules, float* packed, Stream stream) {
  pack<T>({modules.dw_weight, nullptr, nullptr, modules.pw_weight, nullptr, nullptr, p.conv.in_channels,
           p.conv.out_channels, p.conv.channels_last},
          packed, stream);
}

// ------------------------------------------------------------------------------------------------------------ forward

template <typename T>
struct ForwardScratch {
  NormRows norm1, norm2;
  float* packed;
  double* sums;
  T* h;
  int64_t bytes;

  ForwardScratch(const TrainingParams<T>& p, const Device& device, void* memory) {
    Scratch scratch(memory);
    const int64_t in_channels = p.conv.in_channels, out_channels = p.conv.out_channels;
    norm1 = scratch.rows(in_channels), norm2 = scratch.rows(out_channels);
    packed = scratch.take<float>(Packed<T>::size(in_channels, out_channels));
    sums =
        scratch.take<double>(std::max(pass_doubles(output_pixels(p.conv), in_channels, 2),
                                      slot_doubles(product_columns(p.conv, device).slots(), 2 * padded(out_channels))));
    h = scratch.take<T>(output_pixels(p.conv) * padded(in_channels));
    bytes = scratch.used();
  }
};

template <typename T>
int64_t forward_scratch_bytes(const TrainingParams<T>& p, const Device& device) {
  return ForwardScratch<T>(p, device, nullptr).bytes;
}

template <typename T>
void training_forward(const TrainingParams<T>& params, const TrainingModules<T>& modules, float* normalization,
                      const Device& device, void* memory, Stream stream) {
  const ForwardScratch<T> scratch(params, device, memory);
  TrainingParams<T> p = params;
  const auto taken = [](const TrainingNorm<T>& norm, auto&& measure) {
    return norm.statistics == Statistics::kBatch ? std::optional<MomentsOf>(measure()) : std::nullopt;
  };
  pack_raw(p, modules, scratch.packed, stream);
  p.conv.packed = scratch.packed;
  const auto moments1 = taken(modules.norm1, [&] { return depthwise_statistics(p.conv, scratch.sums, stream); });
  set_norm(modules.norm1, moments1, scratch.norm1, nullptr, p.activation, stream);
  p.affine1 = scratch.norm1.affine();
  hidden_rows(p, scratch.h, stream);
  const bool takes2 = modules.norm2.statistics == Statistics::kBatch;
  multiply_rows(p.conv, scratch.h, takes2 ? scratch.sums : nullptr, device, stream);
  const auto moments2 =
      taken(modules.norm2, [&] { return merge_moments(product_columns(p.conv, device), scratch.sums, stream); });
  set_norm(modules.norm2, moments2, scratch.norm2, normalization, p.pointwise_activation, stream);
  normalize_product(p.conv, scratch.norm2.affine(), p.pointwise_activation, nullptr, p.y, stream);
}

// ----------------------------------------------------------------------------------------------------------- backward

template <typename T>
struct BackwardScratch {
  NormRows norm1, norm2;
  float *packed, *transposed, *splits;
  double* sums;
  T *x, *gp, *g1, *h;
  int64_t bytes;

  BackwardScratch(const TrainingParams<T>& p, bool forms_x, const WeightGradientPlan& plan, void* memory) {
    Scratch scratch(memory);
    const int64_t in_channels = p.conv.in_channels, out_channels = p.conv.out_channels;
    const int64_t pixels = output_pixels(p.conv);
    norm1 = scratch.rows(in_channels), norm2 = scratch.rows(out_channels);
    packed = scratch.take<float>(Packed<T>::size(in_channels, out_channels));
    transposed = scratch.take<float>(Packed<T>::size(out_channels, in_channels));
    sums = scratch.take<double>(std::max(pass_doubles(pixels, out_channels, 2), pass_doubles(pixels, in_channels, 9)));
    splits = scratch.take<float>(plan.splits * in_channels * out_channels);
    x = scratch.take<T>(forms_x ? p.conv.batch * in_channels * p.conv.height * p.conv.width : 0);
    gp = scratch.take<T>(pixels * padded(out_channels));
    g1 = scratch.take<T>(pixels * in_channels);
    h = scratch.take<T>(pixels * padded(in_channels));
    bytes = scratch.used();
  }
};

template <typename T>
WeightGradientPlan weight_gradient_plan(const TrainingParams<T>& p, const Device& device) {
  return weight_gradient_plan<T>(output_pixels(p.conv), p.conv.in_channels, p.conv.out_channels, device);
}

template <typename T>
int64_t backward_scratch_bytes(const TrainingParams<T>& p, bool forms_x, const Device& device) {
  return BackwardScratch<T>(p, forms_x, weight_gradient_plan(p, device), nullptr).bytes;
}

template <typename T>
void training_backward(const TrainingParams<T>& params, const TrainingModules<T>& modules, const float* x_normalization,
                       const Gradients<T>& gradients, const Device& device, void* memory, Stream stream) {
  const bool wants_depthwise = gradients.x != nullptr || gradients.dw_weight != nullptr;
  const bool wants_pointwise = wants_depthwise || gradients.dw_bias != nullptr || gradients.bn1_weight != nullptr ||
                               gradients.bn1_bias != nullptr || gradients.pw_weight != nullptr;
  const WeightGradientPlan plan = weight_gradient_plan(params, device);
  const BackwardScratch<T> scratch(params, x_normalization != nullptr, plan, memory);
  TrainingParams<T> p = params;
  const int64_t pixels = output_pixels(p.conv), in_channels = p.conv.in_channels, out_channels = p.conv.out_channels;

  set_norm<T>(modules.norm2, std::nullopt, scratch.norm2, nullptr, p.pointwise_activation, stream);
  p.affine2 = scratch.norm2.affine();
  p.correction2 = norm_backward(modules.norm2, normalize_backward_reduce(p, scratch.sums, stream), pixels,
                                scratch.norm2, gradients.pw_bias, gradients.bn2_weight, gradients.bn2_bias, stream);
  if (!wants_pointwise) return;

  if (x_normalization != nullptr) {
    SeparableParams<T> product = p.conv;  // of the block before
    product.y = const_cast<T*>(p.conv.x), product.out_channels = in_channels;
    product.out_height = p.conv.height, product.out_width = p.conv.width;
    const float* const rows = x_normalization;
    normalize_product(product, {rows, rows + in_channels, rows + 2 * in_channels}, Activation::kNone,
                      rows + 3 * in_channels, scratch.x, stream);
    p.conv.x = scratch.x;
  }
  pack_raw(p, modules, scratch.packed, stream);
  p.conv.packed = scratch.packed;
  set_norm<T>(modules.norm1, std::nullopt, scratch.norm1, nullptr, p.activation, stream);
  p.affine1 = scratch.norm1.affine();
  p.g1 = scratch.g1;
  product_gradient(p, scratch.gp, stream);
  pointwise_backward(p, modules.pw_weight, scratch.gp, scratch.transposed, device, stream);
  p.correction1 = norm_backward(modules.norm1, activation_backward(p, scratch.h, scratch.sums, stream), pixels,
                                scratch.norm1, gradients.dw_bias, gradients.bn1_weight, gradients.bn1_bias, stream);
  if (gradients.pw_weight != nullptr) {
    weight_gradient(scratch.gp, scratch.h, pixels, in_channels, out_channels, plan, scratch.splits, gradients.pw_weight,
                    stream);
  }
  if (!wants_depthwise) return;
  depthwise_backward(p, scratch.sums, gradients.dw_weight, stream);
  p.grad_x = gradients.x;
  if (p.grad_x != nullptr) input_gradient(p, stream);
}

}  // namespace fusedsep::cuda
