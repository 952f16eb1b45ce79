// SPDX-License-Identifier: BSD-3-Clause
//
// AVX2 and FMA.
#include "fingerprint-inl.h"
#include "isa.h"
#include "peak-inl.h"
#include "separable-inl.h"
#include "training-kernels-inl.h"
#include "vec_avx2.h"

namespace fusedsep {

const Isa& avx2_isa() {
  static const Isa isa{"avx2",
                       separable_kernels<Avx2F32>(),
                       separable_kernels<Avx2F64>(),
                       training_kernels<Avx2F32>(),
                       training_kernels<Avx2F64>(),
                       fingerprint,
                       multiply_adds<Avx2F32>,
                       multiply_adds_per_round<Avx2F32>()};
  return isa;
}

}  // namespace fusedsep
