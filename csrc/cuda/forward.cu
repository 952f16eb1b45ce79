// SPDX-License-Identifier: BSD-3-Clause
#include "forward-inl.h"

namespace fusedsep::cuda {

#define FUSEDSEP_FORWARD(T)                                                                                 \
  template void pack(const PackParams<T>&, float*, Stream);                                                 \
  template void pack(const ModuleTensors<T>&, float*, Stream);                                              \
  template Plan plan_of(const SeparableParams<T>&, bool, const Device&);                                    \
  template int64_t scratch_elements(const SeparableParams<T>&, const Plan&);                                \
  template void separable_forward(const SeparableParams<T>&, const Plan&, bool, const Device&, T*, Stream); \
  template void multiply_rows(const SeparableParams<T>&, const T*, double*, const Device&, Stream);         \
  template int64_t moment_pixels(const SeparableParams<T>&, const Device&);
FUSEDSEP_FORWARD(float)
FUSEDSEP_FORWARD(float16)
FUSEDSEP_FORWARD(bfloat16)

}  // namespace fusedsep::cuda
