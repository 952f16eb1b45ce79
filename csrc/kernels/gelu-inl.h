// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "exp-inl.h"

namespace fusedsep {
namespace {

// GELU (D. Hendrycks, K. Gimpel, 2016) as it is defined, not one of its approximations:
//
//   x / 2 * erfc(-x / sqrt(2)) = max(0, x) - a * q,  a = |x|,  q = erfc(a / sqrt(2)) / 2
//
// and q = exp(-a^2 / 2) / (1 + sqrt(2) a) * P(t), t = (a - k) / (a + k), where P is nearly a constant (M. Shepherd,
// J. Laframboise, "Chebyshev Approximation of (1 + 2x) exp(x^2) erfc x in 0 <= x < inf", 1981). Its coefficients, of
// the lowest power first, are those of the polynomial through the Chebyshev nodes up to 14 for float, where it is off
// by 4e-9 of P, and up to 39 for double, 2e-17. No difference of near numbers is taken for negative x, so that the few
// percent of it that GELU hands on are precise too. Beyond `kMost` q is 0: a * q is 3e-37 and 2e-306 there, and with
// larger a some step would soon give a subnormal number, for which some processors take as long as for ten vectors.
template <typename T>
struct GeluConstants;
template <>
struct GeluConstants<float> {
  static constexpr float kMost = 12.9f, kCentre = 4;
  static constexpr float kSeries[] = {0x1.41c7dap-1f,  -0x1.0f10fcp-4f,  -0x1.03dc02p-5f, 0x1.1f5426p-4f,
                                      -0x1.ddbfc2p-5f, 0x1.d9520ap-6f,   -0x1.dd6842p-8f, -0x1.6c4e0cp-11f,
                                      0x1.137266p-10f, -0x1.1a404ep-14f, -0x1.bed75cp-14f};
};
template <>
struct GeluConstants<double> {
  static constexpr double kMost = 37.5, kCentre = 5;
  static constexpr double kSeries[] = {
      0x1.3ddc3d8fef7c6p-1,   -0x1.1eef47981a498p-4,  -0x1.12d6bf79857e5p-8,  0x1.86567c44c31adp-5,
      -0x1.d43f36c029b96p-5,  0x1.6bb7292c84e3ep-5,   -0x1.9c86836508061p-6,  0x1.4e860d65b9865p-7,
      -0x1.429a5a91d4303p-9,  -0x1.7622251bf6c5dp-15, 0x1.28a18a81a2f89p-12,  -0x1.3fa75e45e5fd3p-14,
      -0x1.18fbcf6dc3f3dp-16, 0x1.bfa28fd39de24p-17,  0x1.871228763bf74p-23,  -0x1.062f5dcc74697p-19,
      0x1.362b5c183b1d9p-23,  0x1.3f8bdd9757d7fp-22,  -0x1.c73ec9691905cp-26, -0x1.9a08b88a3214bp-25,
      -0x1.1bb936d1c7634p-32, 0x1.98a6f28cd9a8ap-28,  0x1.46936df72f1c2p-30};
};

template <class V>
FUSEDSEP_INLINE V gelu(V x) {
  using T = typename V::T;
  using C = GeluConstants<T>;
  constexpr int kTerms = int(sizeof(C::kSeries) / sizeof(T));
  const V one = V::broadcast(T(1)), centre = V::broadcast(C::kCentre);
  const V most = V::broadcast(C::kMost), magnitude = V::max(V::sub(V::zero(), x), x), a = V::min(most, magnitude);
  // 1 / (1 + sqrt(2) a) and t, with one division for both.
  const V scale = V::fma(a, V::broadcast(T(1.41421356237309504880)), one), above = V::add(a, centre);
  const V inverse = V::div(one, V::mul(scale, above));
  const V t = V::mul(V::mul(V::sub(a, centre), scale), inverse);
  V series = V::broadcast(C::kSeries[kTerms - 1]);
  FUSEDSEP_UNROLL(32)
  for (int i = kTerms - 2; i >= 0; --i) series = V::fma(series, t, V::broadcast(C::kSeries[i]));
  // exp(-a^2 / 2) with what rounding a^2 leaves, as a large exponent multiplies its error.
  const V half = V::broadcast(T(-0.5)), square = V::mul(a, a), rest = V::fma(a, a, V::sub(V::zero(), square));
  const V bell = V::mul(exp(V::mul(square, half)), V::fma(rest, half, one));
  const V product = V::mul(a, V::mul(V::mul(bell, V::mul(above, inverse)), series));
  return V::sub(V::max(V::zero(), x), V::select_above(magnitude, most, V::zero(), product));
}

}  // namespace
}  // namespace fusedsep
