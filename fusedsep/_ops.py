# SPDX-License-Identifier: BSD-3-Clause
"""The operators of the extension: handles, and their shapes for tracing."""

from __future__ import annotations

import torch

from . import _C
from ._padding import output_size

pack = torch.ops.fusedsep.pack.default
separable_conv2d = torch.ops.fusedsep.separable_conv2d.default


@torch.library.register_fake("fusedsep::pack")
def _(dw_weight, dw_scale, dw_bias, pw_weight, pw_scale, pw_bias, channels_last):  # type: ignore[no-untyped-def]
    size = _C.packed_size(
        dw_weight.shape[0], pw_weight.shape[0], channels_last, 4 if dw_weight.dtype == torch.float32 else 8
    )
    return dw_weight.new_empty(size)


@torch.library.register_fake("fusedsep::separable_conv2d")
def _(  # type: ignore[no-untyped-def]
    x,
    packed,
    out_channels,
    stride,
    dilation,
    pad_left,
    pad_right,
    pad_top,
    pad_bottom,
    activation,
    pointwise_activation,
    channels_last,
):
    batch, _, height, width = x.shape
    out_height = output_size(height, pad_top, pad_bottom, stride, dilation)
    out_width = output_size(width, pad_left, pad_right, stride, dilation)
    if channels_last:
        return x.new_empty((batch, out_height, out_width, out_channels)).permute(0, 3, 1, 2)
    return x.new_empty((batch, out_channels, out_height, out_width))
