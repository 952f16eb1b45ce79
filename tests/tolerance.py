# SPDX-License-Identifier: BSD-3-Clause
"""How far a result in floating point may be from the float64 reference.

With u = eps / 2 the unit roundoff, a sum of n products has an error of at most n u / (1 - n u) times the sum of the
magnitudes of its terms, in any order and with or without fused multiply-adds (N. Higham, "Accuracy and Stability of
Numerical Algorithms", 2002, section 3.1). Let

    M1[c, i, j] = |b1[c]| + sum over u, v of |w1[c, u, v]| |x[c, i', j']|
    M2[o, i, j] = |b2[o]| + sum over c of |w2[o, c]| M1[c, i, j]

so that |h| <= M1 and |y| <= M2, as no activation makes a number larger. Then, in units of u,

    h   10 terms (9 products and a bias), one rounding each of folded weights and bias      12 M1
        an activation scales an error by at most 1.5 (hardswish) and rounds 4 times         1.5 * 12 + 4 = 22 M1
    y   K + 1 terms, one rounding each of folded weights and bias, what h brings along      (K + 3 + 22) M2
        an activation                                                                       (1.5 * (K + 25) + 4) M2

The bound uses eps = 2 u, which covers the denominators 1 - n u and the products of errors many times over. Where
numbers are so small that they lose digits to underflow, each operation may add half of the smallest subnormal number.
"""

from __future__ import annotations

import numpy as np
import reference_numpy

#: Our largest error may be this many times the one that unfused torch makes in the same type: either order of summation
#: may be the lucky one.
FACTOR_TO_TORCH = 2


def magnitude(case, operands) -> np.ndarray:
    """M2 above."""
    absolute = [np.abs(np.asarray(array, dtype=np.float64)) for array in operands]
    return reference_numpy.separable_conv2d(*absolute, case.pads, case.stride, case.dilation, "none", "none")


def bound(case, operands, dtype) -> np.ndarray:
    """The largest admissible error of every output element."""
    limits = np.finfo(dtype)
    k = case.in_channels
    underflow = (k + 10) * float(limits.smallest_subnormal) * (1 + np.abs(operands.pw_weight).sum())
    return (1.5 * (k + 25) + 4) * float(limits.eps) * magnitude(case, operands) + underflow


def one_rounding(expected: np.ndarray, dtype) -> float:
    """An error that no result in ``dtype`` can be blamed for: half a unit in the last place of the largest number."""
    return float(np.finfo(dtype).eps) / 2 * float(np.abs(expected).max(initial=0.0))


def assert_within_bound(actual, case, operands, dtype, expected) -> None:
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    excess = np.abs(actual - expected) - bound(case, operands, dtype)
    # Not `excess.max() > 0`: a NaN must fail too.
    assert np.all(excess <= 0), f"{case}: error exceeds its bound by {np.max(excess):.3g} at {np.argmax(excess)}"
