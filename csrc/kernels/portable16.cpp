// SPDX-License-Identifier: BSD-3-Clause
//
// 64-byte vectors in compiler extensions: the tiles of AVX-512 on any processor, for tests.
#define FUSEDSEP_NO_UNROLL
#include "fingerprint-inl.h"
#include "isa.h"
#include "peak-inl.h"
#include "separable-inl.h"
#include "training-kernels-inl.h"
#include "vec_portable.h"

namespace fusedsep {

const Isa& portable16_isa() {
  static const Isa isa{"portable16",
                       separable_kernels<PortableVec<float, 16>>(),
                       separable_kernels<PortableVec<double, 8>>(),
                       training_kernels<PortableVec<float, 16>>(),
                       training_kernels<PortableVec<double, 8>>(),
                       fingerprint,
                       multiply_adds<PortableVec<float, 16>>,
                       multiply_adds_per_round<PortableVec<float, 16>>()};
  return isa;
}

}  // namespace fusedsep
