// SPDX-License-Identifier: BSD-3-Clause
//
// Each kernel once with the threads of a block as threads, for ThreadSanitizer, which ends the program at a race.
#include <cstdio>

#include "forward-inl.h"

namespace {

using namespace fusedsep;

template <typename T>
void run(bool channels_last, bool allow_tf32, const cuda::Plan& plan) {
  constexpr int64_t kIn = 40, kOut = 72, kHeight = 3, kWidth = 6, kBatch = 1;
  const std::vector<T> x(kBatch * kIn * kHeight * kWidth), taps(kIn * 9), product(kIn * kOut);
  std::vector<T> y(kBatch * kOut * kHeight * kWidth), scratch(kBatch * kHeight * kWidth * cuda::padded(kIn));
  std::vector<float> packed(size_t(cuda::Packed<T>::size(kIn, kOut)));
  cuda::pack<T>({taps.data(), nullptr, nullptr, product.data(), nullptr, nullptr, kIn, kOut, channels_last},
                packed.data(), nullptr);
  cuda::separable_forward<T>({x.data(), y.data(), packed.data(), kBatch, kIn, kHeight, kWidth, kOut, kHeight, kWidth, 1,
                              1, 1, 1, channels_last, Activation::kRelu, Activation::kRelu},
                             plan, allow_tf32, {1, 227 * 1024}, scratch.data(), nullptr);
}

}  // namespace

int main() {
  for (const bool channels_last : {false, true}) {
    for (const bool fused : {false, true}) run<float>(channels_last, false, {0, fused, 1});
  }
  run<float>(true, true, {0, true, 2});
  run<float16>(false, false, {0, false, 1});
  run<bfloat16>(true, false, {0, true, 1});
  std::puts("no races");
}
