// SPDX-License-Identifier: BSD-3-Clause
//
// The passes of training, as kernels.cpp has the rest.
#include "calls.h"
#include "training-inl.h"

namespace {

using namespace fusedsep;

// What both calls are given: the numbers of SeparableParams in their order, from batch to pad_left; then whether maps
// are channels_last, the two activations, the modes of either BN, and processors and shared memory of the device.
struct Numbers {
  const int64_t *sizes, *codes;
  const double* eps;

  template <typename T>
  TrainingParams<T> params() const {
    const int64_t* n = sizes;
    TrainingParams<T> params{};
    params.conv = {nullptr,
                   nullptr,
                   nullptr,
                   n[0],
                   n[1],
                   n[2],
                   n[3],
                   n[4],
                   n[5],
                   n[6],
                   n[7],
                   n[8],
                   n[9],
                   n[10],
                   codes[0] != 0,
                   Activation::kNone,
                   Activation::kNone};
    params.activation = Activation(codes[1]), params.pointwise_activation = Activation(codes[2]);
    return params;
  }
  // `operands` are those of the operators, `statistics` means and variances of the batch of either BN.
  template <typename T>
  cuda::TrainingModules<T> modules(const void* const* operands, float* const* statistics) const {
    const auto norm = [&](int which) {
      const auto tensor = [&](int i) { return static_cast<const T*>(operands[6 * which + i]); };
      return cuda::TrainingNorm<T>{Statistics(codes[3 + which]),
                                   eps[which],
                                   sizes[which == 0 ? 1 : 4],
                                   tensor(1),
                                   tensor(2),
                                   tensor(3),
                                   tensor(4),
                                   tensor(5),
                                   statistics[2 * which],
                                   statistics[2 * which + 1]};
    };
    return {static_cast<const T*>(operands[0]), static_cast<const T*>(operands[6]), norm(0), norm(1)};
  }
  cuda::Device device() const { return {codes[5], codes[6]}; }
};

// Memory that is not initialized: filled with NaN.
class Poisoned {
 public:
  explicit Poisoned(int64_t bytes) : memory_(size_t(bytes) + 256, 0xff) {}
  void* get() {
    const size_t offset = (256 - reinterpret_cast<uintptr_t>(memory_.data()) % 256) % 256;
    return memory_.data() + offset;
  }

 private:
  std::vector<unsigned char> memory_;
};

}  // namespace

extern "C" {

// `maps` are x, p and y.
int training_forward(int type, void* const* maps, const void* const* operands, float* const* statistics,
                     float* normalization, const int64_t* sizes, const int64_t* codes, const double* eps) {
  return guarded(type, [&](auto zero) {
    using T = decltype(zero);
    const Numbers numbers{sizes, codes, eps};
    TrainingParams<T> params = numbers.params<T>();
    params.conv.x = static_cast<const T*>(maps[0]);
    params.conv.y = static_cast<T*>(maps[1]);
    params.y = static_cast<T*>(maps[2]);
    Poisoned scratch(cuda::forward_scratch_bytes(params, numbers.device()));
    cuda::training_forward(params, numbers.modules<T>(operands, statistics), normalization, numbers.device(),
                           scratch.get(), nullptr);
  });
}

// `maps` are x, p and grad_y; `gradients` those of Gradients in their order.
int training_backward(int type, void* const* maps, const void* const* operands, float* const* statistics,
                      const float* x_normalization, void* const* gradients, const int64_t* sizes, const int64_t* codes,
                      const double* eps) {
  return guarded(type, [&](auto zero) {
    using T = decltype(zero);
    const Numbers numbers{sizes, codes, eps};
    TrainingParams<T> params = numbers.params<T>();
    params.conv.x = static_cast<const T*>(maps[0]);
    params.conv.y = static_cast<T*>(maps[1]);
    params.grad_y = static_cast<const T*>(maps[2]);
    const auto to = [&](int i) { return static_cast<T*>(gradients[i]); };
    Poisoned scratch(cuda::backward_scratch_bytes(params, x_normalization != nullptr, numbers.device()));
    cuda::training_backward(params, numbers.modules<T>(operands, statistics), x_normalization,
                            {to(0), to(1), to(2), to(3), to(4), to(5), to(6), to(7), to(8)}, numbers.device(),
                            scratch.get(), nullptr);
  });
}

}  // extern "C"
