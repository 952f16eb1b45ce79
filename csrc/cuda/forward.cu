// SPDX-License-Identifier: BSD-3-Clause
#include "forward-inl.h"

namespace fusedsep::cuda {

template void pack(const PackParams<float>&, float*, cudaStream_t);
template void pack(const PackParams<float16>&, float*, cudaStream_t);
template void pack(const PackParams<bfloat16>&, float*, cudaStream_t);
template void separable_forward(const SeparableParams<float>&, int, const Device&, cudaStream_t);
template void separable_forward(const SeparableParams<float16>&, int, const Device&, cudaStream_t);
template void separable_forward(const SeparableParams<bfloat16>&, int, const Device&, cudaStream_t);

}  // namespace fusedsep::cuda
