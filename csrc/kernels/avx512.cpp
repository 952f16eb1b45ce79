// SPDX-License-Identifier: BSD-3-Clause
//
// AVX-512F.
#include "fingerprint-inl.h"
#include "isa.h"
#include "peak-inl.h"
#include "separable-inl.h"
#include "training-kernels-inl.h"
#include "vec_avx512.h"

namespace fusedsep {

const Isa& avx512_isa() {
  static const Isa isa{"avx512",
                       separable_kernels<Avx512F32>(),
                       separable_kernels<Avx512F64>(),
                       training_kernels<Avx512F32>(),
                       training_kernels<Avx512F64>(),
                       fingerprint,
                       multiply_adds<Avx512F32>,
                       multiply_adds_per_round<Avx512F32>()};
  return isa;
}

}  // namespace fusedsep
