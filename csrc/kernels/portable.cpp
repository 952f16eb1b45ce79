// SPDX-License-Identifier: BSD-3-Clause
//
// 32-byte vectors in compiler extensions, for any processor.
#include "fingerprint-inl.h"
#include "isa.h"
#include "peak-inl.h"
#include "separable-inl.h"
#include "training-kernels-inl.h"
#include "vec_portable.h"

namespace fusedsep {

const Isa& portable_isa() {
  static const Isa isa{"portable",
                       separable_kernels<PortableVec<float, 8>>(),
                       separable_kernels<PortableVec<double, 4>>(),
                       training_kernels<PortableVec<float, 8>>(),
                       training_kernels<PortableVec<double, 4>>(),
                       fingerprint,
                       multiply_adds<PortableVec<float, 8>>,
                       multiply_adds_per_round<PortableVec<float, 8>>()};
  return isa;
}

}  // namespace fusedsep
