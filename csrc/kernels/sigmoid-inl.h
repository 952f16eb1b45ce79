// SPDX-License-Identifier: BSD-3-Clause
//
// Activations that need exp, or that stand at the end of a gate: a pass over a map that was just stored (join-inl.h),
// as none of them fits into the registers beside the accumulators of a product.
#pragma once

#include "activation-inl.h"
#include "exp-inl.h"
#include "gelu-inl.h"

namespace fusedsep {
namespace {

// act(x), lane by lane. NaN stays NaN.
//   silu         x / (1 + exp(-x))
//   sigmoid      1 / (1 + exp(-x))
//   hardsigmoid  min(6, max(0, x + 3)) / 6
//   gelu         x / 2 * erfc(-x / sqrt(2))
template <class V>
FUSEDSEP_INLINE V activate_stored(Activation activation, V x) {
  using T = typename V::T;
  const V one = V::broadcast(T(1));
  if (activation == Activation::kHardsigmoid) {
    const V gate = V::min(V::broadcast(T(6)), V::max(V::zero(), V::add(x, V::broadcast(T(3)))));
    return V::mul(gate, V::broadcast(T(1) / T(6)));
  }
  if (activation == Activation::kGelu) return gelu(x);
  const V denominator = V::add(one, exp(V::sub(V::zero(), x)));
  return V::div(activation == Activation::kSilu ? x : one, denominator);
}

// Whether it is applied by a pass, and not where the map is computed.
FUSEDSEP_INLINE bool is_stored_first(Activation activation) { return activation >= Activation::kSilu; }

// Any activation, where registers are free.
template <class V>
FUSEDSEP_INLINE V activate_any(Activation activation, V x) {
  return is_stored_first(activation) ? activate_stored(activation, x) : activate(activation, x);
}

// g * act'(x), lane by lane, where registers are free; of those here SiLU alone, whose derivative is
// s * (1 + x * (1 - s)), s = 1 / (1 + exp(-x)).
template <class V>
FUSEDSEP_INLINE V activation_gradient_any(Activation activation, V x, V g) {
  if (activation != Activation::kSilu) return activation_gradient(activation, x, g);
  const V one = V::broadcast(typename V::T(1));
  const V s = V::div(one, V::add(one, exp(V::sub(V::zero(), x))));
  return V::mul(g, V::mul(s, V::fma(x, V::sub(one, s), one)));
}

}  // namespace
}  // namespace fusedsep
