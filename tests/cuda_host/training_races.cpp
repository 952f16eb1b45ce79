// SPDX-License-Identifier: BSD-3-Clause
//
// Each kernel of training once, as races.cpp has those of inference.
#include <cstdio>

#include "forward-inl.h"
#include "training-inl.h"

namespace {

using namespace fusedsep;

// The smallest maps that have two slots of sums and two chunks of pixels.
template <typename T>
void step(bool channels_last, int64_t in_channels) {
  constexpr int64_t kOut = 12, kHeight = 5, kWidth = 8, kBatch = 1;
  const int64_t pixels = kBatch * kHeight * kWidth;
  const std::vector<T> x(size_t(pixels * in_channels)), taps(size_t(in_channels * 9)),
      product(size_t(in_channels * kOut));
  const std::vector<T> grad_y(size_t(pixels * kOut));
  std::vector<T> p(grad_y.size()), y(p.size()), grad_x(x.size()), grad_taps(taps.size()), grad_product(product.size());
  std::vector<T> values(64);
  std::vector<float> statistics(4 * 64), normalization(size_t(4 * std::max(kOut, in_channels)));
  TrainingParams<T> params{};
  params.conv = {x.data(),      p.data(),          nullptr,          kBatch, in_channels, kHeight, kWidth,
                 kOut,          kHeight,           kWidth,           1,      1,           1,       1,
                 channels_last, Activation::kNone, Activation::kNone};
  params.activation = params.pointwise_activation = Activation::kRelu;
  params.y = y.data(), params.grad_y = grad_y.data();
  const auto norm = [&](int which, int64_t channels) {
    float* const own = statistics.data() + 128 * which;
    return cuda::TrainingNorm<T>{
        Statistics::kBatch, 1e-5, channels, nullptr, nullptr, nullptr, nullptr, nullptr, own, own + 64};
  };
  const cuda::TrainingModules<T> modules{taps.data(), product.data(), norm(0, in_channels), norm(1, kOut)};
  const cuda::Device device{1, 64 * 1024};
  std::vector<unsigned char> scratch(size_t(
      std::max(cuda::forward_scratch_bytes(params, device), cuda::backward_scratch_bytes(params, true, device)) + 256));
  unsigned char* const aligned = scratch.data() + (256 - reinterpret_cast<uintptr_t>(scratch.data()) % 256) % 256;
  cuda::training_forward(params, modules, normalization.data(), device, aligned, nullptr);
  T* const value = values.data();
  cuda::training_backward<T>(
      params, modules, normalization.data(),
      {grad_x.data(), grad_taps.data(), nullptr, value, nullptr, grad_product.data(), nullptr, nullptr, nullptr},
      device, aligned, nullptr);
}

}  // namespace

int main() {
  step<float>(false, 20), step<float>(true, 20);
  step<bfloat16>(true, 13);
  std::puts("no races");
}
