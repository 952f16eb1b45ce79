// SPDX-License-Identifier: BSD-3-Clause
//
// Each kernel once with the threads of a block as threads, for ThreadSanitizer, which ends the program at a race.
#include <cstdio>

#include "forward-inl.h"

namespace {

using namespace fusedsep;

template <typename T>
void run(bool channels_last, int shape) {
  constexpr int64_t kIn = 20, kOut = 40, kHeight = 5, kWidth = 6, kBatch = 2;
  const std::vector<T> x(kBatch * kIn * kHeight * kWidth), taps(kIn * 9), product(kIn * kOut);
  std::vector<T> y(kBatch * kOut * kHeight * kWidth);
  std::vector<float> packed(size_t(cuda::Packed<float>::size(kIn, kOut)));
  cuda::pack<T>({taps.data(), nullptr, nullptr, product.data(), nullptr, nullptr, kIn, kOut, channels_last},
                packed.data(), nullptr);
  cuda::separable_forward<T>({x.data(), y.data(), packed.data(), kBatch, kIn, kHeight, kWidth, kOut, kHeight, kWidth, 1,
                              1, 1, 1, channels_last, Activation::kRelu, Activation::kRelu},
                             shape, {1}, nullptr);
}

}  // namespace

int main() {
  for (const bool channels_last : {false, true}) {
    for (int shape = 0; shape < cuda::kShapes; ++shape) run<float>(channels_last, shape);
    run<float16>(channels_last, 0);
    run<bfloat16>(channels_last, 0);
  }
  std::puts("no races");
}
