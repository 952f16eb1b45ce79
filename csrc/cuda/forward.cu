// SPDX-License-Identifier: BSD-3-Clause
#include "forward-inl.h"

namespace fusedsep::cuda {

Device current_device() {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  return {multiprocessors};
}

template void pack(const PackParams<float>&, float*, Stream);
template void pack(const PackParams<float16>&, float*, Stream);
template void pack(const PackParams<bfloat16>&, float*, Stream);
template void separable_forward(const SeparableParams<float>&, int, const Device&, Stream);
template void separable_forward(const SeparableParams<float16>&, int, const Device&, Stream);
template void separable_forward(const SeparableParams<bfloat16>&, int, const Device&, Stream);

}  // namespace fusedsep::cuda
