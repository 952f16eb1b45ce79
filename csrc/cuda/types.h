// SPDX-License-Identifier: BSD-3-Clause
//
// Types of the elements of maps, besides float, and of a stream, without a header of CUDA.
#pragma once

#include <cstdint>

#include "../kernels/separable.h"

struct CUstream_st;

namespace fusedsep {

struct alignas(2) float16 {  // IEEE 754 binary16
  uint16_t bits;
};
struct alignas(2) bfloat16 {  // the upper half of a float
  uint16_t bits;
};
template <>
struct WeightOf<float16> {
  using type = float;
};
template <>
struct WeightOf<bfloat16> {
  using type = float;
};

namespace cuda {
using Stream = CUstream_st*;  // cudaStream_t
}

}  // namespace fusedsep
