// SPDX-License-Identifier: BSD-3-Clause
//
// The few words that CUDA and its emulation on the host (tests/cuda_host) say differently. Kernels use these and plain
// C++; nothing else in this folder asks which compiler it is.
#pragma once

#ifdef __CUDACC__

#include <stdexcept>
#include <string>

// The block's shared memory: as many bytes as the launch said, 16-byte aligned.
#define FUSEDSEP_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace fusedsep::cuda {

// What a block may have without asking for more.
constexpr int64_t kSharedBytesEverywhere = 48 * 1024;

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// 16 bytes from global to shared memory, or zeros unless `valid`: asynchronous where the processor can.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  const auto address = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : uint4();
#endif
}
// Copies up to here are one group; waits until at most the last `kGroups` of the thread's groups are still under way.
__device__ __forceinline__ void end_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kGroups>
__device__ __forceinline__ void wait_for_groups() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("a map this large needs more blocks than CUDA can launch at once");
  if (shared_bytes > kSharedBytesEverywhere) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  }
  kernel<<<unsigned(blocks), unsigned(threads), size_t(shared_bytes), stream>>>(arguments...);
  check(cudaGetLastError());
}

}  // namespace fusedsep::cuda

#else
#include "cuda_emulation.h"
#endif

#define FUSEDSEP_DEVICE __device__ __forceinline__
