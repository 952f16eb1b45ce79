// SPDX-License-Identifier: BSD-3-Clause
//
// Kernels with a fault each, to see that the emulation finds it.
#include <cstdio>

#include "device.h"

namespace {

constexpr int kThreads = 64;

enum Fault { kNone, kNoBarrier, kDivergentBarrier, kUnwritten, kNoWait };

// Reverses the numbers of its threads.
__global__ void reverse(Fault fault, float* to) {
  FUSEDSEP_SHARED(shared);
  float* const values = reinterpret_cast<float*>(shared);
  const int i = int(threadIdx.x);
  if (fault == kNoWait && i == 0) {
    alignas(16) static const float from[4] = {0, 1, 2, 3};
    fusedsep::cuda::copy_async(values, from, true);
    fusedsep::cuda::end_group();
    fusedsep::cuda::wait_for_groups<1>();
  } else if ((fault != kUnwritten || i != 3) && (fault != kNoWait || i >= 4)) {
    values[i] = float(i);
  }
  if (fault == kNone || fault == kUnwritten || fault == kNoWait || (fault == kDivergentBarrier && i < kThreads / 2))
    __syncthreads();
  to[i] = values[kThreads - 1 - i];
  fusedsep::cuda::wait_for_groups<0>();
}

bool is_right(Fault fault, int thread_order) {
  fusedsep::emulation::thread_order = thread_order;
  float result[kThreads];
  fusedsep::cuda::launch(reverse, 1, kThreads, kThreads * int64_t(sizeof(float)), nullptr, fault, &result[0]);
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
  std::printf("unwritten:%s ", is_right(kUnwritten, 0) ? "missed" : "found");
  std::printf("wait:%s\n", is_right(kNoWait, 0) && is_right(kNoWait, 1) ? "missed" : "found");
}
