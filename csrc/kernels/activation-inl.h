// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "separable.h"
#include "vec.h"

namespace fusedsep {
namespace {

// act(x), lane by lane. NaN stays NaN.
//   relu       max(0, x)
//   relu6      min(6, max(0, x))
//   hardswish  x * min(6, max(0, x + 3)) / 6
template <class V>
FUSEDSEP_INLINE V activate(Activation activation, V x) {
  using T = typename V::T;
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return V::max(V::zero(), x);
    case Activation::kRelu6:
      return V::min(V::broadcast(T(6)), V::max(V::zero(), x));
    case Activation::kHardswish: {
      const V shifted = V::add(x, V::broadcast(T(3)));
      const V gate = V::min(V::broadcast(T(6)), V::max(V::zero(), shifted));
      return V::mul(x, V::mul(gate, V::broadcast(T(1) / T(6))));
    }
  }
  return x;
}

}  // namespace
}  // namespace fusedsep
