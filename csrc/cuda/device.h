// SPDX-License-Identifier: BSD-3-Clause
//
// The few words that CUDA and its emulation on the host (tests/cuda_host) say differently. Kernels use these and plain
// C++; nothing else in this folder asks which compiler it is.
#pragma once

#ifdef __CUDACC__

#include <stdexcept>
#include <string>

// The block's shared memory, one object a kernel, 16-byte aligned.
#define FUSEDSEP_SHARED(Type, name) __shared__ Type name

namespace fusedsep::cuda {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
            const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("a map this large needs more blocks than CUDA can launch at once");
  kernel<<<unsigned(blocks), unsigned(threads), 0, stream>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

}  // namespace fusedsep::cuda

#else
#include "cuda_emulation.h"
#endif

#define FUSEDSEP_DEVICE __device__ __forceinline__
