// SPDX-License-Identifier: BSD-3-Clause
//
// Kernels with a fault each, to see that the emulation finds it.
#include <cstdio>

#include "device.h"

namespace {

constexpr int kThreads = 64;
struct Shared {
  float values[kThreads];
};

enum Fault { kNone, kNoBarrier, kDivergentBarrier, kUnwritten };

// Reverses the numbers of its threads.
__global__ void reverse(Fault fault, float* to) {
  FUSEDSEP_SHARED(Shared, shared);
  const int i = int(threadIdx.x);
  if (fault != kUnwritten || i != 3) shared.values[i] = float(i);
  if (fault == kNone || fault == kUnwritten || (fault == kDivergentBarrier && i < kThreads / 2)) __syncthreads();
  to[i] = shared.values[kThreads - 1 - i];
}

bool is_right(Fault fault, int thread_order) {
  fusedsep::emulation::thread_order = thread_order;
  float result[kThreads];
  fusedsep::cuda::launch(reverse, 1, kThreads, nullptr, fault, &result[0]);
  for (int i = 0; i < kThreads; ++i) {
    if (result[i] != float(kThreads - 1 - i)) return false;
  }
  return true;
}

bool throws(Fault fault) {
  try {
    is_right(fault, 0);
  } catch (const std::logic_error&) {
    return true;
  }
  return false;
}

}  // namespace

int main() {
  std::printf(is_right(kNone, 0) && is_right(kNone, 1) && is_right(kNone, 7) ? "right " : "wrong ");
  std::printf("barrier:%s ", is_right(kNoBarrier, 0) && is_right(kNoBarrier, 1) ? "missed" : "found");
  std::printf("divergence:%s ", throws(kDivergentBarrier) ? "found" : "missed");
  std::printf("unwritten:%s\n", is_right(kUnwritten, 0) ? "missed" : "found");
}
