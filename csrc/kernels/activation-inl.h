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
    default:  // those of sigmoid-inl.h
      return x;
  }
  return x;
}

// act(x) for the N vectors of a register tile, with one look at the activation for all.
template <int N, class V>
FUSEDSEP_INLINE void activate_tile(Activation activation, V* x) {
  switch (activation) {
#define FUSEDSEP_ACTIVATE(name)                                          \
  case Activation::name:                                                 \
    FUSEDSEP_UNROLL(32)                                                  \
    for (int i = 0; i < N; ++i) x[i] = activate(Activation::name, x[i]); \
    break;
    FUSEDSEP_ACTIVATE(kRelu)
    FUSEDSEP_ACTIVATE(kRelu6)
    FUSEDSEP_ACTIVATE(kHardswish)
#undef FUSEDSEP_ACTIVATE
    default:  // none, or one of sigmoid-inl.h
      break;
  }
}

// g * act'(x), lane by lane; at a kink the one-sided derivative that torch takes.
template <class V>
FUSEDSEP_INLINE V activation_gradient(Activation activation, V x, V g) {
  using T = typename V::T;
  switch (activation) {
    case Activation::kNone:
      return g;
    case Activation::kRelu:
      return V::select_above(x, V::zero(), g, V::zero());
    case Activation::kRelu6:
      return V::select_above(x, V::zero(), V::select_above(V::broadcast(T(6)), x, g, V::zero()), V::zero());
    case Activation::kHardswish: {
      const V slope = V::fma(x, V::broadcast(T(1) / T(3)), V::broadcast(T(0.5)));
      const V inner = V::select_above(V::broadcast(T(3)), x, V::mul(g, slope), g);
      return V::select_above(x, V::broadcast(T(-3)), inner, V::zero());
    }
    default:  // those of sigmoid-inl.h have no backward
      return g;
  }
  return g;
}

}  // namespace
}  // namespace fusedsep
