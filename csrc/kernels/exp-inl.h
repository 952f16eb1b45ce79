// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "vec.h"

namespace fusedsep {
namespace {

// exp(x) = 2^n * exp(r), with n = round(x / ln 2) and r = x - n ln 2 in two parts, of which the first times n is exact;
// exp(r), |r| <= ln 2 / 2, by its Taylor series (W. Cody, W. Waite, "Software Manual for the Elementary Functions",
// 1980). Within 2 units in the last place above kLeast, 0 below; infinite where exp(x) is. NaN stays NaN.
template <typename T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr int kTerms = 7;  // 0.3466^8 / 8! = 5e-9
  static constexpr float kLeast = -87.0f, kMost = 89.0f, kHigh = 0x1.63p-1f, kLow = -0x1.bd0106p-13f;
  static constexpr float kRounder = 0x1.8p23f, kBias = 126;
};
template <>
struct ExpConstants<double> {
  static constexpr int kTerms = 13;  // 0.3466^14 / 14! = 4e-18
  static constexpr double kLeast = -708.4, kMost = 710.0, kHigh = 0x1.62e42feep-1, kLow = 0x1.a39ef35793c76p-33;
  static constexpr double kRounder = 0x1.8p52, kBias = 1022;
};

template <typename T>
constexpr T inverse_factorial(int k) {
  T factorial = 1;
  for (int i = 2; i <= k; ++i) factorial *= T(i);
  return T(1) / factorial;
}

template <class V, int k>
FUSEDSEP_INLINE V exp_series(const V& r, const V& sum) {
  using T = typename V::T;
  const V next = V::fma(sum, r, V::broadcast(inverse_factorial<T>(k)));
  if constexpr (k > 0) {
    return exp_series<V, k - 1>(r, next);
  } else {
    return next;
  }
}

template <class V>
FUSEDSEP_INLINE V exp(V x) {
  using T = typename V::T;
  using C = ExpConstants<T>;
  const V rounder = V::broadcast(C::kRounder);
  x = V::max(V::broadcast(C::kLeast), V::min(V::broadcast(C::kMost), x));
  const V n = V::sub(V::fma(x, V::broadcast(T(1.44269504088896340736)), rounder), rounder);
  const V r = V::fma(n, V::broadcast(-C::kLow), V::fma(n, V::broadcast(-C::kHigh), x));
  const V series = exp_series<V, C::kTerms - 1>(r, V::broadcast(inverse_factorial<T>(C::kTerms)));
  // 2^(n - 1), whose exponent fits for all n, from the low bits of a sum that rounds to a whole number. At the least n
  // it is 0.
  const V half = V::shift_to_exponent(V::add(n, V::broadcast(C::kRounder + C::kBias)));
  return V::mul(V::mul(series, half), V::broadcast(T(2)));
}

}  // namespace
}  // namespace fusedsep
