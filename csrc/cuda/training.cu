// SPDX-License-Identifier: BSD-3-Clause
#include "training-inl.h"

namespace fusedsep::cuda {

#define FUSEDSEP_TRAINING(T)                                                                                        \
  template int64_t forward_scratch_bytes(const TrainingParams<T>&, const Device&);                                  \
  template int64_t backward_scratch_bytes(const TrainingParams<T>&, bool, const Device&);                           \
  template void training_forward(const TrainingParams<T>&, const TrainingModules<T>&, float*, const Device&, void*, \
                                 Stream);                                                                           \
  template void training_backward(const TrainingParams<T>&, const TrainingModules<T>&, const float*,                \
                                  const Gradients<T>&, const Device&, void*, Stream);
FUSEDSEP_TRAINING(float)
FUSEDSEP_TRAINING(float16)
FUSEDSEP_TRAINING(bfloat16)

}  // namespace fusedsep::cuda
