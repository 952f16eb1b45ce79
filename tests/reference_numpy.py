# SPDX-License-Identifier: BSD-3-Clause
"""The operation in plain NumPy, in float64, without torch: what the kernels must equal."""

from __future__ import annotations

import numpy as np

ACTIVATIONS = {
    "none": lambda v: v,
    "relu": lambda v: np.maximum(v, 0),
    "relu6": lambda v: np.minimum(np.maximum(v, 0), 6),
    "hardswish": lambda v: v * np.minimum(np.maximum(v + 3, 0), 6) / 6,
}


def separable_conv2d(
    x, dw_weight, dw_bias, pw_weight, pw_bias, pads, stride, dilation, activation, pointwise_activation
):
    """``x``: (N, C, H, W); ``dw_weight``: (C, 3, 3); ``pw_weight``: (O, C); ``pads``: left, right, top, bottom."""
    x, dw_weight, dw_bias, pw_weight, pw_bias = (
        np.asarray(array, dtype=np.float64) for array in (x, dw_weight, dw_bias, pw_weight, pw_bias)
    )
    left, right, top, bottom = pads
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    out_height = (x.shape[2] - 2 * dilation - 1) // stride + 1
    out_width = (x.shape[3] - 2 * dilation - 1) // stride + 1
    with np.errstate(invalid="ignore"):  # Inf - Inf and 0 * Inf are NaN, as they should be
        h = np.zeros((*x.shape[:2], out_height, out_width)) + dw_bias[:, None, None]
        for u in range(3):
            for v in range(3):
                i, j = u * dilation, v * dilation
                rows = slice(i, i + (out_height - 1) * stride + 1, stride)
                columns = slice(j, j + (out_width - 1) * stride + 1, stride)
                h = h + dw_weight[:, u, v, None, None] * x[:, :, rows, columns]
        h = ACTIVATIONS[activation](h)
        y = np.moveaxis(np.tensordot(pw_weight, h, axes=(1, 1)), 0, 1)
        return ACTIVATIONS[pointwise_activation](y + pw_bias[:, None, None])
