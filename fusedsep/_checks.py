# SPDX-License-Identifier: BSD-3-Clause
"""Checks of arguments, with messages that name the argument, what was wanted and what came."""

from __future__ import annotations

import functools
from typing import Literal

import torch

from ._padding import Pads, output_size, resolve_padding


def check_positive_int(value: object, argument: str) -> int:
    """Return ``value`` if it is an int of at least 1, otherwise raise ``TypeError`` or ``ValueError``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{argument} must be at least 1, got {value}")
    return value


def check_input(
    x: torch.Tensor,
    weight: torch.Tensor,
    pre_pad: Pads | Literal["same"],
    own: object,
    stride: int,
    dilation: int,
    batch_statistics: bool,
) -> None:
    """Raise for an ``x`` that no path can run, naming what was wanted and what came.

    ``weight`` is the depthwise one; ``pre_pad`` and ``own`` are those of :func:`checked_pads`.
    """
    if isinstance(x, torch.fx.Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return  # the modules check for themselves, and a trace must not depend on these comparisons
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise TypeError(f"x must be a dense tensor, got layout {x.layout}")
    if x.dim() not in (3, 4):
        raise ValueError(f"x must have shape [N, C, H, W] or [C, H, W], got {list(x.shape)}")
    if x.shape[-3] != weight.shape[0]:
        raise ValueError(f"x must have {weight.shape[0]} channels, got {x.shape[-3]} in shape {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x must be on the device of the weights, {weight.device}, got {x.device}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x must have the dtype of the weights, {weight.dtype}, got {x.dtype}")
    pads = checked_pads(pre_pad, own, stride, dilation, *x.shape[-2:])
    if batch_statistics:
        check_values_per_channel(x, pads, stride, dilation)


def check_values_per_channel(x: torch.Tensor, pads: Pads, stride: int, dilation: int) -> None:
    """Raise where a batch has one value a channel, and so no variance."""
    out_height = output_size(x.shape[-2], pads.top, pads.bottom, stride, dilation)
    out_width = output_size(x.shape[-1], pads.left, pads.right, stride, dilation)
    if x.shape[:-3].numel() * out_height * out_width == 1:
        raise ValueError(
            "x must give more than 1 value per channel when training, since BN takes the statistics of the batch; "
            f"got one image with one output pixel from shape {list(x.shape)}"
        )


def checked_pads(
    pre_pad: Pads | Literal["same"], own: tuple[int, ...], stride: int, dilation: int, height: int, width: int
) -> Pads:
    """All zeros around a map: ``pre_pad`` and those of the convolution (:class:`Pads` or ``(pad_h, pad_w)``).

    Raises ``ValueError`` where the 3x3 kernel does not fit.
    """
    if torch.compiler.is_compiling():  # sizes may be symbols, and a trace is made once
        return _compute_pads(pre_pad, own, stride, dilation, height, width)
    return _cached_pads(pre_pad, own, stride, dilation, height, width)


def _compute_pads(
    pre_pad: Pads | Literal["same"], own: tuple[int, ...], stride: int, dilation: int, height: int, width: int
) -> Pads:
    own_pads = own if isinstance(own, Pads) else Pads(own[1], own[1], own[0], own[0])
    pads = own_pads + resolve_padding(pre_pad, height, width, stride, dilation)
    out_height = output_size(height, pads.top, pads.bottom, stride, dilation)
    out_width = output_size(width, pads.left, pads.right, stride, dilation)
    if min(height, width, out_height, out_width) < 1:
        raise ValueError(
            f"x must hold the 3x3 kernel with dilation {dilation}: a map of {height} x {width} with padding "
            f"{tuple(pads)} (left, right, top, bottom) is too small"
        )
    return pads


_cached_pads = functools.lru_cache(maxsize=1024)(_compute_pads)
